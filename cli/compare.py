"""`minimind-train compare`: compare runs in the terminal and on an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minimind.formatting import printable
from minimind.io.atomic import write_output

from .options import expand_path

if TYPE_CHECKING:
    from rich.table import Table

    from minimind.runs.compare import Row

MAX_NAME_WIDTH = 32


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", metavar="RUN...", callback=expand_path)],
    html: Annotated[
        Path | None,
        typer.Option(
            help="Also write an HTML page with loss curves to this file.",
            metavar="FILE",
            callback=expand_path,
        ),
    ] = None,
) -> None:
    """Compare runs: losses, speed, bits per byte at equal tokens, and differences."""
    from rich.console import Console
    from rich.text import Text

    from minimind.runs.compare import compare_runs

    found = compare_runs(runs)
    console = Console(highlight=False)
    tables = (
        ("", found.outcome),
        ("validation bits/byte at equal tokens", found.equal_tokens),
        ("options that differ", found.options),
        ("code, packages, data and device that differ", found.environment),
    )
    for title, rows in tables:
        if rows:
            if title:
                console.print(Text(title, style="bold"), soft_wrap=True)
            console.print(_table(found.names, rows), "")
    for note in found.notes:
        console.print(Text(f"note: {printable(note)}"))
    if html is not None:
        from minimind.runs.compare_html import comparison_html

        write_output("--html", html, comparison_html(found))
        console.print(Text(printable(f"wrote {html}")), soft_wrap=True)


def _table(names: Sequence[str], rows: Sequence[Row]) -> Table:
    from rich.table import Table
    from rich.text import Text

    # As Text, because rich would interpret markup in names.
    table = Table(box=None, pad_edge=False)
    # Option names are never cut.
    width = min(max(len(row.name) for row in rows), MAX_NAME_WIDTH)
    table.add_column("", min_width=width, overflow="fold")
    for name in names:
        table.add_column(Text(printable(name)), justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in (row.name, *row.values)))
    return table
