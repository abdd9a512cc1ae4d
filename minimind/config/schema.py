"""Parse, validate and write the fields of frozen configuration dataclasses.

A field is declared once, as `name: Annotated[type, FieldInfo(...)] = default`. Command-line options, TOML
keys, help and documentation are derived from it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..io.reading import read_bytes
from .entry_points import plugin_names
from .naming import flag_of, options_are_typed

_SURROGATES = re.compile("[\ud800-\udfff]")
# Integers in tensors and files have 64 bits.
LARGEST_INTEGER = 2**63 - 1
# Of each type: the placeholder in --help, its name in a sentence, and an example.
_KINDS = {
    int: ("INTEGER", "a whole number", "for example 8"),
    float: ("NUMBER", "a number", "for example 0.001"),
    bool: ("BOOLEAN", "true or false", "true or false"),
    str: ("TEXT", "text", "text in quotes"),
}


@dataclass(frozen=True)
class FieldInfo:
    """Metadata of a field besides its type and default.

    Attributes:
        help: text for `--help` and the documentation.
        aliases: other flags of the field.
        minimum: smallest valid value; by default 1 for whole numbers.
        above: exclusive lower bound.
        maximum: largest valid value.
        below: exclusive upper bound.
        default_text: shown as the default if the default is computed at run time.
        unset: the value that None stands for, if nothing else determines it.
        metavar: placeholder of the value in `--help`; by default from the type.
        synonyms: pairs of an alternative spelling and the value it stands for.
        common: shown by `--help`; `--help-all` shows all options.
        plugins: group of entry points whose names are valid besides the choices.
    """

    help: str
    aliases: tuple[str, ...] = ()
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None
    default_text: str | None = None
    unset: Any = None
    metavar: str | None = None
    synonyms: tuple[tuple[str, str], ...] = ()
    common: bool = False
    plugins: str | None = None


@dataclass(frozen=True)
class ConfigField:
    """Schema of one field of a configuration dataclass.

    Attributes:
        name: name of the field and of the TOML key.
        kind: `int`, `float`, `bool` or `str`.
        choices: the valid strings; empty if any string is valid.
        repeatable: the field holds a tuple of `kind`.
        optional: the field may be None.
        keywords: valid strings besides values of `kind`, such as `auto`.
        default: the dataclass default.
        info: the declared metadata.
    """

    name: str
    kind: type
    choices: tuple[str, ...]
    repeatable: bool
    optional: bool
    keywords: tuple[str, ...]
    default: Any
    info: FieldInfo

    @property
    def flag(self) -> str:
        """The command-line option, such as `--learning-rate`."""
        return flag_of(self.name)

    @property
    def negative_flag(self) -> str:
        """The option that turns a switch off, such as `--no-packing`."""
        return flag_of("no_" + self.name)

    @property
    def is_path(self) -> bool:
        """Whether the value is the path of a file or folder, in which `~` is expanded."""
        return (self.info.metavar or "").strip("[]") in ("PATH", "FOLDER", "FILE")

    def spell(self, value: Any) -> list[str]:
        """Return the command-line arguments that set the field to `value`."""
        if self.kind is bool and value is not None:
            return [self.flag if value else self.negative_flag]
        args: list[str] = []
        for item in value if self.repeatable else (value,):
            text = "none" if item is None else repr(item) if isinstance(item, float) else str(item)
            args += [f"{self.flag}={text}"] if text.startswith("-") or not text else [self.flag, text]
        return args

    @property
    def fallback(self) -> Any:
        """The value of an option that is not given."""
        return self.info.unset if self.default is None else self.default

    @property
    def default_text(self) -> str:
        """The default for help and documentation."""
        if self.info.default_text is not None:
            return self.info.default_text
        if self.fallback is None or self.fallback == ():
            return "none"
        if isinstance(self.fallback, tuple):
            return ", ".join(map(str, self.fallback))
        return _toml_value(self.fallback).strip('"')

    @property
    def range_text(self) -> str:
        """The valid range, such as `at least 0 and below 1`; empty if unbounded."""
        info = self.info
        bounds = {"at least": info.minimum, "above": info.above, "at most": info.maximum, "below": info.below}
        return " and ".join(f"{name} {bound:.10g}" for name, bound in bounds.items() if bound is not None)

    @property
    def metavar(self) -> str:
        """Placeholder of the value, such as `INTEGER` or `cosine|linear`."""
        if self.choices:
            return "|".join(self.choices)
        if self.info.metavar is not None:
            return self.info.metavar
        return "|".join((_KINDS[self.kind][0], *self.keywords))


@cache
def schema_of(cls: type) -> Mapping[str, ConfigField]:
    """Return the fields of a configuration dataclass by name, in order of declaration."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: _config_field(field, hints[field.name]) for field in dataclasses.fields(cls)}


def _config_field(field: dataclasses.Field[Any], hint: Any) -> ConfigField:
    kind, info = typing.get_args(hint)
    repeatable = optional = False
    choices: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    if typing.get_origin(kind) is tuple:
        repeatable, kind = True, typing.get_args(kind)[0]
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        first, *others = (arg for arg in typing.get_args(kind) if arg is not types.NoneType)
        optional = types.NoneType in typing.get_args(kind)
        kind, keywords = first, tuple(word for other in others for word in typing.get_args(other))
    if typing.get_origin(kind) is typing.Literal:
        choices, kind = typing.get_args(kind), str
    if kind is int and info.minimum is None:
        info = dataclasses.replace(info, minimum=1)
    return ConfigField(field.name, kind, choices, repeatable, optional, keywords, field.default, info)


def convert_fields(config: Any) -> None:
    """Convert path-like objects, NumPy and torch scalars and lists in the fields of a frozen dataclass."""
    for field in schema_of(config.__class__).values():
        value = getattr(config, field.name)
        if not field.repeatable:
            value = _plain(field, value)
        elif isinstance(value, (list, tuple)):
            value = tuple(_plain(field, item) for item in value)
        object.__setattr__(config, field.name, value)


def fill_unset(config: Any) -> None:
    """Replace None in the fields of a frozen dataclass by the value that it stands for."""
    for field in schema_of(config.__class__).values():
        if field.info.unset is not None and getattr(config, field.name) is None:
            object.__setattr__(config, field.name, field.info.unset)


def _plain(field: ConfigField, value: Any) -> Any:
    """Return `value` as a string or Python number if it is an equivalent of one; expand `~` in a path."""
    if hasattr(value, "__fspath__") and field.kind is str:
        value = os.fsdecode(value)
    elif getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if field.kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return os.path.expanduser(value) if field.is_path and isinstance(value, str) else value


def range_problems(config: Any) -> Iterator[str]:
    """Yield a sentence for each field whose value has the wrong type or is out of range."""
    for field in schema_of(config.__class__).values():
        value = getattr(config, field.name)
        if field.repeatable and not isinstance(value, tuple):
            yield f"{field.name}={value!r} is not a tuple; write ({value!r},)."
            continue
        for item in value if field.repeatable else (value,):
            if (problem := _problem(field, item)) is not None:
                yield problem


def _problem(field: ConfigField, value: Any) -> str | None:
    if (value is None and field.optional) or (isinstance(value, str) and value in field.keywords):
        return None
    label, given = field.name, f"{field.name}={value!r}"
    if options_are_typed():
        label, given = field.flag, f"{field.flag} {value}"
    if field.choices:
        plugins = () if value in field.choices else plugin_names(field.info.plugins)
        known = (*field.choices, *plugins)
        return (
            None
            if value in known
            else f"{given} is not known; choose {', '.join(known[:-1])} or {known[-1]}."
        )
    has_type = isinstance(value, (int, float) if field.kind is float else field.kind)
    if not has_type or (field.kind is not bool and isinstance(value, bool)):
        return f"{given} is not {_KINDS[field.kind][1]}; write {_example(field)}."
    if isinstance(value, str) and not value.isascii() and _SURROGATES.search(value):
        # Python decodes invalid bytes of a command line to lone surrogates, which no file can hold.
        return f"{label} is not valid UTF-8; write it, or name the file, in UTF-8."
    if field.is_path or field.kind not in (int, float):
        return path_problem(label, given, value) if field.is_path else None
    info = field.info
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        return f"{label} is too large; write {_example(field)}."
    if not math.isfinite(value):
        return f"{given} is not a finite number; write {_example(field)}."
    out_of_range = (
        (info.minimum is not None and value < info.minimum)
        or (info.above is not None and value <= info.above)
        or (info.maximum is not None and value > info.maximum)
        or (info.below is not None and value >= info.below)
    )
    # If the default is not None, None is a value that can be given.
    none = ", or none" if field.optional and field.default is not None else ""
    return f"{given} is out of range; it must be {field.range_text}{none}." if out_of_range else None


def path_problem(label: str, given: str, path: str) -> str | None:
    """Return a sentence about a path, after expansion of `~`, that cannot be meant; else None."""
    if not path:
        return f"{label} is empty; give a path."
    if "\0" in path:
        return f"{label} contains a NUL character; give a path without it."
    if path.startswith("~"):
        return (
            f"{given} is not the home folder of a user; write it in full, or as ./{path} if ~ is in the name."
        )
    return None


def parse_values(
    cls: type, values: Mapping[str, Any], file_name: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Parse the strings of a command line, or the values of a TOML file, into field values.

    Args:
        values: by field name; a repeatable field takes a sequence or one value.
        file_name: the file of the values; it begins each problem.

    Returns:
        The valid values by field name, and a sentence for each invalid one.
    """
    known = schema_of(cls)
    where = f"{file_name}: " if file_name else ""
    parsed: dict[str, Any] = {}
    problems: list[str] = []
    for key, raw in values.items():
        name = key.replace("-", "_")
        if name not in known:
            table = "; write its keys without a table header." if isinstance(raw, dict) else ""
            problems.append(f"{where}unknown key '{key}'{table or suggestion(name, known)}")
            continue
        field = known[name]
        items = raw if isinstance(raw, (list, tuple)) and field.repeatable else (raw,)
        converted = tuple(_convert(field, item) for item in items)
        wrong = [where + problem for item in converted if (problem := _problem(field, item)) is not None]
        problems += wrong
        if not wrong:
            parsed[name] = converted if field.repeatable else converted[0]
    return parsed, problems


def _convert(field: ConfigField, raw: Any) -> Any:
    """Return `raw` as the type of the field if it can be converted without guessing, else unchanged."""
    raw = _plain(field, raw)
    if field.kind is float and isinstance(raw, int) and not isinstance(raw, bool):
        # Integers of TOML have any length.
        return float(raw) if abs(raw) <= LARGEST_INTEGER else raw
    if field.kind is str or not isinstance(raw, str):
        return dict(field.info.synonyms).get(raw, raw) if isinstance(raw, str) else raw
    if field.kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}.get(raw.lower(), raw)
    try:
        number = float(raw)
    except ValueError:
        return raw
    if field.kind is float:
        return number
    try:
        return int(raw)
    except ValueError:
        # People write numbers of tokens as 1e9.
        return int(number) if math.isfinite(number) and number.is_integer() else raw


def read_toml(path: Path) -> dict[str, Any]:
    """Return the keys and values of a TOML file; `parse_values` validates them.

    Editors may have begun the file with a byte order mark.

    Raises:
        ConfigError: the file cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(read_bytes(Path(path).expanduser()).decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(
            f"--config {path} cannot be read ({error.strerror}); name a TOML file, "
            "such as one that --print-config wrote."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path} is not UTF-8 text; save it as UTF-8.") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(
            f"--config {path} is not valid TOML: {error}; write lines like batch_size = 32."
        ) from error


def write_toml(config: Any, sections: Sequence[type]) -> str:
    """Return a configuration as TOML that `read_toml` and `parse_values` read back to equal values.

    Args:
        config: the dataclass instance.
        sections: its base dataclasses; each becomes a section with a comment as heading.
    """
    lines: list[str] = []
    for section in sections:
        lines += ["", f"# {section.__doc__}"] if lines else [f"# {section.__doc__}"]
        for name, field in schema_of(section).items():
            value = getattr(config, name)
            # TOML has no null: write an unset value as a comment with its default.
            lines.append(
                f"# {name}: {field.default_text}" if value is None else f"{name} = {_toml_value(value)}"
            )
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}" for c in escaped) + '"'
    return repr(value)


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown name: the closest known name, or a full stop."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else "."


def _example(field: ConfigField) -> str:
    if field.fallback is not None and not isinstance(field.fallback, tuple):
        return " or ".join((f"for example {_toml_value(field.fallback)}", *field.keywords))
    return _KINDS[field.kind][2]
