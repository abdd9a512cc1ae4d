"""Render a comparison of runs as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from html import escape

from ..tracking.page import Chart, Curve, charts_section, html_page, notes, table
from ..version import __version__
from .compare import NEAR, Comparison
from .record import BITS, LOSS

CHARTS = (
    Chart(LOSS, "Training loss", "nats per token", 4, falls=True),
    Chart(BITS, "Validation bits per byte", "bits per byte", 4, falls=True),
    Chart("learning_rate", "Learning rate", "", None),
    Chart("tokens_per_second", "Throughput", "tokens per second", 0),
)


def comparison_html(comparison: Comparison) -> str:
    """Return the page."""
    charts = [
        (
            chart,
            [
                Curve(name, run.thinned(chart.name), style, marks=chart.name == BITS)
                for style, (name, run) in enumerate(zip(comparison.names, comparison.runs, strict=True))
            ],
        )
        for chart in CHARTS
    ]
    body = [
        '<a class="skip" href="#tables">To the tables</a>',
        *_header(comparison),
        "<main>",
        *notes(comparison.notes),
        *charts_section(CHARTS, comparison.names),
        '<div id="tables" tabindex="-1">',
        *_tables(comparison),
        "</div>",
        "</main>",
    ]
    return html_page(f"{', '.join(comparison.names)} – comparison of runs", body, charts)


def _header(comparison: Comparison) -> Iterator[str]:
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    one = len(comparison.names) == 1
    yield "<header>"
    yield f"<h1>{'One run' if one else f'{len(comparison.names)} runs compared'}</h1>"
    yield f"<p>Made by minimind {escape(__version__)} on {made}.</p>"
    yield "</header>"


def _tables(comparison: Comparison) -> Iterator[str]:
    tables = (
        ("outcome", "Outcome", "Results of each run", comparison.outcome, "No run."),
        (
            "equal",
            "At equal tokens",
            "Validation bits per byte at equal training tokens, interpolated only between evaluations whose "
            f"tokens differ by at most {NEAR - 1:.0%}",
            comparison.equal_tokens,
            "Not all runs have evaluations on the same data.",
        ),
        (
            "options",
            "Options that differ",
            "Options that are not equal in all runs",
            comparison.options,
            "All runs have the same options.",
        ),
        (
            "environment",
            "Code, packages, data and device that differ",
            "Recorded environments, where they are not equal",
            comparison.environment,
            "All runs have the same environment.",
        ),
    )
    for key, title, caption, rows, nothing in tables:
        yield f'<section aria-labelledby="{key}">'
        yield f'<h2 id="{key}">{escape(title)}</h2>'
        if rows:
            yield from table(key, caption, comparison.names, [(row.name, row.values) for row in rows])
        else:
            yield f"<p>{escape(nothing)}</p>"
        yield "</section>"
