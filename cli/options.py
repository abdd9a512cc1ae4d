"""Typer options made from the settings dataclasses, and the way back from a command line to their values.

Typer only splits the words; every value stays text until `parse_values` reads it, so that all mistakes of a
command line are reported together and in the same words as those of a file.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from minimind.config.options import PretrainConfig
from minimind.config.presets import resolve
from minimind.config.schema import ConfigField, parse_values, read_toml, schema_of, suggestion
from minimind.errors import ConfigError

from .help import show_all_options

# Unknown options come back in `ctx.args`, to be reported with all other problems.
LENIENT = {"ignore_unknown_options": True, "allow_extra_args": True}

RESUME_NEWEST = "auto"

_SWITCH_VALUES = {"true": True, "1": True, "false": False, "0": False}

_HELP_ALL = inspect.Parameter(
    "help_all",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[
        bool,
        typer.Option(
            "--help-all",
            callback=show_all_options,
            expose_value=False,
            is_eager=True,
            help="Show every option and exit.",
        ),
    ],
)

T = TypeVar("T")


def with_options(
    *panels: type, hidden: Sequence[inspect.Parameter] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option for each setting of the panels, in place of its `**values`.

    If some settings are marked as common, `--help` shows only these and `--help-all` shows all.

    Args:
        panels: settings dataclasses; the docstring of each heads its part of `--help`.
        hidden: further parameters, which `--help` does not show.
    """

    settings = [setting for panel in panels for setting in schema_of(panel).values()]
    marked = any(setting.option.common for setting in settings)
    less_common = frozenset(setting.name for setting in settings if marked and not setting.option.common)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [
            *(parameter for parameter in own if parameter.kind is not parameter.VAR_KEYWORD),
            *(_parameter(setting, panel) for panel in panels for setting in schema_of(panel).values()),
            *hidden,
        ]
        if less_common:
            parameters.append(_HELP_ALL)
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.less_common = less_common  # type: ignore[attr-defined]
        return command

    return decorate


def _parameter(setting: ConfigField, panel: type) -> inspect.Parameter:
    """Return the Typer option of one setting."""
    kind: Any = bool if setting.kind is bool else str
    names = [setting.flag, *setting.option.aliases]
    if setting.kind is bool:
        names[0] += "/--no-" + setting.flag.removeprefix("--")
    default = setting.default
    if setting.repeatable:
        kind, default = list[str], list(setting.default) or None
    elif default is not None and kind is str:
        default = setting.default_text
    option = typer.Option(
        *names,
        help=setting.option.help + _default_note(setting),
        metavar=setting.metavar,
        show_default=False,
        rich_help_panel=panel.__doc__,
        autocompletion=completing(*setting.choices) if setting.choices else None,
    )
    return inspect.Parameter(
        setting.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind | None, option],
    )


def _default_note(setting: ConfigField) -> str:
    """Return the default as it follows the help, empty where there is none."""
    text = setting.default_text
    if isinstance(setting.default, bool):
        text = setting.flag if setting.default else "--no-" + setting.flag.removeprefix("--")
    return {"none": "", "required": " [required]"}.get(text, f" [default: {text}]")


def completing(*values: str) -> Callable[[str], list[str]]:
    """Return what a shell is told at the tab key, where an option takes one of some values."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


def hidden_option(name: str, kind: type) -> inspect.Parameter:
    """Return an option that `--help` does not show, None where it is not given."""
    option = typer.Option("--" + name.replace("_", "-"), hidden=True)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def typed_values(ctx: typer.Context, cls: type) -> dict[str, Any]:
    """Return the settings of `cls` that stand on the command line, as they were typed.

    The word `none` unsets what a preset or a file has set.
    """
    typed = {name: ctx.params[name] for name in schema_of(cls) if name in ctx.params and _is_typed(ctx, name)}
    for name, setting in schema_of(cls).items():
        if setting.optional and typed.get(name) == "none":
            typed[name] = None
    return typed


def _is_typed(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def unknown_words(ctx: typer.Context) -> list[str]:
    """Return one sentence for each word of the command line that belongs to no option."""
    shown = [param for param in ctx.command.params if not getattr(param, "hidden", False)]
    known = ["--help", *(flag for param in shown for flag in (*param.opts, *param.secondary_opts))]
    problems: list[str] = []
    after_option = False
    for word in ctx.args:
        # A negative number is a value.
        if word.startswith("-") and not word[1:2].isdigit():
            flag, assigned, _ = word.partition("=")
            problems.append(f"unknown option {flag}{suggestion(flag, known)}")
            after_option = not assigned
        else:
            # The word after an unknown option is most likely its value.
            if not after_option:
                example = (
                    f", such as --data {word}" if "--data" in known else f"; see {ctx.command_path} --help"
                )
                problems.append(f"unexpected word '{word}'; values follow an option{example}.")
            after_option = False
    return problems


def parse_settings(ctx: typer.Context, cls: type[T]) -> T:
    """Build a settings dataclass from the command line alone.

    Raises:
        ConfigError: with every problem found.
    """
    values, problems = parse_values(cls, typed_values(ctx, cls))
    if problems := [*unknown_words(ctx), *problems]:
        raise ConfigError(problems)
    return cls(**values)


def parse_config(
    ctx: typer.Context,
    *,
    preset: str | None = None,
    file: str | None = None,
    flags: Mapping[str, Any] | None = None,
    problems: Sequence[str] = (),
) -> PretrainConfig:
    """Build the configuration of a run: preset < file < `flags` < options of the command line.

    Args:
        ctx: the command line.
        preset: the name given by `--preset`.
        file: the path given by `--config`.
        flags: values that give way to the options of the command line.
        problems: sentences about `flags`, to be reported with the others.

    Raises:
        ConfigError: with every problem found.
    """
    found = [*unknown_words(ctx), *problems]
    file_values: Mapping[str, Any] = {}
    try:
        if file is not None:
            file_values = read_toml(Path(file))
    except ConfigError as error:
        found += error.problems
    values = {**(flags or {}), **typed_values(ctx, PretrainConfig)}
    try:
        config = resolve(preset=preset, file=file_values, file_name=str(file), flags=values)
    except ConfigError as error:
        raise ConfigError([*found, *error.problems]) from None
    if found:
        raise ConfigError(found)
    return config


def normalise(words: Sequence[str], cls: type) -> list[str]:
    """Rewrite the words of a command line into the spelling that Typer reads.

    Options lose their underscores, `--resume` without a path means the newest checkpoint, and a switch may be
    followed by its value: `--batch_size 8 --resume --packing false` becomes
    `--batch-size 8 --resume=auto --no-packing`.
    """
    switches = {setting.flag for setting in schema_of(cls).values() if setting.kind is bool}
    return list(_normalised(list(words), switches))


def _normalised(words: list[str], switches: set[str]) -> Iterator[str]:
    while words:
        word = words.pop(0)
        if word == "--":
            yield from (word, *words)
            return
        if not word.startswith("--"):
            yield word
            continue
        flag, assigned, value = word.partition("=")
        flag = flag.replace("_", "-")
        following = words[0] if words else "--"
        if flag in switches and not assigned and following.lower() in _SWITCH_VALUES:
            assigned, value = "=", words.pop(0)
        if flag in switches and value.lower() in _SWITCH_VALUES:
            yield flag if _SWITCH_VALUES[value.lower()] else "--no-" + flag.removeprefix("--")
        elif flag == "--resume" and not assigned and following.startswith("--"):
            yield f"{flag}={RESUME_NEWEST}"
        else:
            yield flag + assigned + value
