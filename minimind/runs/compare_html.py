"""Render a comparison of runs as one self-contained HTML page.

Everything read from the runs is escaped, and the content security policy allows no external resource and no
script but the page's own.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from itertools import pairwise
from typing import Any

from ..version import __version__
from .compare import NEAR, Comparison, Row
from .record import BITS, LOSS, Point, RunRecord

# Longer curves are drawn as means over neighbouring points.
MOST_POINTS = 800
# Colours in page.css; further runs reuse them with other dashes.
COLOURS = 8


@dataclass(frozen=True)
class Chart:
    """One chart of the page: the metric of metrics.jsonl, its labels, and whether to mark each point."""

    name: str
    title: str
    unit: str
    digits: int
    points: bool = False


CHARTS = (
    Chart(LOSS, "Training loss", "nats per token", 4),
    Chart(BITS, "Validation bits per byte", "bits per byte", 4, points=True),
    Chart("learning_rate", "Learning rate", "", 6),
    Chart("tokens_per_second", "Throughput", "tokens per second", 0),
)


def comparison_html(comparison: Comparison) -> str:
    """Return the page."""
    style, script = (_asset(name) for name in ("page.css", "charts.js"))
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    names = ", ".join(comparison.names)
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(names)} – comparison of runs</title>",
            f"<style>{style}</style>",
            "</head>",
            "<body>",
            '<a class="skip" href="#tables">To the tables</a>',
            *_header(comparison),
            "<main>",
            *_notes(comparison.notes),
            *_charts(comparison),
            '<div id="tables" tabindex="-1">',
            *_tables(comparison),
            "</div>",
            "</main>",
            f'<script type="application/json" id="data">{_json(_data(comparison))}</script>',
            f"<script>{script}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return a curve of at most `most` points: means over neighbours, and both end points."""
    if len(points) <= most:
        return list(points)
    inner, buckets = points[1:-1], most - 2
    bounds = [len(inner) * bucket // buckets for bucket in range(buckets + 1)]
    middle = [_mean(inner[low:high]) for low, high in pairwise(bounds)]
    return [points[0], *middle, points[-1]]


def _mean(points: Sequence[Point]) -> Point:
    def mean(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    step, value = mean(p.step for p in points), mean(p.value for p in points)
    assert step is not None
    assert value is not None
    return Point(round(step), mean(p.tokens for p in points), mean(p.seconds for p in points), value)


def _data(comparison: Comparison) -> dict[str, Any]:
    """Return the data of the charts."""
    return {
        "runs": list(comparison.names),
        "charts": [
            {**dataclasses.asdict(chart), "curves": [_curve(run, chart.name) for run in comparison.runs]}
            for chart in CHARTS
        ],
    }


def _curve(run: RunRecord, name: str) -> list[list[float | None]]:
    """Return step, tokens, seconds and value of each point."""

    def short(value: float | None) -> float | None:
        return None if value is None else float(f"{value:.7g}")

    return [
        [point.step, short(point.tokens), short(point.seconds), short(point.value)]
        for point in thinned(run.curve(name))
    ]


def _header(comparison: Comparison) -> Iterator[str]:
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    one = len(comparison.names) == 1
    yield "<header>"
    yield f"<h1>{'One run' if one else f'{len(comparison.names)} runs compared'}</h1>"
    yield f"<p>Made by minimind {escape(__version__)} on {made}.</p>"
    yield "</header>"


def _notes(notes: Sequence[str]) -> Iterator[str]:
    if notes:
        yield '<ul class="notes" aria-label="Notes">'
        yield from (f"<li>{escape(note)}</li>" for note in notes)
        yield "</ul>"


def _charts(comparison: Comparison) -> Iterator[str]:
    yield '<section aria-labelledby="curves">'
    yield '<h2 id="curves">Curves</h2>'
    yield "<noscript><p>The curves need JavaScript; the tables below do not.</p></noscript>"
    yield '<form class="controls" id="controls">'
    yield '<fieldset id="axis"><legend>Horizontal axis</legend>'
    for number, (value, label) in enumerate((("0", "Steps"), ("1", "Tokens"), ("2", "Training time"))):
        checked = " checked" if number == 0 else ""
        yield f'<label><input type="radio" name="axis" value="{value}"{checked}> {label}</label>'
    yield '<label><input type="checkbox" name="log"> Logarithmic</label>'
    yield '<label><input type="checkbox" name="whole"> Whole height</label>'
    yield "</fieldset>"
    yield '<fieldset id="runs"><legend>Runs</legend>'
    for number, name in enumerate(comparison.names):
        line = (
            f'<svg class="key" width="34" height="12" aria-hidden="true" focusable="false">'
            f'<line x1="1" y1="6" x2="33" y2="6" class="line c{number % COLOURS} d{number % 4}"/></svg>'
        )
        yield (
            f'<label class="run"><input type="checkbox" name="run" value="{number}" checked> {line} '
            f"<span>{escape(name)}</span></label>"
        )
    yield "</fieldset>"
    yield "</form>"
    yield '<div class="charts">'
    for chart in CHARTS:
        yield f'<figure id="chart-{chart.name}"><figcaption>'
        unit = f' <span class="unit">{escape(chart.unit)}</span>' if chart.unit else ""
        yield f"<h3>{escape(chart.title)}</h3>{unit}</figcaption>"
        yield '<div class="plot"></div>'
        yield '<p class="readout"></p>'
        yield "</figure>"
    yield "</div>"
    yield "<p class='hint'>Point at a chart, or focus it and use the arrow keys, to read its values.</p>"
    yield "</section>"


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
            yield from _table(key, caption, comparison.names, rows)
        else:
            yield f"<p>{escape(nothing)}</p>"
        yield "</section>"


def _table(key: str, caption: str, names: Sequence[str], rows: Sequence[Row]) -> Iterator[str]:
    # A focusable region can be scrolled with the keyboard.
    yield f'<div class="scroll" role="region" aria-labelledby="{key}-caption" tabindex="0">'
    yield f'<table><caption id="{key}-caption">{escape(caption)}</caption>'
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    yield f"<thead><tr><td></td>{heads}</tr></thead><tbody>"
    for row in rows:
        cells = "".join(f"<td>{escape(value)}</td>" for value in row.values)
        yield f'<tr><th scope="row">{escape(row.name)}</th>{cells}</tr>'
    yield "</tbody></table></div>"


def _asset(name: str) -> str:
    return (files("minimind") / "assets" / "comparison" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """Return the hash of an inline script or style for a content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: Any) -> str:
    """Return JSON that cannot close the enclosing script element."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c").replace("&", "\\u0026")
