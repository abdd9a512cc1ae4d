"""Options as the words of a command line: only those that differ from their defaults, or from a preset's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .options import PretrainConfig
from .presets import PRESETS, SHAPE_OPTIONS, resolve
from .schema import ConfigField, schema_of

# Of one run only: a repetition has a folder of its own and begins at the beginning.
_OF_ONE_RUN = ("output_dir", "resume")


def option_words(config: PretrainConfig) -> list[str]:
    """Return the fewest words after `pretrain` that give these options, all but --output-dir and --resume."""
    return min((_words_from(config, preset) for preset in (None, *PRESETS)), key=len)


def _words_from(config: PretrainConfig, preset: str | None) -> list[str]:
    """Return the words with a preset, or none, as their base."""
    settings = schema_of(PretrainConfig)
    given: set[str] = set()
    # An option may change the default of another, so that one look need not be enough.
    while True:
        base = resolve(preset=preset, flags={name: getattr(config, name) for name in given})
        differing = {
            name
            for name in settings.keys() - given - set(_OF_ONE_RUN)
            if getattr(base, name) != getattr(config, name)
        }
        if not differing:
            break
        given |= differing
    if preset is None and not given & SHAPE_OPTIONS:
        # Without a size or a preset, a machine without a GPU would take a preset of its own.
        given.add("hidden_size")
    words = [] if preset is None else ["--preset", preset]
    for name, setting in settings.items():
        if name in given:
            words += _spelled(setting, getattr(config, name))
    return words


def _spelled(setting: ConfigField, value: Any) -> Iterator[str]:
    if setting.kind is bool and value is not None:
        yield setting.flag if value else "--no-" + setting.flag.removeprefix("--")
        return
    for one in value if setting.repeatable else (value,):
        text = "none" if one is None else repr(one) if isinstance(one, float) else str(one)
        if text.startswith("-") or not text:
            yield f"{setting.flag}={text}"
        else:
            yield from (setting.flag, text)
