"""Read and write Hugging Face model folders.

The architecture is Qwen3, or Qwen3-MoE for a mixture of experts, so transformers, vLLM and llama.cpp's
converter load the folders without custom code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, UserError
from ..io.atomic import replace_files
from ..io.checksums import check_files
from ..io.reading import read_json
from ..io.safetensors import write_tensors
from ..modeling.config import MiniMindConfig
from ..modeling.transformer import MiniMindForCausalLM
from .sharded_safetensors import INDEX, index_of, plan_files, read_weights, remove_other_weights
from .weight_header import check_layers

# Parameters of `modeling.moe.Experts`, stacked over the experts of a block.
_STACK = re.compile(r"(.*\.mlp\.experts)\.((?:gate|up|down)_proj)")

CONFIG = "config.json"
GENERATION = "generation_config.json"

_OUTPUT = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"
_EXPECTED = "name a folder with the config.json and the safetensors of a Qwen3 model"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_READABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


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
    max_shard_bytes: int | None = None,
) -> None:
    """Write weights and config; other files in the folder, such as a tokenizer, stay.

    The files are replaced atomically: a full disk leaves the old model; see `replace_files`.

    Args:
        state_dict: all parameters of the model, on any device; a tied output matrix is optional.
        folder: created where it does not exist.
        dtype: precision of the stored weights: float32, float16 or bfloat16.
        generation: more keys for `generation_config.json`, such as `temperature`.
        max_shard_bytes: shard larger weights, with an index; None writes one file.

    Raises:
        UserError: when weights overflow the dtype, or the folder cannot be written.
    """
    try:
        with replace_files(folder) as written:
            files = write_weights(state_dict, config, written, dtype, generation, max_shard_bytes)
        remove_other_weights(folder, files)
    except OSError as error:
        raise UserError(f"the model could not be written to {folder}: {error}.") from error


def write_weights(
    state_dict: Mapping[str, Tensor],
    config: MiniMindConfig,
    folder: Path,
    dtype: torch.dtype,
    generation: Mapping[str, Any] | None = None,
    max_shard_bytes: int | None = None,
) -> list[str]:
    """Write the files of `save_weights` into an empty folder; return the names of the weight files.

    Raises:
        OSError: when the folder cannot be written.
        UserError: when weights are too large for the dtype.
    """
    tensors = {
        name: tensor
        for name, tensor in to_checkpoint_names(state_dict).items()
        if not (config.tie_word_embeddings and name == _OUTPUT)
    }
    # transformers 4 reads `torch_dtype`.
    precision = str(dtype).removeprefix("torch.")
    described = {**config.to_dict(), "torch_dtype": precision, "dtype": precision}
    tokens = {name: getattr(config, name) for name in TOKEN_IDS}
    sizes = {name: tensor.numel() * dtype.itemsize for name, tensor in tensors.items()}
    files = plan_files(sizes, max_shard_bytes)
    texts: dict[str, Any] = {GENERATION: {**tokens, **(generation or {})}, CONFIG: described}
    if len(files) > 1:
        texts = {INDEX: index_of(files, sizes), **texts}
    for file, names in files.items():
        rounded = {name: round_to(name, tensors[name], dtype) for name in names}
        write_tensors(folder / file, rounded, metadata={"format": "pt"})
    for name, values in texts.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return list(files)


def load_config(folder: Path) -> MiniMindConfig:
    """Read the `config.json` of a model folder.

    Raises:
        ConfigError: when it is missing, damaged, or of another architecture.
    """
    path = Path(folder) / CONFIG
    if not Path(folder).is_dir():
        raise ConfigError(f"{folder} is not a folder; {_EXPECTED}.")
    if not path.is_file():
        raise ConfigError(f"{folder} holds no {CONFIG}; {_EXPECTED}.")
    check_files(Path(folder), (CONFIG, GENERATION))
    try:
        values = read_json(path)
        if not isinstance(values, dict):
            raise ConfigError("the file is not a JSON object.")
        return MiniMindConfig.from_dict(values)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); {_EXPECTED}.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}; {_EXPECTED}.") from error
    except ConfigError as error:
        raise ConfigError(
            [f"{path}: {problem.rstrip('.')}; {_EXPECTED}." for problem in error.problems]
        ) from error


def load_token_settings(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the special token ids and generation settings of a model folder, by file, as they are written.

    An id may be null, missing, or a list of eos ids, which `MiniMindConfig` does not represent. Without a
    `generation_config.json`, transformers takes the ids of `config.json`.

    Raises:
        ConfigError: when `generation_config.json` is damaged.
    """
    config = read_json(folder / CONFIG)
    ids = {name: config.get(name) for name in TOKEN_IDS}
    path = folder / GENERATION
    try:
        generation = read_json(path) if path.exists() else ids
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); copy it again, or remove it.") from error
    if not isinstance(generation, dict):
        raise ConfigError(f"{path} is not a JSON object; copy it again, or remove it.")
    return {CONFIG: ids, GENERATION: generation}


def load_weights(folder: Path, config: MiniMindConfig) -> dict[str, Tensor]:
    """Read the weights of a model folder in their stored precision; see `check_weights`.

    Raises:
        ConfigError: when a file is missing or damaged, or the weights do not match the config.
    """
    return check_weights(config, read_weights(Path(folder)), str(folder))


def load_model(folder: Path) -> MiniMindForCausalLM:
    """Read a model folder into a float32 model on the CPU.

    Raises:
        ConfigError: when a file is missing or damaged, or the weights do not match the config.
    """
    config = load_config(folder)
    return model_from_weights(config, read_weights(Path(folder)), str(folder))


def model_from_weights(
    config: MiniMindConfig, weights: Mapping[str, Tensor], source: str
) -> MiniMindForCausalLM:
    """Return a float32 model with the given weights.

    Args:
        weights: every parameter by its Hugging Face name; a tied output matrix is optional.
        source: path of the weights, for errors.

    Raises:
        ConfigError: when names or shapes do not match the config.
    """
    weights = check_weights(config, weights, source)
    with torch.device("meta"):
        model = MiniMindForCausalLM(config)
    # Every parameter is overwritten, so skip the initialization; `to_empty` unties.
    model = model.to_empty(device="cpu")
    model.tie_weights()
    if config.tie_word_embeddings:
        weights[_OUTPUT] = weights[_EMBEDDING]
    for name, tensor in to_checkpoint_names(model.state_dict()).items():
        tensor.copy_(weights[name])
    return model


def check_weights(config: MiniMindConfig, weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return the weights by their names in files, a tied matrix once, after checking them against the config.

    Args:
        weights: every parameter by its name in a model or a file; a tied output matrix is optional.
        source: path of the weights, for errors.

    Raises:
        ConfigError: naming the first parameter that is missing, unexpected, or of another shape.
    """
    weights = to_checkpoint_names(weights)
    check_layers(config, weights, source)
    with torch.device("meta"):
        expected = to_checkpoint_names(MiniMindForCausalLM(config).state_dict())
    if config.tie_word_embeddings:
        del expected[_OUTPUT]
        output = weights.pop(_OUTPUT, None)
        if output is not None and _EMBEDDING in weights and not torch.equal(output, weights[_EMBEDDING]):
            raise ConfigError(
                f"{source}: {_OUTPUT} differs from {_EMBEDDING}, but the config ties them; "
                "set tie_word_embeddings to false."
            )
    problems = [f"{source} has no {name}." for name in sorted(expected.keys() - weights.keys())]
    problems += [f"{source} has an unexpected {name}." for name in sorted(weights.keys() - expected.keys())]
    problems += [
        f"{source}: {name} is {tuple(weights[name].shape)}, but the config makes it {tuple(tensor.shape)}."
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if problems:
        more = f"{len(problems) - 1} more differences. " if len(problems) > 1 else ""
        raise ConfigError(f"{problems[0]} {more}Use the config.json that belongs to these weights.")
    for name, tensor in weights.items():
        if tensor.dtype not in _READABLE:
            raise ConfigError(f"{source}: {name} is {tensor.dtype}; quantized weights cannot be read.")
    return weights


def round_to(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy in `dtype` on the CPU.

    Raises:
        UserError: when finite values overflow.
    """
    rounded = tensor.detach().to("cpu", dtype, copy=True).contiguous()
    if not rounded.isfinite().all() and tensor.isfinite().all():
        raise UserError(f"{name} has values too large for {dtype}; save the model in torch.bfloat16.")
    return rounded


def to_checkpoint_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights by their names in files: stacked experts become one matrix per expert.

    `model.layers.0.mlp.experts.up_proj`, (E, F, C), becomes `model.layers.0.mlp.experts.0.up_proj.weight` and
    so on, (F, C) each. These are views: copying into them fills the model.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if (stack := _STACK.fullmatch(name)) is None:
            named[name] = tensor
        else:
            experts, projection = stack.groups()
            named |= {f"{experts}.{e}.{projection}.weight": matrix for e, matrix in enumerate(tensor)}
    return named
