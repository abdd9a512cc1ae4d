"""Layout of `--help`: the names of an option on a line, its help indented below, in plain ASCII.

Typer's own layout has columns and boxes: it cuts long option names, and examples cannot be copied.
"""

from __future__ import annotations

import os
import re
import shutil
import textwrap
from collections.abc import Mapping
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

MIN_WIDTH, MAX_WIDTH = 50, 100
# Key in `ctx.meta`: show every option.
SHOW_ALL = "minimind.help_all"

# A non-breaking space.
_NO_BREAK = "\0"
# Units that are not broken: an option with its value, a quoted string, a word.
_UNITS = re.compile(r"""-\S+ (?:'[^']*'|"[^"]*"|[^-\s]\S*)|'[^']*'|"[^"]*"|\S+""")


class HelpCommand(TyperCommand):
    """A command with this layout."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help page."""
        formatter.write(_page(self, ctx))


class HelpGroup(TyperGroup):
    """A command group with this layout; without arguments it prints its help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help page."""
        formatter.write(_page(self, ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; without any, print the help and exit with 2."""
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help())
            ctx.exit(2)
        return super().parse_args(ctx, args)


def show_all_options(ctx: typer.Context, value: bool) -> None:
    """Print the help of all options and exit; callback of `--help-all`."""
    if value and not ctx.resilient_parsing:
        ctx.meta[SHOW_ALL] = True
        typer.echo(ctx.get_help())
        raise typer.Exit


def _page(command: Any, ctx: Any) -> str:
    width = min(max(shutil.get_terminal_size().columns, MIN_WIDTH), MAX_WIDTH)
    params = [param for param in command.get_params(ctx) if not param.hidden]
    arguments = [_argument(param) for param in params if param.param_type_name == "argument"]
    usage = [
        ctx.command_path,
        command.options_metavar,
        *arguments,
        getattr(command, "subcommand_metavar", ""),
    ]
    blocks = [_wrap(f"Usage: {' '.join(usage)}", width, "", 6)]
    blocks += [_wrap(paragraph, width, "  ") for paragraph in command.help.split("\n\n")]
    less_common: frozenset[str] = getattr(command.callback, "less_common", frozenset())
    if SHOW_ALL in ctx.meta:
        less_common = frozenset()
    sections: dict[str, list[str]] = {}
    if commands := getattr(command, "commands", {}):
        sections["Commands"] = _command_lines(commands, width)
    for param in params:
        if param.name in less_common:
            continue
        heading = param.rich_help_panel or "Options"
        names, text = param.get_help_record(ctx)
        if param.param_type_name == "argument":
            heading, names = "Arguments", _argument(param)
        section = sections.setdefault(heading, [])
        section += [_styled(line, fg="cyan") for line in _wrap(names, width, "  ", 6)]
        section += _wrap(text, width, " " * 6)
    if less_common:
        sections[f"{len(less_common)} more options"] = [f"  {ctx.command_path} --help-all"]
    if command.epilog:
        sections["Examples"] = [line for text in command.epilog.split("\n") for line in _example(text, width)]
    blocks += [[_styled(f"{heading}:", bold=True), *lines] for heading, lines in sections.items()]
    return "\n\n".join("\n".join(lines) for lines in blocks)


def _argument(param: Any) -> str:
    return str(param.metavar or param.name.upper())


def _command_lines(commands: Mapping[str, Any], width: int) -> list[str]:
    """Return a table of commands with the first paragraph of their help."""
    column = max(map(len, commands)) + 4
    lines: list[str] = []
    for name, command in commands.items():
        first, *rest = _wrap(command.help.split("\n\n")[0], width, " " * column)
        lines += [_styled(f"  {name}", fg="cyan") + first[len(name) + 2 :], *rest]
    return lines


def _example(command_line: str, width: int) -> list[str]:
    """Return the lines of an example; a backslash ends a line that is continued."""
    units = " ".join(unit.replace(" ", _NO_BREAK) for unit in _UNITS.findall(command_line))
    *lines, last = _wrap(units, width - 2, "  ", 6)
    return [*(f"{line} \\" for line in lines), last]


def _wrap(text: str, width: int, indent: str, hanging: int | None = None) -> list[str]:
    """Wrap text at spaces only, never at the hyphens of an option name."""
    # Keep a default on one line with its label.
    text = " ".join(text.split()).replace("[default: ", f"[default:{_NO_BREAK}")
    lines = textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent if hanging is None else " " * hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(_NO_BREAK, " ") for line in lines]


def _styled(text: str, **style: Any) -> str:
    """Style text unless colors are disabled; `typer.echo` strips styles for files and pipes."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else typer.style(text, **style)
