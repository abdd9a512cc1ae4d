"""Named configurations. A preset only changes defaults: a file or a flag overrides it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from ..launch_env import world_size
from .options import AUTO, PretrainConfig
from .schema import parse_values

# A learning rate stands for each optimizer: that of the one in force becomes the default.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    # Learns from the embedded text in minutes on two CPU cores.
    "tiny": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_seq_len": 128,
        "batch_size": 16,
        "learning_rate": {"muon": 1e-2, "adamw": 3e-3},
        "epochs": 2,
        "val_fraction": 0.05,
        "log_interval": 50,
        "eval_interval": 250,
        "save_interval": 250,
    },
    "minimind2-small": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 1408,
    },
    "minimind-3": {
        "hidden_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 2432,
    },
    # The experts are as wide as the SwiGLU layer of minimind-3.
    "minimind-3-moe": {
        "hidden_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 2432,
        "use_moe": True,
    },
    "minimind2": {
        "hidden_size": 768,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 2048,
    },
    # As wide, deep and inner-wide as Qwen3-0.6B, with half its heads of 128.
    "350m": {
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 3072,
        "max_seq_len": 2048,
        "learning_rate": {"muon": 2e-3, "adamw": 3e-4},
    },
    "1b": {
        "hidden_size": 1792,
        "num_hidden_layers": 28,
        "num_attention_heads": 14,
        "num_key_value_heads": 7,
        "head_dim": 128,
        "intermediate_size": 4864,
        "max_seq_len": 2048,
        "learning_rate": {"muon": 1.5e-3, "adamw": 2e-4},
    },
}

# Parameters with the tokenizer in the package (6400 entries) and tied embeddings, rounded.
PRESET_PARAMETERS: Mapping[str, int] = {
    "tiny": 1_600_000,
    "minimind2-small": 26_000_000,
    "minimind-3": 64_000_000,
    "minimind-3-moe": 198_000_000,
    "minimind2": 104_000_000,
    "350m": 350_000_000,
    "1b": 1_000_000_000,
}

# A run that sets one of these has chosen the size of its model.
SHAPE_OPTIONS = frozenset(
    {
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "from_weight",
    }
)


def size_text(name: str) -> str:
    """Return the size of a preset as people write it, such as `26M`."""
    count = PRESET_PARAMETERS[name]
    return f"{count / 1e9:g}B" if count >= 1e9 else f"{count / 1e6:g}M"


def default_preset(shape_given: bool, has_gpu: bool) -> str | None:
    """Return the preset of a run that names none: `tiny` where nothing else would finish in minutes.

    Args:
        shape_given: an option, a file or a preset has chosen the size of the model.
        has_gpu: the run will train on a GPU.
    """
    return None if shape_given or has_gpu else "tiny"


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
    file_preset = file_values.pop("preset", None)
    preset = preset if preset is not None else file_preset
    problems: list[str] = []
    if preset is not None and str(preset) not in PRESETS:
        problems.append(f"--preset {preset} is not known; choose one of {', '.join(PRESETS)}.")
    merged: dict[str, Any] = dict(PRESETS.get(str(preset), {}))
    rates: Mapping[str, float] = merged.pop("learning_rate", {})
    refused: set[str] = set()
    rows: int | None = None
    for values, name in ((file_values, file_name), (flags or {}, None)):
        parsed, wrong = parse_values(PretrainConfig, values, name)
        # A lower layer's step size gives way to the one the higher layer sets.
        if parsed.get("global_batch_size") is not None:
            merged.pop("accumulation_steps", None)
        if parsed.get("accumulation_steps") is not None:
            merged.pop("global_batch_size", None)
        if isinstance(merged.get("batch_size"), int):
            rows = merged["batch_size"]
        merged.update(parsed)
        problems += wrong
        refused |= {key.replace("-", "_") for key in values} - parsed.keys()
    if merged.get("batch_size") == AUTO and rows is not None and merged.get("global_batch_size") is None:
        # Where `auto` takes the place of a number, the step keeps the rows that it had.
        rounds = merged.pop("accumulation_steps", None) or 1
        merged["global_batch_size"] = rows * rounds * world_size()
    if merged.get("learning_rate") is None:
        merged["learning_rate"] = rates.get(merged.get("optimizer", PretrainConfig.optimizer))
    try:
        config = PretrainConfig(**merged)
    except ConfigError as error:
        # A default that stands in for a refused value must not be blamed.
        flags_refused = ["--" + name.replace("_", "-") for name in refused]
        problems += [line for line in error.problems if not any(flag in line for flag in flags_refused)]
        raise ConfigError(problems) from None
    if problems:
        raise ConfigError(problems)
    return config
