"""Write a configuration as the arguments of `minimind-train pretrain`."""

from __future__ import annotations

from .budget import BUDGET_OPTIONS
from .options import CONFIG_SCHEMA, PretrainConfig
from .presets import PRESETS, SHAPE_OPTIONS, resolve

# A repeated run has another folder and starts at step 0.
_RUN_SPECIFIC = ("output_dir", "resume")


def to_argv(config: PretrainConfig) -> list[str]:
    """Return the fewest arguments that give this configuration, without --output-dir and --resume."""
    return min((_argv_from(config, preset) for preset in (None, *PRESETS)), key=len)


def _argv_from(config: PretrainConfig, preset: str | None) -> list[str]:
    """Return the arguments on top of a preset, or of the defaults."""
    # The names that a budget keeps follow from the options that are given.
    schema = {name: field for name, field in CONFIG_SCHEMA.items() if name != "budget_keeps"}
    given = set(BUDGET_OPTIONS) if config.budget is not None else set()
    # The weights determine the sizes that are not given.
    given |= set() if config.from_weight is None else {"from_weight"}
    # Repeat, because an option may change the default of another one.
    while True:
        base = resolve(preset=preset, flags={name: getattr(config, name) for name in given})
        differing = {
            name
            for name in schema.keys() - given - set(_RUN_SPECIFIC)
            if getattr(base, name) != getattr(config, name)
        }
        if not differing:
            break
        given |= differing
    if preset is None and not given & SHAPE_OPTIONS:
        # Without a model size or preset, a machine without a GPU would choose the preset `tiny`.
        given.add("hidden_size")
    args = [] if preset is None else ["--preset", preset]
    for name, field in schema.items():
        if name in given:
            args += field.spell(getattr(config, name))
    return args
