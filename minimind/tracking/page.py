"""Self-contained HTML pages with curves and tables, for `report.html` and `compare --html`.

Everything that is shown is escaped, and the content security policy allows no external resource and no script
but the page's own.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

from .curves import Point

# Colours in page.css; further curves reuse them with other dashes.
COLOURS = 8
AXES = (("0", "Steps"), ("1", "Tokens"), ("2", "Training time"))


@dataclass(frozen=True)
class Curve:
    """One curve of a chart.

    Attributes:
        label: shown in the legend.
        points: at most some hundred.
        style: number of its colour and dashes.
        marks: whether to mark each point, where nothing was measured between them.
    """

    label: str
    points: Sequence[Point]
    style: int = 0
    marks: bool = False


@dataclass(frozen=True)
class Chart:
    """One chart of a page.

    Attributes:
        name: unique; part of the id of its element.
        title: heading.
        unit: of the values.
        digits: decimals of the values; None for scientific notation.
        falls: whether the values fall steeply at the start, which is cut off unless asked for.
    """

    name: str
    title: str
    unit: str
    digits: int | None
    falls: bool = False


def html_page(
    title: str,
    body: Iterable[str],
    charts: Iterable[tuple[Chart, Sequence[Curve]]],
    reload_seconds: float = 0,
) -> str:
    """Return a page.

    Args:
        title: of the window.
        body: markup, with everything from a run escaped.
        charts: what `charts_section` has made room for, with their curves.
        reload_seconds: reload the page in this interval; 0 for a page that does not change any more.
    """
    style, script = _asset("page.css"), _asset("charts.js")
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    data = {"charts": [_chart_data(chart, curves) for chart, curves in charts], "reload": reload_seconds}
    markup = "\n".join(body)
    page = f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
{markup}
<script type="application/json" id="data">{_json(data)}</script>
<script>{script}</script>
</body>
</html>
"""
    # A name may hold unpaired surrogates.
    return page.encode(errors="replace").decode()


def charts_section(charts: Iterable[Chart], runs: Sequence[str] = (), *, live: bool = False) -> Iterator[str]:
    """Yield a section with room for charts, and the controls of all of them.

    Args:
        charts: drawn by the script.
        runs: names of runs to choose from, if the curves of each chart are those of runs.
        live: whether the page reloads, which a checkbox stops.
    """
    yield '<section aria-labelledby="curves"><h2 id="curves">Curves</h2>'
    yield "<noscript><p>The curves need JavaScript; the tables below do not.</p></noscript>"
    yield '<form class="controls" id="controls">'
    yield '<fieldset id="axis"><legend>Horizontal axis</legend>'
    for number, (value, label) in enumerate(AXES):
        checked = " checked" if number == 0 else ""
        yield f'<label><input type="radio" name="axis" value="{value}"{checked}> {label}</label>'
    yield '<label><input type="checkbox" name="log"> Logarithmic</label>'
    yield '<label><input type="checkbox" name="whole"> Whole height</label>'
    if live:
        yield '<label><input type="checkbox" name="follow" checked> Follow the run</label>'
    yield "</fieldset>"
    if runs:
        yield '<fieldset id="runs"><legend>Runs</legend>'
        for number, name in enumerate(runs):
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
    yield f'<div class="charts{"" if runs else " lead"}">'
    for chart in charts:
        yield f'<figure id="chart-{chart.name}"><figcaption>'
        unit = f' <span class="unit">{escape(chart.unit)}</span>' if chart.unit else ""
        yield f"<h3>{escape(chart.title)}</h3>{unit}</figcaption>"
        yield '<div class="plot"></div><p class="readout"></p></figure>'
    yield "</div>"
    yield '<p class="hint">Point at a chart, or focus it and use the arrow keys, to read its values.'
    yield "A shaded area is the range of neighbouring reports.</p>"
    yield "</section>"


def table(
    key: str, caption: str, heads: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], kind: str = ""
) -> Iterator[str]:
    """Yield a table with a heading for each row; `key` is unique, `kind` a class of page.css."""
    # A focusable region can be scrolled with the keyboard.
    yield f'<div class="scroll {kind}" role="region" aria-labelledby="{key}-caption" tabindex="0">'
    yield f'<table><caption id="{key}-caption">{escape(caption)}</caption>'
    if heads:
        cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
        yield f"<thead><tr><td></td>{cells}</tr></thead>"
    yield "<tbody>"
    for name, values in rows:
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        yield f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'
    yield "</tbody></table></div>"


def notes(sentences: Sequence[str], label: str = "Notes") -> Iterator[str]:
    """Yield a list of sentences that stand out."""
    if sentences:
        yield f'<ul class="notes" aria-label="{escape(label)}">'
        yield from (f"<li>{escape(sentence)}</li>" for sentence in sentences)
        yield "</ul>"


def _chart_data(chart: Chart, curves: Sequence[Curve]) -> dict[str, Any]:
    named = {name: getattr(chart, name) for name in ("name", "title", "digits", "falls")}
    return {
        **named,
        "curves": [{**vars(curve), "points": [*map(_numbers, curve.points)]} for curve in curves],
    }


def _numbers(point: Point) -> list[float | None]:
    """Return step, tokens, seconds and value, and the range of several values."""
    numbers = [point.step, _short(point.tokens), _short(point.seconds, 5), _short(point.value, 9)]
    if point.low is None or point.low == point.high:
        return numbers
    return [*numbers, _short(point.low, 5), _short(point.high, 5)]


def _short(value: float | None, digits: int = 7) -> float | None:
    if value is None:
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() else short


@cache
def _asset(name: str) -> str:
    return (files("minimind") / "assets" / "page" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """Return the hash of an inline script or style for a content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: Any) -> str:
    """Return JSON that cannot close the enclosing script element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("&", "\\u0026")
