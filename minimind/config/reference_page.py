"""Generate docs/configuration.md: `python -m minimind.config.reference_page`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .options import CONFIG_SECTIONS
from .presets import PRESETS, size_text
from .schema import ConfigField, schema_of

PAGE = Path("docs/configuration.md")

_INTRODUCTION = """\
# Configuration

All options of a run, generated from `minimind/config/options.py` by
`python -m minimind.config.reference_page`.

An option on the command line overrides the file of `--config`, which overrides the `--preset`, which
overrides the default. `--print-config` prints the resulting configuration as TOML for `--config`. In a
file, option names have underscores and stand at the top level, and `preset = "NAME"` sets the preset. On
the command line, names may have hyphens or underscores, and the value `none` unsets an option. `--resume`
reads the options of the run from its output folder, unless `--config` or `--preset` is given. In Python the
same names are arguments of `minimind.PretrainConfig` and `minimind.preset_config`.
"""

_PRESETS = """\
## Presets

Parameters are counted with the built-in tokenizer. Without a GPU the default preset is `tiny`.
"""


def render() -> str:
    """Return the page in Markdown."""
    parts = [_INTRODUCTION]
    for section in CONFIG_SECTIONS:
        rows = ["| Option | Value | Default | Meaning |", "|---|---|---|---|"]
        rows += [_row(field) for field in schema_of(section).values()]
        parts.append(f"## {section.__doc__}\n\n" + "\n".join(rows) + "\n")
    parts.append(_PRESETS)
    parts.append("\n".join(_preset_rows()) + "\n")
    return "\n".join(parts)


def _row(field: ConfigField) -> str:
    negative = [field.negative_flag] if field.kind is bool else []
    names = [field.flag, *negative, *field.info.aliases]
    default = field.default_text
    if field.info.default_text is None and default != "none":
        default = f"`{default}`"
    cells = (", ".join(f"`{name}`" for name in names), f"`{field.metavar}`", default, _meaning(field))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _meaning(field: ConfigField) -> str:
    """Return the help, the valid range and the synonyms."""
    notes = [field.range_text.capitalize()]
    notes += [f"`{spelling}` is read as `{value}`" for spelling, value in field.info.synonyms]
    return " ".join([field.info.help, *(f"{note}." for note in notes if note)])


def _preset_rows() -> Iterator[str]:
    yield from ("| Preset | Parameters | Sets |", "|---|---|---|")
    for name, values in PRESETS.items():
        sets = ", ".join(f"`{key} = {value}`" for key, value in values.items())
        yield f"| `{name}` | {size_text(name)} | {sets} |"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
