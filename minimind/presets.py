"""Named configurations. A preset only changes defaults: a file or a flag overrides it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import PretrainConfig
from .errors import ConfigError
from .settings import parse_values

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # 3M parameters; learns from the embedded text in minutes on two CPU cores.
    "tiny": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_seq_len": 256,
        "batch_size": 16,
        "learning_rate": 3e-3,
        "val_fraction": 0.05,
        "log_interval": 20,
        "eval_interval": 100,
        "save_interval": 100,
    },
    # 26M parameters.
    "minimind2-small": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 1408,
    },
    # 64M parameters.
    "minimind-3": {
        "hidden_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 2432,
    },
    # 104M parameters.
    "minimind2": {
        "hidden_size": 768,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 2048,
    },
    # 350M parameters: 1024 wide, 24 deep as GPT-3 Medium, heads of 128 as Qwen3.
    "350m": {
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 2816,
        "max_seq_len": 2048,
        "learning_rate": 3e-4,
    },
    # 1B parameters.
    "1b": {
        "hidden_size": 1792,
        "num_hidden_layers": 26,
        "num_attention_heads": 14,
        "num_key_value_heads": 7,
        "intermediate_size": 4864,
        "max_seq_len": 2048,
        "learning_rate": 2e-4,
    },
}


def preset_config(name: str, **overrides: Any) -> PretrainConfig:
    """Return the configuration of a preset with some values changed.

    Raises:
        ConfigError: for an unknown preset or wrong values; all of them are listed.
    """
    return resolve(preset=name, flags=overrides)


def resolve(
    *,
    preset: str | None = None,
    file: Mapping[str, Any] | None = None,
    file_name: str = "--config",
    flags: Mapping[str, Any] | None = None,
) -> PretrainConfig:
    """Build a configuration: preset < file < flags.

    Args:
        preset: a name in `PRESETS`; a `preset` key in the file counts where this is None.
        file: keys and values of a TOML file.
        file_name: how errors name that file.
        flags: values from the command line or from keyword arguments, as strings or typed.

    Raises:
        ConfigError: with every wrong value, unknown key and conflict found.
    """
    file_values = dict(file or {})
    preset = preset or file_values.pop("preset", None)
    file_values.pop("preset", None)
    problems: list[str] = []
    if preset is not None and preset not in PRESETS:
        problems.append(f"--preset {preset} is not known; choose one of {', '.join(PRESETS)}.")
    merged: dict[str, Any] = dict(PRESETS.get(preset or "", {}))
    for values, source in ((file_values, file_name), (dict(flags or {}), "option")):
        parsed, wrong = parse_values(PretrainConfig, values, source)
        # A lower layer's step size gives way to the one the higher layer sets.
        if "global_batch_size" in parsed:
            merged.pop("accumulation_steps", None)
        if "accumulation_steps" in parsed:
            merged.pop("global_batch_size", None)
        merged.update(parsed)
        problems += wrong
    try:
        config = PretrainConfig(**merged)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    return config
