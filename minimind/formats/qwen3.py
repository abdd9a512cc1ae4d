"""Models in the files that Hugging Face transformers reads.

The architecture is Qwen3, or Qwen3-MoE for a mixture of experts, so transformers, vLLM, llama.cpp's converter
and others need no code of ours.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConfigError, UserError
from ..model_config import MiniMindConfig
from ..modeling.transformer import MiniMindForCausalLM
from .expert_names import to_checkpoint_names

CONFIG = "config.json"
GENERATION = "generation_config.json"
WEIGHTS = "model.safetensors"

_TIED = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"
_WHAT_TO_NAME = "--from-weight takes a folder with the config.json and model.safetensors of a Qwen3 model"


def save_model(
    model: MiniMindForCausalLM,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float16,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write a model; see `save_weights`."""
    save_weights(model.state_dict(), model.config, folder, dtype, generation)


def save_weights(
    state_dict: Mapping[str, Tensor],
    config: MiniMindConfig,
    folder: Path,
    dtype: torch.dtype = torch.float16,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write whole weights and their config. Other files in the folder, such as a tokenizer, stay.

    Everything is written and flushed under other names first and then renamed, so that a reader finds the
    old model or the new one, and a full disk leaves the old one.

    Args:
        state_dict: all parameters as a model names them, on any device; a tied matrix may stand twice.
        config: the shape.
        folder: made where it does not exist.
        dtype: what the weights are rounded to, float16 or bfloat16.
        generation: more keys for `generation_config.json`, such as `temperature`.

    Raises:
        UserError: when weights are too large for the dtype, or the folder cannot be written.
    """
    tensors = {
        name: _rounded(name, tensor, dtype)
        for name, tensor in to_checkpoint_names(state_dict).items()
        if not (config.tie_word_embeddings and name == _TIED)
    }
    # transformers 4 reads the older of the two names.
    precision = str(dtype).removeprefix("torch.")
    described = {**config.to_dict(), "torch_dtype": precision, "dtype": precision}
    tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    texts = {GENERATION: {**tokens, **(generation or {})}, CONFIG: described}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, _temporary(folder, WEIGHTS), metadata={"format": "pt"})
        for name, values in texts.items():
            _temporary(folder, name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        for name in (WEIGHTS, *texts):
            _flush(_temporary(folder, name))
        for name in (WEIGHTS, *texts):
            os.replace(_temporary(folder, name), folder / name)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        for name in (WEIGHTS, *texts):
            _temporary(folder, name).unlink(missing_ok=True)
        raise UserError(f"the model could not be written to {folder}: {error}.") from error


def load_config(folder: Path) -> MiniMindConfig:
    """Read the `config.json` of a model folder.

    Raises:
        ConfigError: when it is missing, not JSON, or describes another architecture.
    """
    path = Path(folder) / CONFIG
    if not Path(folder).is_dir():
        raise ConfigError(f"{folder} is not a folder; {_WHAT_TO_NAME}.")
    if not path.is_file():
        raise ConfigError(f"{folder} holds no {CONFIG}; {_WHAT_TO_NAME}.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ConfigError("the file is not a JSON object.")
        return MiniMindConfig.from_dict(values)
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}; {_WHAT_TO_NAME}.") from error
    except ConfigError as error:
        raise ConfigError([f"{path}: {problem} {_WHAT_TO_NAME}." for problem in error.problems]) from error


def load_model(folder: Path) -> MiniMindForCausalLM:
    """Read a model folder into a float32 model on the CPU.

    Raises:
        ConfigError: when a file is missing or damaged, or weights and config do not belong together.
    """
    config = load_config(folder)
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise ConfigError(
            f"{folder} holds no {WEIGHTS}; save the weights as one safetensors file "
            "(save_pretrained(folder, safe_serialization=True, max_shard_size='50GB') in transformers)."
        )
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); it is damaged, copy or save it again."
        ) from error
    return build_model(config, weights, str(path))


def build_model(config: MiniMindConfig, weights: Mapping[str, Tensor], source: str) -> MiniMindForCausalLM:
    """Return a float32 model with the given weights.

    Args:
        config: the shape.
        weights: every parameter by its Hugging Face name; a tied output matrix may be left out.
        source: the file the weights come from, for errors.

    Raises:
        ConfigError: when names or shapes differ from what the config asks for.
    """
    with torch.device("meta"):
        model = MiniMindForCausalLM(config)
    # Not initialised, since every parameter is about to be overwritten; `to_empty` unties.
    model = model.to_empty(device="cpu")
    model.tie_weights()
    weights = dict(weights)
    if config.tie_word_embeddings and _EMBEDDING in weights:
        output = weights.setdefault(_TIED, weights[_EMBEDDING])
        if not torch.equal(output, weights[_EMBEDDING]):
            raise ConfigError(
                f"{source}: {_TIED} differs from {_EMBEDDING}, but the config ties them; "
                "set tie_word_embeddings to false."
            )
    expected = to_checkpoint_names(model.state_dict())
    problems = [f"{source} has no {name}." for name in sorted(expected.keys() - weights.keys())]
    problems += [
        f"{source} has {name}, which this model has not." for name in sorted(weights.keys() - expected.keys())
    ]
    problems += [
        f"{source}: {name} is {tuple(weights[name].shape)}, but the config makes it {tuple(tensor.shape)}."
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if problems:
        more = f"{len(problems) - 1} more such differences; " if len(problems) > 1 else ""
        raise ConfigError(f"{problems[0]} {more}Take the config that belongs to these weights.")
    for name, tensor in expected.items():
        tensor.copy_(weights[name])
    return model


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy in `dtype` on the CPU.

    Raises:
        UserError: when finite values become infinite.
    """
    rounded = tensor.detach().to("cpu", dtype, copy=True).contiguous()
    if not rounded.isfinite().all() and tensor.isfinite().all():
        raise UserError(f"{name} holds values too large for {dtype}; save the model in torch.bfloat16.")
    return rounded


def _temporary(folder: Path, name: str) -> Path:
    return folder / f".{name}.tmp"


def _flush(path: Path) -> None:
    """Make sure that a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
