"""Curves of a run by step, tokens and training time, from the lines of metrics.jsonl."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

# Longer curves are drawn as the mean, minimum and maximum of neighbouring points.
MOST_POINTS = 500


@dataclass(frozen=True)
class Point:
    """One report of a run, or the mean of several.

    Attributes:
        step: optimizer steps done.
        tokens: real input tokens trained, None where not known.
        seconds: training time so far, over all parts of a resumed run; None where not known.
        value: the metric.
        low: the smallest of several values, None for a single one.
        high: the largest.
    """

    step: int
    tokens: float | None
    seconds: float | None
    value: float
    low: float | None = None
    high: float | None = None


class RunClock:
    """Tokens and training time at each step, over all parts of a resumed run.

    Each part of a resumed run has its own clock. A part has ended where its totals were reported, where the
    clock goes back, or where the clock of a report started after the previous report was written.
    """

    def __init__(self) -> None:
        self._steps, self._tokens, self._seconds = (array("d", [0.0]) for _ in range(3))
        self._offset = self._before = 0.0
        self._ended, self._written = False, math.inf

    @property
    def seconds(self) -> float:
        """Training time so far."""
        return self._offset + self._before

    def add(self, line: Mapping[str, Any]) -> None:
        """Read the next line."""
        step, tokens, elapsed = line["step"], line.get("tokens"), line.get("elapsed")
        if isinstance(total := line.get("total_elapsed"), int | float):
            self._before, self._ended = max(self._before, total), True
        if not isinstance(tokens, int | float) or not isinstance(elapsed, int | float):
            return
        time = _seconds_of(line.get("time"))
        if self._ended or elapsed < self._before or time - elapsed > self._written:
            self._offset += self._before
        self._before, self._ended, self._written = elapsed, False, time
        if step > self._steps[-1]:
            self._steps.append(step)
            self._tokens.append(tokens)
            self._seconds.append(self._offset + elapsed)

    def at(self, step: float) -> tuple[float | None, float | None]:
        """Return tokens and seconds at a step, by linear interpolation; None without reports."""
        if len(self._steps) < 2:
            return (0.0, 0.0) if step == 0 else (None, None)
        after = bisect_left(self._steps, step)
        if after == len(self._steps):
            return self._tokens[-1], self._seconds[-1]
        before = max(after - 1, 0)
        low, high = self._steps[before], self._steps[after]
        fraction = (step - low) / (high - low) if high > low else 1.0
        columns = self._tokens, self._seconds
        tokens, seconds = (column[before] + fraction * (column[after] - column[before]) for column in columns)
        return tokens, seconds


def curve(steps: Sequence[float], values: Sequence[float], clock: RunClock) -> list[Point]:
    """Return the points of a metric."""
    return [Point(int(step), *clock.at(step), value) for step, value in zip(steps, values, strict=True)]


def thinned(
    steps: Sequence[float], values: Sequence[float], clock: RunClock, most: int = MOST_POINTS
) -> list[Point]:
    """Return a curve of at most `most` points: both ends, and mean and range of neighbours between them."""
    if len(steps) <= most:
        return curve(steps, values, clock)
    inner, buckets = len(steps) - 2, most - 2
    points = curve(steps[:1], values[:1], clock)
    for bucket in range(buckets):
        low, high = (1 + inner * edge // buckets for edge in (bucket, bucket + 1))
        part = values[low:high]
        step = round(sum(steps[low:high]) / (high - low))
        mean = math.fsum(part) / len(part)
        points.append(Point(step, *clock.at(step), mean, min(part), max(part)))
    return points + curve(steps[-1:], values[-1:], clock)


def _seconds_of(time: Any) -> float:
    """Return an ISO 8601 time in seconds, NaN for anything else."""
    try:
        return datetime.fromisoformat(time).timestamp()
    except (TypeError, ValueError, OverflowError, OSError):
        return math.nan
