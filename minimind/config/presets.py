"""Named configurations. A preset changes defaults; a file or an option overrides it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from ..launch_env import world_size
from .budget import BUDGET_OPTIONS
from .naming import flag_of, for_caller, options_were_typed
from .options import AUTO, CONFIG_SCHEMA, PretrainConfig
from .schema import parse_values

_SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "intermediate_size"),
)


def _shape(*sizes: int) -> dict[str, Any]:
    """Return the options of the sizes in `_SIZES`, of which the last ones may be missing."""
    return dict(zip(_SIZES, sizes, strict=False))


PRESETS: Mapping[str, Mapping[str, Any]] = {
    # Trains on the built-in corpus in minutes on two CPU cores.
    "tiny": {
        **_shape(128, 4, 4, 2),
        **{"max_seq_len": 128, "batch_size": 16, "epochs": 2},
        **{"val_fraction": 0.05, "log_interval": 50, "eval_interval": 250, "save_interval": 250},
    },
    "minimind2-small": _shape(512, 8, 8, 2, 1408),
    "minimind-3": _shape(768, 8, 8, 4, 2432),
    # An expert is as wide as the MLP of minimind-3.
    "minimind-3-moe": {**_shape(768, 8, 8, 4, 2432), "use_moe": True},
    "minimind2": _shape(768, 16, 8, 2, 2048),
    # Hidden size, layers and intermediate size of Qwen3-0.6B, with half its heads.
    "350m": {**_shape(1024, 28, 8, 4, 3072), "head_dim": 128, "max_seq_len": 2048},
    "1b": {**_shape(1792, 28, 14, 7, 4864), "head_dim": 128, "max_seq_len": 2048},
}

# Rounded, with the built-in tokenizer (6400 tokens) and tied embeddings.
PRESET_PARAMETERS: Mapping[str, int] = {
    "tiny": 1_600_000,
    "minimind2-small": 26_000_000,
    "minimind-3": 64_000_000,
    "minimind-3-moe": 198_000_000,
    "minimind2": 104_000_000,
    "350m": 350_000_000,
    "1b": 1_000_000_000,
}

# Options that choose the size of the model.
SHAPE_OPTIONS = frozenset({*_SIZES, "head_dim", "from_weight"})


def size_text(name: str) -> str:
    """Return the number of parameters of a preset, such as `26M`."""
    count = PRESET_PARAMETERS[name]
    return f"{count / 1e9:g}B" if count >= 1e9 else f"{count / 1e6:g}M"


def default_preset(shape_given: bool, has_gpu: bool) -> str | None:
    """Return the default preset: `tiny` if neither the user nor a GPU calls for a larger model.

    Args:
        shape_given: an option, a file or a preset chooses the size of the model.
        has_gpu: the run trains on a GPU.
    """
    return None if shape_given or has_gpu else "tiny"


def preset_config(name: str, **overrides: Any) -> PretrainConfig:
    """Return the configuration of a preset with overrides.

    Raises:
        ConfigError: lists an unknown preset and all invalid values.
    """
    return resolve(preset=name, flags=overrides)


def _kept_by_budget(
    merged: Mapping[str, Any], file: Mapping[str, Any], flags: Mapping[str, Any], preset: str | None
) -> tuple[str, ...]:
    """Return the options that --budget keeps: those typed, and those of the preset and the file.

    A file that a run or --print-config wrote has all options and names those that were set.
    """
    in_file = {key.replace("-", "_") for key in file}
    given = {key.replace("-", "_") for key in flags} | (in_file if "budget_keeps" not in in_file else set())
    shape = PRESETS.get(str(preset), {}).keys() & SHAPE_OPTIONS
    named = merged.get("budget_keeps", ())
    return (*named, *sorted((given | shape).intersection(BUDGET_OPTIONS).difference(named)))


def resolve(
    *,
    preset: str | None = None,
    file: Mapping[str, Any] | None = None,
    file_name: str = "--config",
    flags: Mapping[str, Any] | None = None,
) -> PretrainConfig:
    """Build a configuration; flags override the file, which overrides the preset.

    Args:
        preset: a name in `PRESETS`; by default the `preset` key of the file.
        file: keys and values of a TOML file.
        file_name: its name in errors.
        flags: values of the command line or of keyword arguments, as strings or typed.

    Raises:
        ConfigError: lists every invalid value, unknown key and conflict.
    """
    file_values = dict(file or {})
    file_preset = file_values.pop("preset", None)
    preset = preset if preset is not None else file_preset
    problems: list[str] = []
    if preset is not None and str(preset) not in PRESETS:
        unknown = f"--preset {preset} is not known; choose one of {', '.join(PRESETS)}."
        problems.append(for_caller(unknown, ["preset"]))
    merged: dict[str, Any] = dict(PRESETS.get(str(preset), {}))
    with_budget = {**file_values, **(flags or {})}.get("budget") is not None
    if with_budget:
        # The preset gives the model; the budget chooses how to train it.
        merged = {name: value for name, value in merged.items() if name in (*SHAPE_OPTIONS, "use_moe")}
    rejected: set[str] = set()
    given: set[str] = set()
    micro_batch: int | None = None
    for values, name in ((file_values, file_name), (flags or {}, None)):
        parsed, invalid = parse_values(PretrainConfig, values, name)
        # Either option sets the global batch: the higher layer wins.
        if parsed.get("global_batch_size") is not None:
            merged.pop("accumulation_steps", None)
        if parsed.get("accumulation_steps") is not None:
            merged.pop("global_batch_size", None)
        if isinstance(merged.get("batch_size"), int):
            micro_batch = merged["batch_size"]
        merged.update(parsed)
        given |= parsed.keys()
        problems += invalid
        rejected |= {key.replace("-", "_") for key in values} - parsed.keys()
    if merged.get("batch_size") == AUTO and micro_batch and merged.get("global_batch_size") is None:
        # `auto` in place of a number keeps the global batch.
        accumulation = merged.pop("accumulation_steps", None) or 1
        merged["global_batch_size"] = micro_batch * accumulation * world_size()
    if "epochs" not in given and (merged.get("max_steps") or merged.get("max_tokens")):
        # The epochs of a preset are a default: a limit that is given takes their place.
        merged.pop("epochs", None)
    if with_budget:
        merged["budget_keeps"] = _kept_by_budget(merged, file_values, flags or {}, preset)
    try:
        with options_were_typed():
            config = PretrainConfig(**merged)
    except ConfigError as error:
        # Do not report conflicts with the default in place of a rejected value.
        rejected_flags = [flag_of(name) for name in rejected]
        conflicting = [line for line in error.problems if not any(flag in line for flag in rejected_flags)]
        problems += [for_caller(line, CONFIG_SCHEMA) for line in conflicting]
        raise ConfigError(problems) from None
    if problems:
        raise ConfigError(problems)
    return config
