"""The list of commands, and how their mistakes reach the user."""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Annotated, NoReturn

import typer

import minimind
from minimind.config.options import PretrainConfig
from minimind.errors import ConfigError, UserError
from minimind.formatting import printable
from minimind.launch_env import is_main_process, is_set, rank, world_size

from . import (
    bench,
    checkpoints,
    compare,
    decay,
    evaluate,
    export,
    generate,
    info,
    pretrain,
    reproduce,
    tokens,
    verify_resume,
)
from .examples import examples
from .help import HelpCommand, HelpGroup
from .options import LENIENT, normalise

# A launcher ends all processes when the first one fails: the others wait for the one that speaks.
SECONDS_TO_SPEAK = 4.0
# Commands whose work several processes share. With any other, each would do all of it and print it.
SHARED = frozenset({"pretrain", "decay", "bench", "eval"})

app = typer.Typer(
    cls=HelpGroup,
    help="Pretrain small language models.",
    epilog=examples(""),
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_enable=False,
)
# One line for each command.
_command = partial(app.command, cls=HelpCommand)
_command(context_settings=LENIENT, epilog=examples("pretrain"))(pretrain.pretrain)
_command(context_settings=LENIENT, epilog=examples("decay"))(decay.decay)
_command(context_settings=LENIENT, epilog=examples("bench"))(bench.bench)
_command(context_settings=LENIENT, epilog=examples("tokenize"))(tokens.tokenize)
_command(epilog=examples("checkpoints"))(checkpoints.checkpoints)
_command(epilog=examples("info"))(info.info)
_command(epilog=examples("compare"))(compare.compare)
_command(epilog=examples("reproduce"))(reproduce.reproduce)
_command(context_settings=LENIENT, epilog=examples("verify-resume"))(verify_resume.verify_resume)
_command(context_settings=LENIENT, epilog=examples("export"))(export.export)
_command(epilog=examples("generate"))(generate.generate)
_command("eval", context_settings=LENIENT, epilog=examples("eval"))(evaluate.evaluate)
app.add_typer(tokens.app, name="tokenizer")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"minimind {minimind.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and stop."),
    ] = False,
) -> None:
    """Pretrain small language models."""
    command = ctx.invoked_subcommand
    if world_size() > 1 and command not in SHARED:
        raise ConfigError(
            f"{command} works in one process and {world_size()} were launched (WORLD_SIZE); run it without a "
            f"launcher: minimind-train {command} ..."
        )


def main(words: Sequence[str] | None = None) -> None:
    """Run one command and exit.

    The code is 0 when done, 2 for a mistake of the user, 75 for a run that was stopped early with its state
    saved, 130 when interrupted.

    Args:
        words: the command line after the program name; by default that of this process.
    """
    if not is_main_process():
        _sign_warnings()
    words = normalise(sys.argv[1:] if words is None else words, PretrainConfig)
    if not is_main_process() and (not words or {"--help", "--help-all", "-h", "--version"} & set(words)):
        _leave(0)  # the same text would be printed by every process
    try:
        # Typer returns the code of an Exit, and 130 for Ctrl-C.
        code = app(words, prog_name="minimind-train", standalone_mode=False) or 0
    except UserError as error:
        code = _report(error.problems if isinstance(error, ConfigError) else [str(error)])
    except typer.TyperException as error:
        message = error.format_message()
        if words[:1] == ["generate"] and message.startswith("No such option"):
            message = f"{message.rstrip('.')}. A prompt that begins with a dash stands behind -- at the end."
        code = _report([message])
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            # Most likely a text in the place of a path.
            code = _report([f"{str(error.filename)[:40]}... is too long for the name of a file or folder."])
        elif world_size() == 1:
            raise
        else:
            _print_signed(traceback.format_exc())
            code = 1
    if code == 130 and is_main_process():
        _report(["interrupted."])
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Exit. Several processes on CPUs leave at once: gloo's threads may abort an orderly end of Python."""
    if world_size() > 1 and is_set("ACCELERATE_USE_CPU"):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _report(problems: Sequence[str]) -> int:
    """Print one line for each problem, by one process for all, and return the exit code.

    The others speak only if they outlive the first one: then the problem is theirs.
    """
    # A message may quote a file.
    problems = [printable(problem, keep="\n") for problem in problems]
    if is_main_process():
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
    else:
        time.sleep(SECONDS_TO_SPEAK)
        for problem in problems:
            _print_signed(f"error: {problem}")
    return 2


def _print_signed(text: str) -> None:
    """Print the lines of one process of several, each with its rank, in one piece."""
    lines = [f"rank {rank()}: {line}\n" for line in text.splitlines()]
    sys.stderr.write("".join(lines))


def _sign_warnings() -> None:
    """Have the warnings of libraries say from which process they come."""
    plain = warnings.formatwarning
    warnings.formatwarning = lambda *args, **options: f"rank {rank()}: {plain(*args, **options)}"
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(logging.Formatter(f"rank {rank()}: %(message)s"))
