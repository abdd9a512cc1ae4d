"""The page docs/configuration.md, written from the options: `python -m minimind.config.reference_page`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .options import CONFIG_SECTIONS
from .presets import PRESETS, size_text
from .schema import ConfigField, schema_of

PAGE = Path("docs/configuration.md")

_INTRODUCTION = """\
# Configuration

Every option of a run, made from `minimind/config/options.py` by `python -m minimind.config.reference_page`.

A flag overrides the file given by `--config`, which overrides the `--preset`, which overrides the default.
`--print-config` prints the result as TOML that `--config` reads back. A file names options with underscores,
at the top level, and may hold `preset = "NAME"`; flags may be written with hyphens or underscores. On the
command line `none` unsets an option that a file or preset has set. `--resume` reads the options that the run
began with from its output folder, unless `--config` or `--preset` is given. From Python the same names are
arguments of `minimind.PretrainConfig` and `minimind.preset_config`.
"""

_PRESETS = """\
## Presets

Sizes count the tokenizer in the package. Without a GPU, a run that sets no size of model is `tiny`.
"""


def render() -> str:
    """Return the whole page as Markdown."""
    parts = [_INTRODUCTION]
    for panel in CONFIG_SECTIONS:
        rows = ["| Option | Value | Default | Meaning |", "|---|---|---|---|"]
        rows += [_row(setting) for setting in schema_of(panel).values()]
        parts.append(f"## {panel.__doc__}\n\n" + "\n".join(rows) + "\n")
    parts.append(_PRESETS)
    parts.append("\n".join(_preset_rows()) + "\n")
    return "\n".join(parts)


def _row(setting: ConfigField) -> str:
    negative = ["--no-" + setting.flag.removeprefix("--")] if setting.kind is bool else []
    names = [setting.flag, *negative, *setting.option.aliases]
    default = setting.default_text
    if setting.option.default_text is None and default != "none":
        default = f"`{default}`"
    cells = (", ".join(f"`{name}`" for name in names), f"`{setting.metavar}`", default, _meaning(setting))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _meaning(setting: ConfigField) -> str:
    """Return the help with the range of values and their other spellings."""
    notes = [setting.range_text.capitalize()]
    notes += [f"`{spelling}` is read as `{value}`" for spelling, value in setting.option.synonyms]
    return " ".join([setting.option.help, *(f"{note}." for note in notes if note)])


def _preset_rows() -> Iterator[str]:
    yield from ("| Preset | Parameters | Sets |", "|---|---|---|")
    for name, values in PRESETS.items():
        sets = ", ".join(f"`{key} = {_shown(value)}`" for key, value in values.items())
        yield f"| `{name}` | {size_text(name)} | {sets} |"


def _shown(value: Any) -> str:
    """Return a preset's value; a learning rate with the optimizers that it is for."""
    if isinstance(value, Mapping):
        return ", ".join(f"{one:g} ({name})" for name, one in value.items())
    return str(value)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
