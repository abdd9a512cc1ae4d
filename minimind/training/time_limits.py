"""Fit the end of a run, and its decay, into --max-time or the time of --budget."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from ..checkpoint.checkpointer import RunCheckpoints
from ..checkpoint.train_state import TrainState
from ..config.budget import parse_budget
from ..config.options import PretrainConfig
from ..distributed.shutdown import StopRequest
from ..schedule import WARMUP_KEY, LearningRateSchedule, default_warmup_steps, fit_to_time, warmup_problem
from ..tracking.console import Progress
from .throughput import Meter

# Seconds that --max-time reserves for writing the model and its sample after the last step.
END_SECONDS = 5.0

# The same for a time budget, which may be shorter, besides writing.
_FIXED_END_SECONDS = 1.0
# Of the last checkpoint in float32 with two moments, and the model in half precision; of a slow disk.
_END_BYTES_PER_PARAMETER = 14
_END_BYTES_PER_SECOND = 1e9
# A new estimate counts if it moves the end of the run by more than this share of the steps left.
_WORTHWHILE = 0.01


class BudgetClock:
    """Counts the seconds of a run's time budget.

    The budget is of training: from the first evaluation to the final model, over all attempts.

    Attributes:
        seconds: the whole budget.
        end_seconds: reserved for writing the last checkpoint and the final model, and for a sample.
    """

    def __init__(
        self,
        seconds: float,
        *,
        parameters: int,
        spent: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock.

        Args:
            seconds: the budget.
            parameters: of the model; they decide how long writing it takes.
            spent: seconds of earlier attempts.
            clock: seconds, monotonic.
        """
        self.seconds = seconds
        self.end_seconds = _FIXED_END_SECONDS + _END_BYTES_PER_PARAMETER * parameters / _END_BYTES_PER_SECOND
        self._clock, self._began, self._before = clock, clock(), spent

    def spent(self) -> float:
        """Return the seconds used so far, those of earlier attempts included."""
        return self._before + self._clock() - self._began

    def steps_left(self, seconds_per_step: float, *besides: tuple[float, int]) -> int:
        """Return how many steps still fit, with their evaluations and checkpoints and what ends the run.

        Args:
            seconds_per_step: recent speed.
            besides: seconds of an evaluation, and of a checkpoint, each with the steps between two; one
                follows the last step.
        """
        left = self.seconds - self.spent() - self.end_seconds - sum(seconds for seconds, _ in besides)
        per_step = seconds_per_step + sum(seconds / interval for seconds, interval in besides)
        return max(int(left / max(per_step, 1e-9)), 0)


def budget_clock(config: PretrainConfig, parameters: int, spent: float) -> BudgetClock | None:
    """Return the clock of --budget, see `BudgetClock`; None without one, and for tokens or FLOPs."""
    seconds = None if config.budget is None else parse_budget(config.budget).seconds
    return None if seconds is None else BudgetClock(seconds, parameters=parameters, spent=spent)


def fitted_window(
    window: tuple[int, int] | None,
    *,
    step: int,
    end: int,
    warmup: int,
    decay_ratio: float,
    decay_steps: int | None = None,
) -> tuple[int, int] | None:
    """Return the decay and the end of a run by a new estimate of its end; None where nothing changes.

    A decay that has begun keeps its first step, so that the learning rate changes by no more than the
    estimate.

    Args:
        window: first step of the decay and number of steps of the run, by the last estimate.
        step: optimizer steps done.
        end: number of steps that the time allows.
        warmup: warm-up steps; the decay never begins inside.
        decay_ratio: share of the steps in the decay.
        decay_steps: the same as a number, which takes precedence.
    """
    end = max(end, step + 1)
    if window is not None and abs(end - window[1]) <= max(1, _WORTHWHILE * (window[1] - step)):
        return None
    if window is not None and step >= window[0]:
        return window[0], end
    decay = decay_steps if decay_steps is not None else round(decay_ratio * end)
    return max(end - max(decay, 1), warmup, step), end


@dataclass(kw_only=True)
class TimeLimits:
    """The part of `Trainer` that ends a run in time, and the attributes that it needs."""

    config: PretrainConfig
    accelerator: Accelerator
    schedule: LearningRateSchedule
    total_steps: int
    checkpointer: RunCheckpoints
    meter: Meter
    progress: Progress
    stop: StopRequest
    state: TrainState
    budget: BudgetClock | None = None
    checked_warmup: bool = False

    @property
    def last_step(self) -> int:
        """The number of steps of the whole run."""
        window = self.state.decay_window
        return self.total_steps if window is None else window[1]

    def _decay_steps(self) -> int:
        """Return what `fit_to_time` asks for, on the main process; 0 elsewhere.

        With a time budget it is one more than the steps that still fit.
        """
        seconds_left, per_step = self.stop.seconds_left(), self.meter.seconds_per_step()
        if self.budget is not None:
            if per_step is None or not self.accelerator.is_main_process:
                return 0
            evaluation = self.meter.seconds_of("evaluation"), self.config.evaluation_interval
            saving = self.meter.seconds_of("saving"), self.config.save_interval
            return 1 + self.budget.steps_left(per_step, evaluation, saving)
        unused = not self.accelerator.is_main_process or self.state.decay_window is not None
        if unused or seconds_left is None or per_step is None or self.schedule.custom is not None:
            return 0
        # A tenth is reserved for slower steps, and twice the time of a last evaluation and save.
        reserved = 2 * (self.meter.seconds_of("evaluation") + self.meter.seconds_of("saving")) + END_SECONDS
        limits: dict[str, Any] = {
            "warmup": self.schedule.warmup_steps,
            "steps_done": self.state.step,
            "seconds_left": 0.9 * (seconds_left - reserved),
            "seconds_per_step": per_step,
        }
        if not self.checked_warmup and (problem := warmup_problem(self.config, **limits)) is not None:
            self.progress.warn(problem)
        self.checked_warmup = True
        return fit_to_time(self.config, total_steps=self.total_steps, **limits)

    def _fit_to_time(self, steps: int) -> None:
        """Begin the decay that ends the run within --max-time, or shorten the warm-up; see `fit_to_time`."""
        if steps < 0:
            self._shorten_warmup(-steps, "--max-time")
            return
        begin, end = self.state.step, min(self.state.step + steps, self.total_steps)
        self.state.decay_window = begin, end
        self.meter.end_at(end)
        self.progress.start(end, begin)
        self.progress.note(f"--max-time: decaying from step {begin:,}, to end at step {end:,}.")

    def _fit_to_budget(self, end: int) -> None:
        """Move the end of the run to the step by which the time budget is used up; see `fitted_window`."""
        state = self.state
        if state.step >= self.last_step:
            return
        if state.step < self.schedule.warmup_steps:
            # The machine is slower than it was measured.
            self._shorten_warmup(default_warmup_steps(end), "--budget")
            return
        window = fitted_window(
            state.decay_window,
            step=state.step,
            end=min(end, self.total_steps),
            warmup=self.schedule.warmup_steps,
            decay_ratio=self.config.decay_ratio,
            decay_steps=self.config.decay_steps,
        )
        if window is not None:
            state.decay_window = window
            self.meter.end_at(window[1])
            self.progress.start(window[1], state.step)

    def _shorten_warmup(self, steps: int, option: str) -> None:
        """Warm up in `steps`, or twice those done, if that is less than half of what is planned."""
        warmup = max(steps, 2 * (self.state.step + 1))
        if warmup < self.schedule.warmup_steps // 2:
            self.schedule = LearningRateSchedule(self.config, self.total_steps, warmup)
            self.checkpointer.settings[WARMUP_KEY] = warmup
            self.progress.note(f"{option}: warming up in {warmup:,} steps.")
