"""Compare runs: their outcome, also at equal tokens, and their differences."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..config.options import CONFIG_SCHEMA
from ..errors import ConfigError
from ..formatting import count, duration, option_text
from ..modeling.config import MiniMindConfig
from ..tracking.curves import Point
from .info import SHAPE, run_parts
from .info_text import device_text
from .record import BITS, LOSS, RunRecord, read_run

# Fractions of the tokens that all runs have reached.
FRACTIONS = (0.1, 0.25, 0.5, 0.75, 1.0)
# Evaluations are near where the tokens of the later one are at most this multiple of the earlier one.
NEAR = 1.25
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
    same_tokenizer = len({run.fingerprint("tokenizer") for run in runs} - {None}) <= 1
    if not same_tokenizer:
        notes.append("The runs have different tokenizers: compare bits per byte, not losses or tokens.")
    validation = {_validation_data(run, same_tokenizer=same_tokenizer) for run in runs} - {None}
    if len(validation) > 1:
        notes.append("The runs were validated on different data, so they are not compared at equal tokens.")
    return Comparison(
        names=distinct_names([Path(run.path).resolve() for run in runs]),
        runs=runs,
        outcome=tuple(Row(name, tuple(text(run) for run in runs)) for name, text in _OUTCOME.items()),
        equal_tokens=tuple(_equal_tokens(runs)) if len(validation) <= 1 else (),
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
    """Return the value at a number of tokens, by linear interpolation between evaluations that are near.

    Losses fall steeply at the start, so that a line between distant evaluations is far above the curve.

    Returns:
        None where there is no evaluation at `tokens`, nor two within a factor of `NEAR` around it.
    """
    known = [(point.tokens, point.value) for point in curve if point.tokens is not None]
    for number, value in known:
        if math.isclose(number, tokens):
            return value
    for (low, before), (high, after) in pairwise(known):
        if low <= tokens <= high <= NEAR * low:
            return before + (tokens - low) / (high - low) * (after - before)
    return None


def _equal_tokens(runs: Sequence[RunRecord]) -> Iterable[Row]:
    """Yield a row for evaluations of the shortest run, those nearest to `FRACTIONS` of its tokens."""
    curves = [run.curve(BITS) for run in runs]
    evaluated = [[point.tokens for point in curve if point.tokens] for curve in curves]
    if not all(evaluated):
        return
    shortest = min(evaluated, key=lambda tokens: tokens[-1])
    chosen = {min(shortest, key=lambda tokens: abs(tokens - f * shortest[-1])) for f in FRACTIONS}
    for tokens in sorted(chosen):
        yield Row(count(tokens), tuple(_number(at_tokens(curve, tokens)) for curve in curves))


def _validation_data(run: RunRecord, *, same_tokenizer: bool) -> object:
    """Return what identifies the validation data of a run, None where it was not recorded."""
    if run.config.val_data:
        folder = run.environment.get("working_folder") or ""
        return tuple(os.path.join(folder, path) for path in run.config.val_data)
    # The fingerprint is that of the tokens, so it says nothing of data that was tokenized differently.
    data = run.fingerprint("training text")
    return data if same_tokenizer or data is None else (run.config.data, run.config.val_fraction)


def _differing_options(runs: Sequence[RunRecord]) -> Iterable[Row]:
    for name, field in CONFIG_SCHEMA.items():
        values = [getattr(run.config, name) for run in runs]
        if name not in _NOT_COMPARED and any(value != values[0] for value in values):
            yield Row(field.flag, tuple(_option(value) for value in values))


def _option(value: Any) -> str:
    return f"{value:.10g}" if isinstance(value, float) else option_text(value)


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
    return NOTHING if run.seconds is None else duration(run.seconds)


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
