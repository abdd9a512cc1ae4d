"""Typed settings on frozen dataclasses: read from strings or TOML, check, write back.

A field is declared once as `name: Annotated[type, Option(...)] = default`; everything else follows.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
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

_SURROGATES = re.compile("[\ud800-\udfff]")
# What fits into the integers of tensors and files.
LARGEST_INTEGER = 2**63 - 1


@dataclass(frozen=True)
class FieldInfo:
    """What is said about one field besides its type and default.

    Attributes:
        help: one sentence for `--help` and the documentation.
        aliases: further flags that set the same field.
        minimum: smallest value allowed.
        above: the value must be larger than this.
        maximum: largest value allowed.
        below: the value must be smaller than this.
        default_text: shown as the default where the default is worked out later.
        metavar: what stands for the value in `--help`, where the type says too little.
        synonyms: pairs of another spelling of a value and the value.
        common: `--help` shows the option; the others are shown by `--help-all`.
    """

    help: str
    aliases: tuple[str, ...] = ()
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None
    default_text: str | None = None
    metavar: str | None = None
    synonyms: tuple[tuple[str, str], ...] = ()
    common: bool = False


@dataclass(frozen=True)
class ConfigField:
    """One field of a settings dataclass, with its type taken apart.

    Attributes:
        name: field name, which is also the TOML key.
        kind: `int`, `float`, `bool` or `str`.
        choices: the allowed strings, empty where any will do.
        repeatable: the field holds a tuple of `kind`.
        optional: the field may be None.
        words: strings allowed besides values of `kind`.
        default: the dataclass default.
        option: what was declared beside the type.
    """

    name: str
    kind: type
    choices: tuple[str, ...]
    repeatable: bool
    optional: bool
    words: tuple[str, ...]
    default: Any
    option: FieldInfo

    @property
    def flag(self) -> str:
        """The command-line spelling, such as `--learning-rate`."""
        return "--" + self.name.replace("_", "-")

    @property
    def default_text(self) -> str:
        """The default as help and documentation show it."""
        if self.option.default_text is not None:
            return self.option.default_text
        if self.default is None or self.default == ():
            return "none"
        if isinstance(self.default, tuple):
            return ", ".join(map(str, self.default))
        return _toml_value(self.default).strip('"')

    @property
    def range_text(self) -> str:
        """The values allowed, such as `at least 0 and below 1`; empty where any will do."""
        option = self.option
        bounds = {
            "at least": option.minimum,
            "above": option.above,
            "at most": option.maximum,
            "below": option.below,
        }
        return " and ".join(f"{word} {bound:.10g}" for word, bound in bounds.items() if bound is not None)

    @property
    def metavar(self) -> str:
        """What a value looks like, such as `INTEGER` or `cosine|linear`."""
        if self.choices:
            return "|".join(self.choices)
        if self.option.metavar is not None:
            return self.option.metavar
        kind = {int: "INTEGER", float: "NUMBER", bool: "BOOLEAN", str: "TEXT"}[self.kind]
        return "|".join((kind, *self.words))


@cache
def schema_of(cls: type) -> Mapping[str, ConfigField]:
    """Return the settings of a dataclass by name, in the order they were declared."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: _setting(field, hints[field.name]) for field in dataclasses.fields(cls)}


def _setting(field: dataclasses.Field[Any], hint: Any) -> ConfigField:
    kind, option = typing.get_args(hint)
    repeatable = optional = False
    choices: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    if typing.get_origin(kind) is tuple:
        repeatable, kind = True, typing.get_args(kind)[0]
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        first, *others = (arg for arg in typing.get_args(kind) if arg is not types.NoneType)
        optional = types.NoneType in typing.get_args(kind)
        kind, words = first, tuple(word for other in others for word in typing.get_args(other))
    if typing.get_origin(kind) is typing.Literal:
        choices, kind = typing.get_args(kind), str
    return ConfigField(field.name, kind, choices, repeatable, optional, words, field.default, option)


def range_problems(settings: Any) -> Iterator[str]:
    """Yield a sentence for each field whose value has the wrong type or lies outside its range."""
    for setting in schema_of(settings.__class__).values():
        value = getattr(settings, setting.name)
        if setting.repeatable and not isinstance(value, tuple):
            yield f"{setting.flag} {value!r} is not a tuple; write ({value!r},)."
            continue
        for one in value if setting.repeatable else (value,):
            if (problem := _problem(setting, one)) is not None:
                yield problem


def _problem(setting: ConfigField, value: Any) -> str | None:
    if (value is None and setting.optional) or (isinstance(value, str) and value in setting.words):
        return None
    given = f"{setting.flag} {value}"
    if setting.choices:
        if value in setting.choices:
            return None
        return f"{given} is not known; choose {_either(setting.choices)}."
    right = isinstance(value, (int, float) if setting.kind is float else setting.kind)
    if not right or (setting.kind is not bool and isinstance(value, bool)):
        return f"{given} is not {_article(setting)}; write {_example(setting)}."
    if isinstance(value, str) and not value.isascii() and _SURROGATES.search(value):
        # Bytes of a command line that are no text come as halves of surrogate pairs, which no file takes.
        return f"{setting.flag} holds bytes that are not UTF-8; write it, or name the file, in UTF-8."
    if setting.kind not in (int, float):
        return None
    option = setting.option
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        return f"{setting.flag} is too large; write {_example(setting)}."
    if not math.isfinite(value):
        return f"{given} is not a finite number; write {_example(setting)}."
    outside = (
        (option.minimum is not None and value < option.minimum)
        or (option.above is not None and value <= option.above)
        or (option.maximum is not None and value > option.maximum)
        or (option.below is not None and value >= option.below)
    )
    # Where it is not the default anyway, none is a value like the others.
    none = ", or none" if setting.optional and setting.default is not None else ""
    return f"{given} is out of range; it must be {setting.range_text}{none}." if outside else None


def parse_values(
    cls: type, values: Mapping[str, Any], file_name: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Turn the strings of a command line, or the values of a TOML file, into field values.

    Args:
        cls: the settings dataclass.
        values: by field name; a repeatable field takes a sequence or one value.
        file_name: the file that the values come from; problems begin with it.

    Returns:
        The values by field name, and one sentence for each that is wrong.
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
        setting = known[name]
        many = raw if isinstance(raw, (list, tuple)) and setting.repeatable else (raw,)
        converted = tuple(_convert(setting, one) for one in many)
        faults = [where + fault for one in converted if (fault := _problem(setting, one)) is not None]
        problems += faults
        if not faults:
            parsed[name] = converted if setting.repeatable else converted[0]
    return parsed, problems


def _convert(setting: ConfigField, raw: Any) -> Any:
    """Return `raw` as the field's type where that is possible without guessing, else `raw` itself."""
    if setting.kind is float and isinstance(raw, int) and not isinstance(raw, bool):
        # TOML has integers of any length.
        return float(raw) if abs(raw) <= LARGEST_INTEGER else raw
    if setting.kind is str or not isinstance(raw, str):
        return dict(setting.option.synonyms).get(raw, raw) if isinstance(raw, str) else raw
    if setting.kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}.get(raw.lower(), raw)
    try:
        number = float(raw)
    except ValueError:
        return raw
    if setting.kind is float:
        return number
    try:
        return int(raw)
    except ValueError:
        # 1e9 is how people write a number of tokens.
        return int(number) if math.isfinite(number) and number.is_integer() else raw


def read_toml(path: Path) -> dict[str, Any]:
    """Return the keys and values of a TOML file, unchecked; see `parse_values`.

    Raises:
        ConfigError: when the file cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"--config {path} cannot be read ({error.strerror}); name a TOML file, "
            "such as one that --print-config wrote."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path} is not UTF-8 text; save it as UTF-8.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"--config {path} is not valid TOML: {error}; write lines like batch_size = 32."
        ) from error


def write_toml(settings: Any, panels: Sequence[type]) -> str:
    """Return settings as TOML that `read_toml` and `parse_values` turn back into equal values.

    Args:
        settings: the dataclass instance.
        panels: the base dataclasses it is made of; each becomes a headed paragraph.
    """
    lines: list[str] = []
    for panel in panels:
        lines += ["", f"# {panel.__doc__}"] if lines else [f"# {panel.__doc__}"]
        for name, setting in schema_of(panel).items():
            value = getattr(settings, name)
            # TOML has no null: an unset value stands as a comment that says what it will become.
            lines.append(
                f"# {name}: {setting.default_text}" if value is None else f"{name} = {_toml_value(value)}"
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
    """Return the end of a sentence about an unknown name: the nearest known one, or a full stop."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else "."


def _either(choices: Sequence[str]) -> str:
    return ", ".join(choices[:-1]) + f" or {choices[-1]}"


def _article(setting: ConfigField) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[setting.kind]


def _example(setting: ConfigField) -> str:
    if setting.default is not None and not isinstance(setting.default, tuple):
        return " or ".join((f"for example {_toml_value(setting.default)}", *setting.words))
    return {int: "for example 8", float: "for example 0.001", bool: "true or false", str: "text in quotes"}[
        setting.kind
    ]
