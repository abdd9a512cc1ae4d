"""A clock for runs with a time limit, which advances with each step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from minimind.checkpoint.train_state import TrainState
from minimind.distributed.shutdown import StopRequest
from minimind.training.async_metrics import AsyncScalars
from minimind.training.throughput import Meter
from minimind.training.time_limits import BudgetClock


class StepClock:
    """Replaces the clocks of a run; each optimizer step takes `seconds`, everything else no time.

    Args:
        monkeypatch: undoes it.
        seconds: of a step.
        after_step: called with the number of steps done.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, seconds: float, after_step: Callable[[int], None] | None = None
    ) -> None:
        # Readings of the real clock are compared with this one: when the run was started.
        self._began = time.monotonic()
        self.elapsed = 0.0
        for one in (StopRequest, Meter, AsyncScalars, BudgetClock):
            _replace_default(monkeypatch, one.__init__, "clock", self)
        advance = TrainState.advance

        def advance_and_count(state: TrainState, *arguments: Any, **options: Any) -> None:
            advance(state, *arguments, **options)
            self.elapsed += seconds
            if after_step is not None:
                after_step(state.step)

        monkeypatch.setattr(TrainState, "advance", advance_and_count)

    def __call__(self) -> float:
        return self._began + self.elapsed


def _replace_default(monkeypatch: pytest.MonkeyPatch, function: Any, name: str, value: Any) -> None:
    if name in (function.__kwdefaults__ or {}):
        monkeypatch.setitem(function.__kwdefaults__, name, value)
        return
    code, defaults = function.__code__, list(function.__defaults__)
    defaults[code.co_varnames[: code.co_argcount].index(name) - code.co_argcount] = value
    monkeypatch.setattr(function, "__defaults__", tuple(defaults))
