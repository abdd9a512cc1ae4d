"""Compare runs: their outcome, also at equal tokens, and their differences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..config.options import PretrainConfig
from ..config.schema import schema_of
from ..errors import ConfigError
from ..formatting import count, duration
from ..modeling.config import MiniMindConfig
from .info import SHAPE, run_parts
from .info_text import device_text
from .record import BITS, LOSS, Point, RunRecord, read_run

# Fractions of the tokens that all runs have reached.
FRACTIONS = (0.1, 0.25, 0.5, 0.75, 1.0)
# Options that do not affect training.
_NOT_COMPARED = ("output_dir", "run_name", "cache_dir", "resume", "project", "tracker")
NOTHING = "–"


@dataclass(frozen=True)
class Row:
    """One row of a table: a name, and a value for each run."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Tables that compare runs.

    Attributes:
        names: short, unique names of the runs.
        runs: the runs.
        outcome: results of each run.
        equal_tokens: validation bits per byte at equal tokens, interpolated between evaluations.
        options: options that differ.
        environment: code, packages, data and device that differ.
        notes: sentences about what cannot be compared.
    """

    names: tuple[str, ...]
    runs: tuple[RunRecord, ...]
    outcome: tuple[Row, ...]
    equal_tokens: tuple[Row, ...]
    options: tuple[Row, ...]
    environment: tuple[Row, ...]
    notes: tuple[str, ...]


def compare_runs(paths: Sequence[Path]) -> Comparison:
    """Read runs and compare them.

    Raises:
        UserError: for a folder without a run.
    """
    runs = tuple(read_run(path) for path in paths)
    data = [run.fingerprint("training text") for run in runs]
    notes = []
    if len(set(data) - {None}) > 1:
        notes.append(
            "The runs trained on different data; losses are comparable only with the same --val-data."
        )
    elif None in data:
        notes.append("Not all runs recorded their data; check that it is the same.")
    if len({run.fingerprint("tokenizer") for run in runs} - {None}) > 1:
        notes.append("The runs have different tokenizers: compare bits per byte, not losses or tokens.")
    return Comparison(
        names=distinct_names([Path(run.path).resolve() for run in runs]),
        runs=runs,
        outcome=tuple(Row(name, tuple(text(run) for run in runs)) for name, text in _OUTCOME.items()),
        equal_tokens=tuple(_equal_tokens(runs)),
        options=tuple(_differing_options(runs)),
        environment=tuple(environment_differences(runs)),
        notes=tuple(notes),
    )


def distinct_names(paths: Sequence[Path]) -> tuple[str, ...]:
    """Return the shortest trailing parts of paths that are unique."""
    names = []
    for number, path in enumerate(paths):
        others = [other for other in paths if other != path]
        parts = 1
        while parts < len(path.parts) and any(
            other.parts[-parts:] == path.parts[-parts:] for other in others
        ):
            parts += 1
        name = str(Path(*path.parts[-parts:]))
        earlier = list(paths[:number]).count(path)
        names.append(f"{name} ({earlier + 1})" if earlier else name)
    return tuple(names)


def at_tokens(curve: Sequence[Point], tokens: float) -> float | None:
    """Return the value at a number of tokens by linear interpolation; None outside of the curve."""
    known = [(point.tokens, point.value) for point in curve if point.tokens is not None]
    for (low, before), (high, after) in pairwise(known):
        if low <= tokens <= high:
            fraction = (tokens - low) / (high - low) if high > low else 1.0
            return before + fraction * (after - before)
    return None


def _equal_tokens(runs: Sequence[RunRecord]) -> Iterable[Row]:
    curves = [run.curve(BITS) for run in runs]
    reached = [curve[-1].tokens for curve in curves if curve and curve[-1].tokens]
    if len(reached) < len(runs):
        return
    for fraction in FRACTIONS:
        tokens = fraction * min(tokens for tokens in reached if tokens is not None)
        yield Row(count(tokens), tuple(_number(at_tokens(curve, tokens)) for curve in curves))


def _differing_options(runs: Sequence[RunRecord]) -> Iterable[Row]:
    for name, field in schema_of(PretrainConfig).items():
        values = [getattr(run.config, name) for run in runs]
        if name not in _NOT_COMPARED and any(value != values[0] for value in values):
            yield Row(field.flag, tuple(_option(value) for value in values))


def _option(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value:.10g}" if isinstance(value, float) else str(value)


def environment_differences(runs: Sequence[RunRecord]) -> Iterable[Row]:
    """Yield a table row for each part of the environment that differs."""
    packages = sorted({name for run in runs for name in run.environment.get("packages") or {}})
    columns: dict[str, Callable[[RunRecord], Any]] = {
        "training text": lambda run: (run.fingerprint("training text") or NOTHING)[:12],
        "mixture": lambda run: run.fingerprint("mixture") or NOTHING,
        "tokenizer": lambda run: (run.fingerprint("tokenizer") or NOTHING)[:12],
        "git commit": _commit,
        "Python": lambda run: run.environment.get("python"),
        "device": lambda run: device_text(run.environment),
        "platform": lambda run: run.environment.get("platform"),
        "host": lambda run: run.environment.get("host"),
        "CUDA": lambda run: run.environment.get("cuda"),
    }
    for key in ("processes", "kind", "precision", "compiled"):
        columns[{"kind": "strategy"}.get(key, key)] = partial(_recorded, "launch", key)
    for name in packages:
        columns[name] = partial(_recorded, "packages", name)
    for title, read in columns.items():
        values = [read(run) for run in runs]
        if any(value != values[0] for value in values):
            yield Row(title, tuple(NOTHING if value is None else _option(value) for value in values))


def _recorded(group: str, key: str, run: RunRecord) -> Any:
    values = run.environment.get(group)
    return values.get(key) if isinstance(values, dict) else None


def _commit(run: RunRecord) -> str | None:
    git = run.environment.get("git")
    if not isinstance(git, dict) or not git.get("commit"):
        return None
    return str(git["commit"])[:12] + (" with changes" if git.get("changed") else "")


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4f}"


def _best_bits(run: RunRecord) -> float | None:
    bits = (run.best() or {}).get(BITS)
    return bits if isinstance(bits, int | float) else None


def _parameters(run: RunRecord) -> int | None:
    """Return the number of parameters, from the options where there are no weights (yet)."""
    if parts := run_parts(run):
        return parts["all"]
    sizes = {name: getattr(run.config, name) for name in SHAPE}
    try:
        return MiniMindConfig(**sizes).num_parameters() if sizes["vocab_size"] else None
    except ConfigError:
        return None


def _counted(value: float | None) -> str:
    return NOTHING if value is None else count(value)


def _time(run: RunRecord) -> str:
    curve = run.curve(LOSS)
    seconds = curve[-1].seconds if curve else None
    return NOTHING if seconds is None else duration(seconds)


_OUTCOME: dict[str, Callable[[RunRecord], str]] = {
    "state": lambda run: "finished" if run.finished else "not finished",
    "parameters": lambda run: _counted(_parameters(run)),
    "steps": lambda run: f"{run.steps:,}",
    "tokens": lambda run: _counted(run.tokens),
    "training loss": lambda run: _number(run.last(LOSS)),
    "best bits/byte": lambda run: _number(_best_bits(run)),
    "last bits/byte": lambda run: _number(run.last(BITS)),
    "tokens/s": lambda run: _counted(run.last("total_tokens_per_second") or run.last("tokens_per_second")),
    "training time": _time,
    "device": lambda run: f"{device_text(run.environment)} x {_recorded('launch', 'processes', run) or '?'}",
}
