"""`minimind-train reproduce`: print the command that repeats a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from minimind.formatting import paint, printable

from .options import expand_path


def reproduce(
    run: Annotated[Path, typer.Argument(help="Run folder.", callback=expand_path)],
    check_data: Annotated[
        bool,
        typer.Option("--check-data", help="Tokenize data that is not in the cache, to compare its content."),
    ] = False,
) -> None:
    """Print the command that repeats a run; warn on standard error of what changed since."""
    from minimind.runs.record import read_run
    from minimind.runs.reproduce import reproduce as find

    found = find(read_run(run), check_data=check_data)
    typer.echo(printable(found.command))
    for warning in found.warnings:
        typer.echo(f"{paint('warning:', '33', sys.stderr)} {printable(warning)}", err=True)
