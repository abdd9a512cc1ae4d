"""Read and write weights of the original minimind: a `.pth` with a half-precision state dict.

https://github.com/jingyaogong/minimind has Hugging Face parameter names, so only the config differs. A `.pth`
is a pickle, which can run code when loaded; it is only ever read with `weights_only=True`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, UserError
from ..io.reading import read_json
from ..modeling.config import MiniMindConfig
from ..modeling.transformer import MiniMindForCausalLM
from .huggingface import model_from_weights, round_to
from .weight_header import load_failure

# The original's defaults for missing YaRN keys; transformers has others.
_YARN_DEFAULTS: Mapping[str, Any] = {
    "rope_type": "yarn",
    "factor": 16,
    "original_max_position_embeddings": 2048,
    "beta_fast": 32,
    "beta_slow": 1,
    "attention_factor": 1.0,
}
# Fixed by the original's CLI, whatever the size.
_UNSET = {"vocab_size": 6400, "num_attention_heads": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
          "max_position_embeddings": 32768, "rope_theta": 1e6, "tie_word_embeddings": True}  # fmt: skip
_UNSET_MOE = {"num_experts": 4, "num_experts_per_tok": 1, "norm_topk_prob": True}
_OF_EXPERTS = {*_UNSET_MOE, "moe_intermediate_size", "router_aux_loss_coef"}
_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def upstream_config(values: Mapping[str, Any]) -> MiniMindConfig:
    """Translate the keys of the original's `MiniMindConfig`.

    Raises:
        ConfigError: for an invalid configuration.
    """
    shared = {field.name for field in dataclasses.fields(MiniMindConfig)} - {"rope_scaling"}
    given = {key: value for key, value in values.items() if key in shared and value is not None}
    if given.get("use_moe"):
        # Also for top-1, where the weight is then always 1.
        given.setdefault("norm_topk_prob", True)
        given.setdefault("router_aux_loss_coef", 5e-4)
    else:  # written for dense models too, without effect
        given = {key: value for key, value in given.items() if key not in _OF_EXPERTS}
    scaling = values.get("rope_scaling") if values.get("inference_rope_scaling", True) else None
    if isinstance(scaling, Mapping) and scaling:
        scaling = {**_YARN_DEFAULTS, **scaling}
    config = MiniMindConfig(**given, rope_scaling=scaling or None)
    # The original applies YaRN only beyond the length of training.
    stretched = config.rope_scaling
    if stretched and config.max_position_embeddings <= stretched["original_max_position_embeddings"]:
        return dataclasses.replace(config, rope_scaling={**stretched, "factor": 1.0})
    return config


def read_upstream_config(path: Path) -> MiniMindConfig:
    """Read the original's configuration from a JSON file.

    Raises:
        ConfigError: when the file is missing, not a JSON object, or an invalid configuration.
    """
    try:
        values = read_json(Path(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} is not a JSON object; write the original's configuration as keys and values."
        )
    try:
        return upstream_config(values)
    except ConfigError as error:
        raise ConfigError([f"{path}: {problem}" for problem in error.problems]) from error


def upstream_settings(config: MiniMindConfig) -> dict[str, Any]:
    """Return a config as keyword arguments of the original's `MiniMindConfig`.

    Raises:
        ConfigError: for a YaRN that differs from the original's built-in one.
    """
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    scaling = values.pop("rope_scaling")
    # A factor of 1 has no effect: a YaRN that is not active yet is read so.
    acts = scaling is not None and (scaling["factor"] != 1 or scaling.get("attention_factor", 1) != 1)
    known = {"truncate": True, **_YARN_DEFAULTS}
    short = config.max_position_embeddings <= _YARN_DEFAULTS["original_max_position_embeddings"]
    if acts and (short or {"truncate": True, **scaling} != known):
        raise ConfigError(
            "the original minimind supports one YaRN only (factor 16 beyond 2048 positions, attention_factor "
            f"1), and this model has {dict(scaling)}; choose another --format."
        )
    return {
        **{name: value for name, value in values.items() if value is not None},
        "inference_rope_scaling": acts,
        "rope_scaling": {**_YARN_DEFAULTS, "type": "yarn"} if acts else None,
    }


def unset_by_commands(config: MiniMindConfig) -> Iterator[str]:
    """Yield `name value` for each key that the original's CLI would set to another value.

    It sets `hidden_size` and `num_hidden_layers`; `head_dim` and `intermediate_size` follow from these.
    """
    hidden_size = config.hidden_size
    built = {
        **_UNSET,
        "head_dim": hidden_size // _UNSET["num_attention_heads"],
        "intermediate_size": math.ceil(hidden_size * math.pi / 64) * 64,
    }
    if config.use_moe:
        built |= {**_UNSET_MOE, "moe_intermediate_size": built["intermediate_size"]}
    for name, value in built.items():
        if (ours := getattr(config, name)) != value:
            yield f"{name} {ours} (not {value})"


def infer_upstream_config(weights: Mapping[str, Tensor], source: str) -> MiniMindConfig:
    """Infer the config of a state dict; what tensors do not show has the original's constants.

    These are the positions, the RoPE base, the epsilon of the norms and the experts per token, which the
    original's CLI cannot change.

    Raises:
        ConfigError: when the tensors are of another architecture.
    """
    block = "model.layers.0.self_attn."
    needed = (_EMBEDDING, *(f"{block}{name}.weight" for name in ("q_norm", "q_proj", "k_proj")))
    router = "model.layers.0.mlp.gate.weight"
    inner = f"model.layers.0.mlp.{'experts.0.' if router in weights else ''}gate_proj.weight"
    for name in (*needed, inner):
        if name not in weights:
            raise ConfigError(
                f"{source} has no {name}: it is of another architecture, such as an older minimind."
            )
    embedding, norm, queries, keys = (weights[name] for name in needed)
    try:
        (vocab_size, hidden_size), (head_dim,) = embedding.shape, norm.shape
        layers = {int(name.split(".")[2]) for name in weights if name.startswith("model.layers.")}
        settings = {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "num_hidden_layers": max(layers) + 1,
            "num_attention_heads": queries.shape[0] // head_dim,
            "num_key_value_heads": keys.shape[0] // head_dim,
            "head_dim": head_dim,
            "intermediate_size": weights[inner].shape[0],
            "tie_word_embeddings": _OUTPUT not in weights or torch.equal(weights[_OUTPUT], embedding),
        }
        if router in weights:
            settings |= {"use_moe": True, "num_experts": weights[router].shape[0]}
        return upstream_config(settings)
    except (ValueError, ArithmeticError, IndexError, ConfigError) as error:
        raise ConfigError(
            f"{source} is no state dict of the original minimind, or needs a --model-config: {error}"
        ) from error


def settings_name(weights: str) -> str:
    """Return the name of the configuration beside a `.pth`, such as `pretrain_512.config.json`."""
    return f"{weights.removesuffix('.pth')}.config.json"


def load_upstream(path: Path, config: MiniMindConfig) -> MiniMindForCausalLM:
    """Load the original's `.pth` into a float32 model on the CPU. No code in the file is run.

    Args:
        path: a state dict saved by its trainer, such as `pretrain_512.pth`.
        config: from `upstream_config`; the file does not contain it.

    Raises:
        ConfigError: when the file cannot be read or does not match the config.
    """
    return model_from_weights(config, read_upstream_weights(path), str(path))


def read_upstream_weights(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a `.pth` on the CPU in its stored precision. No code in the file is run.

    Raises:
        ConfigError: when the file cannot be read, or is no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; name a .pth file of the original minimind.")
    # Verify the CRC-32 of each part of a zip file, which torch does not. Other files are left to torch.
    with suppress(OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError):
        with zipfile.ZipFile(path) as archive:
            if (part := archive.testzip()) is not None:
                raise ConfigError(f"{path} is corrupt: checksum mismatch in {part}; copy it again.")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no pickle can fail in the unpickler in any way
        raise ConfigError(f"{path} cannot be read as a state dict: {load_failure(error)}.") from error
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) and value.layout is torch.strided
        and not value.is_meta
        for name, value in weights.items()
    ):  # fmt: skip
        raise ConfigError(f"{path} contains more than weights; name a pretrain_*.pth, not a resume file.")
    return weights


def save_upstream(
    weights: Mapping[str, Tensor], config: MiniMindConfig, folder: Path, dtype: torch.dtype = torch.float16
) -> Path:
    """Write weights as the original's trainer does, with their configuration beside.

    Args:
        weights: every parameter by its Hugging Face name; a tied output matrix is optional.
        folder: must exist.
        dtype: precision of the stored weights; the original writes float16.

    Returns:
        The `.pth`, named as the original's CLI expects: `pretrain_{hidden_size}.pth`, or
        `pretrain_{hidden_size}_moe.pth`.

    Raises:
        ConfigError: when the original does not support the configuration.
        UserError: when weights overflow the dtype, or the folder cannot be written.
    """
    settings = upstream_settings(config)
    rounded = {name: round_to(name, tensor, dtype) for name, tensor in weights.items()}
    if config.tie_word_embeddings:
        # The original loads with strict=True: write both names, with one storage.
        rounded[_OUTPUT] = rounded[_EMBEDDING]
    path = folder / f"pretrain_{config.hidden_size}{'_moe' if config.use_moe else ''}.pth"
    try:
        torch.save(rounded, path)
        text = json.dumps(settings, indent=1) + "\n"
        (folder / settings_name(path.name)).write_text(text, encoding="utf-8")
    except (OSError, RuntimeError) as error:
        raise UserError(f"the model could not be written to {folder}: {error}.") from error
    return path
