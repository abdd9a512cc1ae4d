"""Weights of the original minimind: a `.pth` with the half-precision state dict, and its config keys.

https://github.com/jingyaogong/minimind names parameters as Hugging Face does, so only the config differs.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..model_config import MiniMindConfig
from ..modeling.transformer import MiniMindForCausalLM
from .qwen3 import build_model

# What the original takes where its YaRN settings leave a number out; transformers would work others out.
_YARN_DEFAULTS = {
    "rope_type": "yarn",
    "factor": 16,
    "original_max_position_embeddings": 2048,
    "beta_fast": 32,
    "beta_slow": 1,
    "attention_factor": 1.0,
}


def upstream_config(values: Mapping[str, Any]) -> MiniMindConfig:
    """Translate the settings of the original's `MiniMindConfig`.

    Raises:
        ConfigError: for a shape that cannot be built.
    """
    shared = {field.name for field in dataclasses.fields(MiniMindConfig)} - {"rope_scaling"}
    given = {key: value for key, value in values.items() if key in shared and value is not None}
    if given.get("use_moe"):
        # Also for one expert a token, whose weight is then always 1.
        given.setdefault("norm_topk_prob", True)
        given.setdefault("router_aux_loss_coef", 5e-4)
    scaling = values.get("rope_scaling") if values.get("inference_rope_scaling", True) else None
    if scaling:
        scaling = {**_YARN_DEFAULTS, **scaling}
        # The original stretches only where the table is longer than what the model was trained on.
        positions = given.get("max_position_embeddings", MiniMindConfig.max_position_embeddings)
        if positions <= scaling["original_max_position_embeddings"]:
            scaling["factor"] = 1.0
    return MiniMindConfig(**given, rope_scaling=scaling or None)


def read_upstream_config(path: Path) -> MiniMindConfig:
    """Read the settings of the original from a JSON file.

    Raises:
        ConfigError: when the file is missing, not a JSON object, or a shape that cannot be built.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a JSON object; write the original's settings as key and value.")
    return upstream_config(values)


def load_upstream(path: Path, config: MiniMindConfig) -> MiniMindForCausalLM:
    """Read the original's `.pth` into a float32 model on the CPU. No code in the file is run.

    Args:
        path: a state dict saved by its trainer, such as `pretrain_512.pth`.
        config: from `upstream_config`; the file does not hold its own shape.

    Raises:
        ConfigError: when the file cannot be read or does not fit the config.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; name a .pth file of the original minimind.")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no pickle can fail in the unpickler in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path} cannot be read as a state dict: {reason}.") from error
    if not isinstance(weights, dict) or not all(
        isinstance(value, torch.Tensor) for value in weights.values()
    ):
        raise ConfigError(f"{path} holds more than weights; name a pretrain_*.pth, not a resume file.")
    return build_model(config, weights, str(path))
