"""`minimind-train compare`: several runs side by side, in the terminal and as one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minimind.errors import ConfigError
from minimind.formatting import printable
from minimind.runs.compare import Row, compare_runs

LONGEST_NAME = 32


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.", metavar="RUN...")],
    html: Annotated[
        Path | None,
        typer.Option(help="Also write a page with curves to this file; it needs no network.", metavar="FILE"),
    ] = None,
) -> None:
    """Compare runs: losses, speed, bits per byte at equal tokens, and what they differ in."""
    found = compare_runs(runs)
    console = Console(highlight=False)
    tables = (
        ("", found.outcome),
        ("validation bits/byte after so many tokens", found.equal_tokens),
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

        try:
            html.write_text(comparison_html(found), encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"--html {html} cannot be written ({error.strerror}); name another file."
            ) from error
        console.print(Text(f"wrote {html}"), soft_wrap=True)


def _table(names: Sequence[str], rows: Sequence[Row]) -> Table:
    # As Text, for a name may hold what rich takes for markup.
    table = Table(box=None, pad_edge=False)
    # Whole: an option that is cut off can be looked up nowhere.
    width = min(max(len(row.name) for row in rows), LONGEST_NAME)
    table.add_column("", min_width=width, overflow="fold")
    for name in names:
        table.add_column(Text(printable(name)), justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in (row.name, *row.values)))
    return table
