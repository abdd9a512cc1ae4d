"""Typer options from configuration dataclasses, and their values from a command line.

Typer only splits the command line. `parse_values` parses the values, so that all errors are reported together
and worded like those of a file.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from minimind.config.options import AUTO, CONFIG_SCHEMA, PretrainConfig
from minimind.config.presets import resolve
from minimind.config.schema import (
    ConfigField,
    FieldInfo,
    flag_of,
    parse_values,
    path_problem,
    read_toml,
    schema_of,
    suggestion,
)
from minimind.errors import ConfigError

from .help import show_all_options

# Unknown options are collected in `ctx.args` and reported with all other problems.
LENIENT = {"ignore_unknown_options": True, "allow_extra_args": True}

ModelTokenizer = Annotated[
    str | None,
    FieldInfo("A tokenizer.json, or its folder.", metavar="PATH", default_text="the tokenizer of the model"),
]

_SWITCH_VALUES = {"true": True, "1": True, "false": False, "0": False}

T = TypeVar("T")


def _keyword(name: str, kind: Any, option: Any, default: Any = None) -> inspect.Parameter:
    """Return a parameter of a command that is an option."""
    annotation = Annotated[kind, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


_HELP_ALL = _keyword(
    "help_all",
    bool,
    typer.Option(
        "--help-all",
        callback=show_all_options,
        expose_value=False,
        is_eager=True,
        help="Show every option and exit.",
    ),
    default=False,
)


def with_options(
    *sections: type, hidden: Sequence[inspect.Parameter] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add an option to a command for each field of the sections, in place of its `**_`.

    If fields are marked as common, `--help` shows only these, and `--help-all` shows all.

    Args:
        sections: configuration dataclasses; their docstrings are the headings in `--help`.
        hidden: further parameters that `--help` does not show.
    """

    fields = [field for section in sections for field in schema_of(section).values()]
    marked = any(field.info.common for field in fields)
    less_common = frozenset(field.name for field in fields if marked and not field.info.common)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [
            *(parameter for parameter in own if parameter.kind is not parameter.VAR_KEYWORD),
            *(_parameter(field, section) for section in sections for field in schema_of(section).values()),
            *hidden,
        ]
        if less_common:
            parameters.append(_HELP_ALL)
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.less_common = less_common  # type: ignore[attr-defined]
        return command

    return decorate


def _parameter(field: ConfigField, section: type) -> inspect.Parameter:
    """Return the Typer option of a field."""
    kind: Any = bool if field.kind is bool else str
    names = [field.flag, *field.info.aliases]
    if field.kind is bool:
        names[0] += "/" + field.negative_flag
    default = field.default
    if field.repeatable:
        kind, default = list[str], list(field.default) or None
    elif default is not None and kind is str:
        default = field.default_text
    option = typer.Option(
        *names,
        help=field.info.help + _default_note(field),
        metavar=field.metavar,
        show_default=False,
        rich_help_panel=section.__doc__,
        autocompletion=completing(*field.choices) if field.choices else None,
    )
    return _keyword(field.name, kind | None, option, default)


def _default_note(field: ConfigField) -> str:
    """Return the default as shown after the help, empty if there is none."""
    text = field.default_text
    if isinstance(field.fallback, bool):
        text = " ".join(field.spell(field.fallback))
    return {"none": "", "required": " [required]"}.get(text, f" [default: {text}]")


def expand_path(param: typer.CallbackParam, value: Any) -> Any:
    """Expand `~` in a path, or in each path of a list; the callback of path arguments and options.

    Raises:
        ConfigError: a value cannot be a path.
    """
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        return [expand_path(param, item) for item in value]
    expanded = os.path.expanduser(value)
    name = param.opts[0] if param.param_type_name == "option" else (param.metavar or param.opts[0].upper())
    if problem := path_problem(name, f"{name} {value}", expanded):
        raise ConfigError(problem)
    return type(value)(expanded)


ModelArgument = Annotated[
    str,
    typer.Argument(help="A run, a checkpoint, a Hugging Face folder, or a .pth file.", callback=expand_path),
]


def completing(*values: str) -> Callable[[str], list[str]]:
    """Return the shell completion of an option with fixed values."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


def hidden_option(name: str, kind: type) -> inspect.Parameter:
    """Return an option that `--help` does not show; None if not given."""
    return _keyword(name, kind | None, typer.Option(flag_of(name), hidden=True))


def typed_values(ctx: typer.Context, cls: type = PretrainConfig) -> dict[str, Any]:
    """Return the values of `cls` given on the command line, as strings; None for the value `none`."""
    typed = {}
    for name, field in schema_of(cls).items():
        source = ctx.get_parameter_source(name)
        if name in ctx.params and source is not None and source.name == "COMMANDLINE":
            value = ctx.params[name]
            typed[name] = None if field.optional and value == "none" else value
    return typed


def unknown_args(ctx: typer.Context) -> list[str]:
    """Return a sentence for each argument that belongs to no option."""
    shown = [param for param in ctx.command.params if not getattr(param, "hidden", False)]
    known = ["--help", *(flag for param in shown for flag in (*param.opts, *param.secondary_opts))]
    problems: list[str] = []
    after_option = False
    for arg in ctx.args:
        # A negative number is a value.
        if arg.startswith("-") and not arg[1:2].isdigit():
            flag, assigned, _ = arg.partition("=")
            problems.append(f"unknown option {flag}{suggestion(flag, known)}")
            after_option = not assigned
        else:
            # An argument after an unknown option is most likely its value.
            if not after_option:
                example = (
                    f", such as --data {arg}" if "--data" in known else f"; see {ctx.command_path} --help"
                )
                problems.append(f"unexpected argument '{arg}'; values follow an option{example}.")
            after_option = False
    return problems


def parse_settings(ctx: typer.Context, cls: type[T]) -> T:
    """Build a configuration dataclass from the command line.

    Raises:
        ConfigError: lists every problem.
    """
    values, problems = parse_values(cls, typed_values(ctx, cls))
    if problems := [*unknown_args(ctx), *problems]:
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
    """Build the configuration of a run: preset < file < `flags` < command line.

    Args:
        ctx: the command line.
        preset: the value of `--preset`.
        file: the value of `--config`.
        flags: further values, overridden by the command line.
        problems: problems of `flags`, to be reported with the others.

    Raises:
        ConfigError: lists every problem.
    """
    found = [*unknown_args(ctx), *problems]
    file_values: Mapping[str, Any] = {}
    try:
        if file is not None:
            file_values = read_toml(Path(file))
    except ConfigError as error:
        found += error.problems
    values = {**(flags or {}), **typed_values(ctx)}
    try:
        config = resolve(preset=preset, file=file_values, file_name=str(file), flags=values)
    except ConfigError as error:
        raise ConfigError([*found, *error.problems]) from None
    if found:
        raise ConfigError(found)
    return config


def normalize(args: Sequence[str]) -> list[str]:
    """Rewrite command-line arguments for Typer.

    Options may have underscores, `--resume` without a path means the newest checkpoint, and a switch may have
    a value: `--batch_size 8 --resume --packing false` becomes `--batch-size 8 --resume=auto --no-packing`.
    """
    switches = {field.flag: field for field in CONFIG_SCHEMA.values() if field.kind is bool}
    return list(_normalized(list(args), switches))


def _normalized(args: list[str], switches: Mapping[str, ConfigField]) -> Iterator[str]:
    while args:
        arg = args.pop(0)
        if arg == "--":
            yield from (arg, *args)
            return
        if not arg.startswith("--"):
            yield arg
            continue
        flag, assigned, value = arg.partition("=")
        flag = flag.replace("_", "-")
        following = args[0] if args else "--"
        if flag in switches and not assigned and following.lower() in _SWITCH_VALUES:
            assigned, value = "=", args.pop(0)
        if flag in switches and value.lower() in _SWITCH_VALUES:
            yield from switches[flag].spell(_SWITCH_VALUES[value.lower()])
        elif flag == "--resume" and not assigned and following.startswith("--"):
            yield f"{flag}={AUTO}"
        else:
            yield flag + assigned + value
