"""The list of commands, and how their mistakes reach the user."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Annotated

import typer

import minimind
from minimind.config import PretrainConfig
from minimind.errors import ConfigError, UserError

from . import bench, pretrain, tokens
from .options import LENIENT, is_main_process, normalise

# A launcher ends all processes when the first one fails: the others wait for the one that speaks.
SECONDS_TO_SPEAK = 2.0

app = typer.Typer(
    help="Pretrain small language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# One line for each command.
app.command(context_settings=LENIENT)(pretrain.pretrain)
app.command(context_settings=LENIENT)(bench.bench)
app.command(context_settings=LENIENT)(tokens.tokenize)
app.add_typer(tokens.app, name="tokenizer")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"minimind {minimind.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=_print_version, is_eager=True, help="Show the version and stop."
        ),
    ] = False,
) -> None:
    """Pretrain small language models."""


def main(words: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 when done, 2 for a mistake of the user, 130 when interrupted.

    Args:
        words: the command line after the program name; by default that of this process.
    """
    words = normalise(sys.argv[1:] if words is None else words, PretrainConfig)
    try:
        # Typer returns the code of an Exit, and 130 for Ctrl-C.
        code = app(words, prog_name="minimind-train", standalone_mode=False) or 0
    except UserError as error:
        code = _report(error.problems if isinstance(error, ConfigError) else [str(error)])
    except typer.TyperException as error:
        # Without any word Typer has printed the help and raises an empty message.
        code = _report([message] if (message := error.format_message()) else [])
    if code == 130:
        _report(["interrupted."])
    sys.exit(code)


def _report(problems: Sequence[str]) -> int:
    """Print one line for each problem, by one process for all, and return the exit code."""
    if is_main_process():
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
    else:
        time.sleep(SECONDS_TO_SPEAK)
    return 2
