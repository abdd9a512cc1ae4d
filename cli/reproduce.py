"""`minimind-train reproduce`: the command that repeats a run, and what has changed since."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minimind.formatting import printable


def reproduce(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    check_data: Annotated[
        bool,
        typer.Option("--check-data", help="Tokenize text that is not in the cache, to compare its content."),
    ] = False,
) -> None:
    """Print the command that repeats a run; warnings of what has changed since go to standard error."""
    from minimind.runs.record import read_run
    from minimind.runs.reproduce import reproduce as find

    found = find(read_run(run), check_data=check_data)
    typer.echo(printable(found.command))
    for warning in found.warnings:
        typer.echo(f"warning: {printable(warning)}", err=True)
