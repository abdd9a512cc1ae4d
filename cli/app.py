"""The commands, and how errors are reported."""

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
from minimind.config.naming import options_were_typed
from minimind.errors import ConfigError, UserError
from minimind.formatting import paint, printable
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
from .options import LENIENT, normalize

# A launcher ends all processes when one fails: the others wait for the main process to report first.
REPORT_DELAY_SECONDS = 4.0
# Commands that run distributed. With any other, each process would do and print everything.
DISTRIBUTED = frozenset({"pretrain", "decay", "bench", "eval"})

app = typer.Typer(
    cls=HelpGroup,
    help="Pretrain small language models.",
    epilog=examples(""),
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_enable=False,
)
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


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"minimind {minimind.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Pretrain small language models."""
    command = ctx.invoked_subcommand
    if world_size() > 1 and command not in DISTRIBUTED:
        raise ConfigError(
            f"{command} runs in a single process, but {world_size()} were launched (WORLD_SIZE); run it "
            f"without a launcher: minimind-train {command} ..."
        )


def main(args: Sequence[str] | None = None) -> None:
    """Run one command and exit.

    Exit codes: 0 on success, 2 for a user error, 75 for a run that was stopped early with a checkpoint, 130
    when interrupted.

    Args:
        args: command-line arguments; by default those of this process.
    """
    if world_size() > 1:
        # Set before torch is loaded: it warns of a lost launcher with C++ stack traces, one for each rank.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not is_main_process():
        _prefix_warnings()
    args = normalize(sys.argv[1:] if args is None else args)
    if not is_main_process() and (not args or {"--help", "--help-all", "-h", "--version"} & set(args)):
        _exit(0)  # only the main process prints
    try:
        # Typer returns the code of an Exit, and 130 for Ctrl-C.
        with options_were_typed():
            code = app(args, prog_name="minimind-train", standalone_mode=False) or 0
    except UserError as error:
        code = _report(
            [printable(problem) for problem in error.problems]
            if isinstance(error, ConfigError)
            else [printable(str(error), keep="\n")]
        )
    except typer.TyperException as error:
        message = error.format_message()
        if args[:1] == ["generate"] and message.startswith("No such option"):
            message = f"{message.rstrip('.')}. Put a prompt that begins with a dash after --."
        code = _report([printable(message)])
    except Exception as error:
        if isinstance(error, OSError) and error.filename:
            code = _report([_path_error(error)])
        elif world_size() == 1:
            raise
        else:
            _print_with_rank(traceback.format_exc())
            code = 1
    if code == 130 and is_main_process():
        _report(["interrupted."])
    _exit(code)


def _path_error(error: OSError) -> str:
    """Return a sentence about a path that the system refuses, such as one without permission."""
    path = str(error.filename)
    if error.errno == errno.ENAMETOOLONG:
        # Most likely text in place of a path.
        return f"{printable(path[:40])}... is too long for a file name; give a path."
    return f"{printable(path)} cannot be used ({error.strerror}); check the path and its permissions."


def _exit(code: int) -> NoReturn:
    """Exit; distributed CPU processes skip cleanup, in which gloo's threads may abort."""
    if world_size() > 1 and is_set("ACCELERATE_USE_CPU"):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _report(problems: Sequence[str]) -> int:
    """Print one line per problem and return the exit code.

    The main process reports first. Another process reports only if it is still running after a delay: then
    the main process did not have the problem.
    """
    # A message may quote a file.
    problems = [printable(problem, keep="\n") for problem in problems]
    if is_main_process():
        for problem in problems:
            print(paint("error:", "31", sys.stderr), problem, file=sys.stderr)
    else:
        time.sleep(REPORT_DELAY_SECONDS)
        for problem in problems:
            _print_with_rank(f"error: {problem}")
    return 2


def _print_with_rank(text: str) -> None:
    """Print lines with the rank as prefix, in one write."""
    lines = [f"rank {rank()}: {line}\n" for line in text.splitlines()]
    sys.stderr.write("".join(lines))


def _prefix_warnings() -> None:
    """Prefix the warnings of libraries with the rank."""
    format_warning = warnings.formatwarning
    warnings.formatwarning = lambda *args, **kwargs: f"rank {rank()}: {format_warning(*args, **kwargs)}"
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(logging.Formatter(f"rank {rank()}: %(message)s"))
