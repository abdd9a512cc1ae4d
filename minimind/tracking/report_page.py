"""Render `report.html`: what a run is, how it goes, and what it has generated, as one self-contained page."""

from __future__ import annotations

import dataclasses
import shlex
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from typing import Any

from ..formatting import count, duration
from ..version import __version__
from .curves import RunClock, thinned
from .page import COLOURS, Chart, Curve, charts_section, html_page, notes, table

LOSS = Chart("loss", "Loss", "nats per token", 4, falls=True)
# Curves of the chart of losses: metric, label, and whether its points are evaluations.
LOSSES = (("loss", "training", False), ("val_loss", "validation", True))
CHARTS = (
    Chart("val_bits_per_byte", "Validation bits per byte", "bits per byte", 4, falls=True),
    Chart("learning_rate", "Learning rate", "", None),
    Chart("grad_norm", "Gradient norm", "before clipping", 3),
    Chart("tokens_per_second", "Throughput", "tokens per second", 0),
    Chart("expert_load", "Load of the busiest expert", "multiple of the mean", 3),
    Chart("balance_loss", "Load-balancing loss", "", 4),
)
SCORES = Chart("scores", "Cloze accuracy", "share of the items", 3)
SCORED = (("cloze_en", "English", True), ("cloze_zh", "Chinese", True))
# What an evaluation forecasts for the end of the run: bits per byte, and their range.
FORECAST = ("val_forecast_bits_per_byte", "val_forecast_low", "val_forecast_high")
# Metrics whose history is kept for the page.
DRAWN = frozenset({chart.name for chart in CHARTS} | {name for name, _, _ in LOSSES + SCORED} | {*FORECAST})

# Bounds on what a page shows, so that it stays below 500 kB.
MOST_SAMPLES = 12
MOST_PROMPTS = 4
MOST_SPIKES = 15
MOST_WARNINGS = 20
MOST_LINES = 40
MOST_CHARACTERS = 600

PHASES = {
    "training": "Training steps",
    "data": "Waiting for data",
    "first_steps": "First steps",
    "compile": "Compiling",
    "evaluation": "Evaluation",
    "saving": "Saving",
    "sampling": "Sampling",
    "spikes": "Reports of loss spikes",
    "rewinding": "Rewinding",
}


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run at its start.

    Attributes:
        name: heading of the page.
        total_steps: optimizer steps of the run.
        rows: description of model, data, steps and device, as key and value.
        data: lines of the data report.
        options: heading of a section, and for each option its flag, its value and whether it is the default.
        environment: versions, hardware and command line.
    """

    name: str
    total_steps: int
    rows: Sequence[tuple[str, str]]
    data: Sequence[str]
    options: Mapping[str, Sequence[tuple[str, str, bool]]]
    environment: Mapping[str, Any]


@dataclass
class RunState:
    """How far a run is.

    Attributes:
        clock: tokens and time by step.
        series: steps and values of each metric of `DRAWN`.
        last: the last value of every metric.
        step: of the last report.
        samples: step and text of the samples of each prompt.
        spikes: reports of loss spikes, each with its worst documents.
        warnings: shown on the terminal since the start or the last resume.
        totals: seconds by phase, since the start or the last resume.
        end: how the run ended, None while it continues.
        problem: whether it ended otherwise than by its last step.
    """

    clock: RunClock = field(default_factory=RunClock)
    series: dict[str, tuple[array[float], array[float]]] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    samples: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    spikes: list[Mapping[str, Any]] = field(default_factory=list)
    warnings: Sequence[str] = ()
    totals: Mapping[str, float] = field(default_factory=dict)
    end: str | None = None
    problem: bool = False

    def curve(self, name: str, label: str, style: int = 0, *, marks: bool = False) -> Curve:
        """Return the curve of a metric."""
        steps, values = self.series.get(name, ((), ()))
        return Curve(label, thinned(steps, values, self.clock), style, marks)

    def curves(self, named: Sequence[tuple[str, str, bool]]) -> list[Curve]:
        """Return the curves of one chart, without those of no points."""
        every = [self.curve(name, label, i, marks=marks) for i, (name, label, marks) in enumerate(named)]
        return [curve for curve in every if curve.points]

    def forecast(self) -> Curve | None:
        """Return the forecasts with their ranges; None without any."""
        if not self.series.keys() >= {*FORECAST}:
            return None
        values, low, high = (self.curve(name, "").points for name in FORECAST)
        points = [
            dataclasses.replace(value, low=least.value, high=most.value)
            for value, least, most in zip(values, low, high, strict=False)
        ]
        return Curve("forecast of the end", points, style=2)


def report_html(facts: RunFacts, state: RunState, reload_seconds: float) -> str:
    """Return the page; while the run continues, it reloads in this interval."""
    charts = [(LOSS, state.curves(LOSSES))]
    for chart in CHARTS:
        if chart.name in state.series:
            marks = chart.name.startswith("val_")
            curves = [state.curve(chart.name, "", int(marks), marks=marks)]
            if chart.name == "val_bits_per_byte" and (forecast := state.forecast()):
                curves = [dataclasses.replace(curves[0], label="measured"), forecast]
            charts.append((chart, curves))
    if scores := state.curves(SCORED):
        charts.append((SCORES, scores))
    live = state.end is None
    body = [
        '<a class="skip" href="#details">To the tables</a>',
        *_header(facts, state),
        "<main>",
        *notes([_cut(text) for text in state.warnings[-MOST_WARNINGS:]], "Warnings"),
        *charts_section([chart for chart, _ in charts], live=live),
        '<div id="details" tabindex="-1">',
        *_time(state.totals),
        *_spikes(state.spikes),
        *_samples(state.samples),
        *_configuration(facts),
        *_data(facts.data),
        *_environment(facts.environment),
        "</div>",
        "</main>",
        f"<footer><p>minimind {escape(__version__)}</p></footer>",
    ]
    return html_page(f"{facts.name} – training run", body, charts, reload_seconds if live else 0)


def _header(facts: RunFacts, state: RunState) -> Iterator[str]:
    now, total = datetime.now(UTC), max(facts.total_steps, 1)
    kind = "live" if state.end is None else "problem" if state.problem else "done"
    label = {"live": "Training", "problem": "Ended early", "done": "Finished"}[kind]
    yield "<header>"
    yield f'<p class="badge {kind}">{label}</p>'
    yield f"<h1>{escape(facts.name)}</h1>"
    yield f"<p>{escape(dict(facts.rows).get('model', ''))}</p>"
    yield f'<p><progress value="{min(state.step, total)}" max="{total}" aria-label="Steps done"></progress> '
    done = f"Step {state.step:,} of {total:,} ({state.step / total:.0%})."
    yield f"{done} {escape(_cut(state.end or ''))} Updated"
    yield f'<time datetime="{now.isoformat(timespec="seconds")}">{now:%Y-%m-%d %H:%M:%S} UTC</time>.</p>'
    yield '<p id="quiet" class="quiet" hidden></p>'
    yield '<dl class="tiles">'
    for name, value in _tiles(state):
        yield f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>"
    yield "</dl></header>"


def _tiles(state: RunState) -> Iterator[tuple[str, str]]:
    """Yield the numbers to see first."""
    last = state.last
    speed = last.get("total_tokens_per_second") or last.get("tokens_per_second")
    eta, forecast = (last.get(name) if state.end is None else None for name in ("eta_seconds", FORECAST[0]))
    shown = (
        ("Training loss", last.get("loss"), lambda v: f"{v:.4f}"),
        ("Validation loss", last.get("val_loss"), lambda v: f"{v:.4f}"),
        ("Bits per byte", last.get("val_bits_per_byte"), lambda v: f"{v:.4f}"),
        ("Forecast of the end", forecast, lambda v: f"{v:.3f}"),
        ("Tokens trained", last.get("tokens"), count),
        ("Tokens per second", speed, count),
        ("MFU", last.get("total_mfu") or last.get("mfu"), lambda v: f"{v:.1%}"),
        ("Training time", state.clock.seconds or None, duration),
        ("Time left", eta, duration),
        ("Skipped updates", last.get("skipped_steps") or None, lambda v: f"{v:,}"),
        ("Loss spikes", len(state.spikes) or None, lambda v: f"{v:,}"),
    )
    for name, value, form in shown:
        if isinstance(value, int | float):
            yield name, form(value)


def _time(totals: Mapping[str, float]) -> Iterator[str]:
    """Yield a bar of the seconds by phase, and a table of them."""
    parts = [
        (label, totals.get(name, 0.0)) for name, label in PHASES.items() if totals.get(name, 0.0) >= 0.05
    ]
    whole = sum(seconds for _, seconds in parts)
    if not whole:
        return
    yield '<section aria-labelledby="time"><h2 id="time">Where the time went</h2>'
    yield '<svg class="parts" viewBox="0 0 1000 24" preserveAspectRatio="none" aria-hidden="true">'
    left = 0.0
    for number, (_, seconds) in enumerate(parts):
        width = 1000 * seconds / whole
        yield f'<rect class="f{number % COLOURS}" x="{left:.1f}" width="{width:.1f}" height="24"/>'
        left += width
    yield '</svg><ul class="legend">'
    for number, (label, seconds) in enumerate(parts):
        yield f'<li><span class="swatch f{number % COLOURS}"></span>{label} {duration(seconds)} '
        yield f'<span class="unit">{seconds / whole:.1%}</span></li>'
    yield "</ul></section>"


def _spikes(spikes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not spikes:
        return
    yield '<section aria-labelledby="spikes"><h2 id="spikes">Loss spikes</h2>'
    for number, spike in enumerate(spikes[-MOST_SPIKES:]):
        step, loss, limit = (_number(spike.get(name)) for name in ("step", "loss", "limit"))
        skipped = ", update skipped" if spike.get("update_skipped") else ""
        yield f'<details id="spike-{number}">'
        yield f"<summary>Step {step}: loss {loss}, limit {limit}{skipped}</summary>"
        rows = [
            (f"Loss {_number(one.get('loss'))}, {_number(one.get('tokens'))} tokens", str(one.get("text")))
            for one in spike.get("documents", ())
        ]
        yield from _listing(f"documents-{number}", "Documents of the step with the highest loss", rows)
        yield "</details>"
    yield "</section>"


def _samples(samples: Mapping[str, Sequence[tuple[int, str]]]) -> Iterator[str]:
    if not samples:
        return
    yield '<section aria-labelledby="samples"><h2 id="samples">Samples as training went on</h2>'
    for number, (prompt, texts) in enumerate(list(samples.items())[:MOST_PROMPTS]):
        chosen = spread(texts, MOST_SAMPLES)
        title = f"Prompt: {_cut(prompt, 200)}" if prompt.strip() else "The start of a document"
        rows = [(f"Step {step:,}", (_cut(prompt, 200) + _cut(text),)) for step, text in chosen]
        yield from table(f"samples-{number}", title, (), rows, "long")
    yield "</section>"


def _configuration(facts: RunFacts) -> Iterator[str]:
    yield '<section aria-labelledby="configuration"><h2 id="configuration">Configuration</h2>'
    yield from _listing("run", "The run", facts.rows)
    changed = [
        (flag, value) for options in facts.options.values() for flag, value, unset in options if not unset
    ]
    if changed:
        yield from _listing("changed", "Options that differ from the defaults", changed)
    yield '<details id="all-options"><summary>All options</summary>'
    for number, (section, options) in enumerate(facts.options.items()):
        yield from _listing(f"options-{number}", section, [(flag, value) for flag, value, _ in options])
    yield "</details></section>"


def _data(lines: Sequence[str]) -> Iterator[str]:
    if not lines:
        return
    yield '<section aria-labelledby="data-report"><h2 id="data-report">Data</h2>'
    parts = (line.partition(" ") for line in lines[:MOST_LINES])
    rows = [(_cut(key, 40), value.strip()) for key, _, value in parts]
    yield from _listing("data-lines", "Report on the training data", rows)
    yield "</section>"


def _environment(environment: Mapping[str, Any]) -> Iterator[str]:
    named = [(name.replace("_", " "), _plain(name, value)) for name, value in environment.items()]
    if rows := [row for row in named[:MOST_LINES] if row[1]]:
        yield '<section aria-labelledby="environment"><h2 id="environment">Environment</h2>'
        yield from _listing("environment-rows", "Code, packages and hardware", rows)
        yield "</section>"


def _listing(key: str, caption: str, rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yield a table of names and texts, which are cut."""
    return table(key, caption, (), [(name, (_cut(text),)) for name, text in rows], "long")


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most `most` items, evenly spread, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[number * (len(items) - 1) // (most - 1)] for number in range(most)]


def _plain(name: str, value: Any) -> str:
    """Return a value of environment.json as text; empty for nothing."""
    if name == "command" and isinstance(value, list):
        return shlex.join(map(str, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain('', inner) or 'none'}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def _number(value: Any) -> str:
    return f"{value:,.5g}" if isinstance(value, int | float) else "not finite"


def _cut(text: str, most: int = MOST_CHARACTERS) -> str:
    """Return a text of at most `most` characters that take at most twice as many bytes as markup."""
    kept = text[:most]
    while len(escape(kept).encode(errors="replace")) > 2 * most:
        kept = kept[: len(kept) * 4 // 5]
    return kept if kept == text else kept + "…"
