"""Learning-rate schedules as pure functions of the optimizer step: no state to save."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from .config.budget import parse_budget
from .config.options import PretrainConfig
from .errors import ConfigError
from .formatting import parse_duration

DEFAULT_WARMUP_SHARE = 0.02
DEFAULT_WARMUP_LIMIT = 1000
# In the settings of checkpoints: the number of warm-up steps, also where it was the default.
WARMUP_KEY = "chosen_warmup_steps"
# Options that the learning rate follows from.
_SCHEDULE_OPTIONS = (
    *("learning_rate", "lr_schedule", "warmup_steps", "min_lr_ratio"),
    *("decay_ratio", "decay_steps", "decay_shape"),
)


def lr_factor(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    schedule: str,
    min_lr_ratio: float,
    decay_ratio: float,
    decay_steps: int | None = None,
    decay_shape: str = "sqrt",
) -> float:
    """Return the learning rate of a step as a fraction of the peak.

    Warm-up is linear and not zero at its first step: step s of w has (s + 1) / w, and step w - 1 the peak.
    From there the schedules fall so that the last step, `total_steps - 1`, has exactly `min_lr_ratio`:

    - `cosine`: half a cosine (Loshchilov and Hutter, SGDR, arXiv:1608.03983);
    - `linear`: a straight line;
    - `wsd`: the peak, then a decay over the last `decay_ratio` of the steps (Hu et al., MiniCPM,
      arXiv:2404.06395) that falls as 1 - sqrt, which Hägele et al. (arXiv:2405.18392) found best, or as a
      straight line;
    - `constant`: the peak to the end, whatever `min_lr_ratio`.

    A run shorter than its warm-up only warms up, and a run of one step has the peak.

    Args:
        step: from 0; beyond the last step the factor stays that of the last step.
        warmup_steps: 0 starts at the peak.
        schedule: one of the names above.
        min_lr_ratio: the factor at the end.
        decay_ratio: fraction of all steps in which `wsd` decays; the decay never starts inside the warm-up.
        decay_steps: the same as a number of steps, which takes precedence.
        decay_shape: of the decay of `wsd`, `sqrt` or `linear`.

    Raises:
        ValueError: for an unknown schedule or shape.
    """
    if schedule not in ("cosine", "linear", "wsd", "constant"):
        raise ValueError(f"unknown schedule '{schedule}'")
    if decay_shape not in ("sqrt", "linear"):
        raise ValueError(f"unknown shape '{decay_shape}'")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    last = total_steps - 1
    peak = max(warmup_steps - 1, 0)
    if schedule == "wsd":
        if decay_steps is None:
            decay_steps = round(decay_ratio * total_steps)
        peak = max(peak, last - max(decay_steps, 1))
        schedule = decay_shape
    if schedule == "constant" or step <= peak:
        return 1.0
    progress = min((step - peak) / max(last - peak, 1), 1.0)
    if schedule == "cosine":
        remaining = (1 + math.cos(math.pi * progress)) / 2
    elif schedule == "linear":
        remaining = 1 - progress
    else:
        remaining = 1 - math.sqrt(progress)
    return min_lr_ratio + (1 - min_lr_ratio) * remaining


class Schedule(Protocol):
    """A learning rate schedule of the caller; a plain function is one."""

    def __call__(self, step: int, total_steps: int) -> float:
        """Return the learning rate as a fraction of the peak: a pure function, so that a resume is exact.

        Args:
            step: optimizer step, from 0.
            total_steps: optimizer steps of the whole run.
        """


class LearningRateSchedule:
    """The learning rate of each optimizer step of a run.

    Attributes:
        warmup_steps: number of warm-up steps; 0 with a custom schedule.
        custom: schedule of the caller, or None.
    """

    def __init__(
        self,
        config: PretrainConfig,
        total_steps: int,
        warmup: int | None = None,
        custom: Schedule | None = None,
    ) -> None:
        """Take the schedule of a configuration for a run of `total_steps`.

        Args:
            warmup: number of warm-up steps; None for that of the configuration.
            custom: replaces the schedule of the configuration.
        """
        self._peak, self._total_steps, self.custom = config.peak_learning_rate, total_steps, custom
        self._has_stable_phase = config.lr_schedule == "wsd"
        self.warmup_steps = warmup_steps(config, total_steps) if warmup is None else warmup
        if custom is not None:
            self.warmup_steps = 0
        self._factor = partial(
            lr_factor,
            warmup_steps=self.warmup_steps,
            schedule=config.lr_schedule,
            min_lr_ratio=config.min_lr_ratio,
            decay_ratio=config.decay_ratio,
            decay_steps=config.decay_steps,
            decay_shape=config.decay_shape,
        )

    def at(self, step: int, decay_window: tuple[int, int] | None = None) -> float:
        """Return the learning rate of a step.

        Args:
            step: from 0.
            decay_window: the step at which `wsd` begins to decay and the number of steps of the run, where
                --max-time or --budget set them. Other schedules take the number of steps.

        Raises:
            ConfigError: for a custom schedule that returns no usable number.
        """
        if self.custom is not None:
            total = self._total_steps if decay_window is None else decay_window[1]
            return self._peak * _checked_factor(self.custom(step, total), step)
        if decay_window is not None and not self._has_stable_phase:
            return self._peak * self._factor(step, total_steps=decay_window[1])
        if decay_window is None or step < min(decay_window[0], self.warmup_steps):
            return self._peak * self._factor(step, total_steps=self._total_steps)
        begin, end = decay_window
        # A decay that begins inside the warm-up or the planned decay starts from the rate reached there.
        reached = self._factor(begin, total_steps=self._total_steps)
        decayed = self._factor(step, total_steps=end, warmup_steps=0, decay_steps=end - begin)
        return self._peak * reached * decayed


def _checked_factor(factor: Any, step: int) -> float:
    try:
        number = float(factor)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ConfigError(
            f"schedule= returned {factor!r} for step {step}; return a fraction of the peak learning rate, a "
            "finite number of at least 0."
        )
    return number


def warmup_steps(config: PretrainConfig, total_steps: int) -> int:
    """Return the number of warm-up steps of a run."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return default_warmup_steps(total_steps)


def expected_steps(config: PretrainConfig, total_steps: int) -> int:
    """Return about how many optimizer steps a run takes.

    A time budget ends it before its epochs; its choice has 2% of the expected steps as warm-up.
    """
    if config.budget is None or parse_budget(config.budget).seconds is None or not config.warmup_steps:
        return total_steps
    return min(total_steps, max(round(config.warmup_steps / DEFAULT_WARMUP_SHARE), 1))


def default_warmup_steps(total_steps: int) -> int:
    """Return the number of warm-up steps of a run without --warmup-steps."""
    return min(DEFAULT_WARMUP_LIMIT, round(DEFAULT_WARMUP_SHARE * total_steps))


def stored_warmup_steps(settings: Mapping[str, Any]) -> int | None:
    """Return the number of warm-up steps of the run of a checkpoint; None where it cannot be derived.

    Args:
        settings: of the checkpoint. Older versions stored only what the default follows from.
    """
    for key in (WARMUP_KEY, "warmup_steps"):
        if settings.get(key) is not None:
            return int(settings[key])
    if "total_steps" not in settings:
        return None
    return default_warmup_steps(settings["total_steps"])


@dataclass(frozen=True)
class ResumedSchedule:
    """The learning rate of a run from its checkpoint on.

    Attributes:
        schedule: with the warm-up of the beginning.
        decay_window: that of the checkpoint, or None where its time limit no longer counts.
        notes: sentences for the user.
    """

    schedule: LearningRateSchedule
    decay_window: tuple[int, int] | None
    notes: tuple[str, ...]


def resume_schedule(
    config: PretrainConfig,
    total_steps: int,
    *,
    saved: Mapping[str, Any],
    step: int,
    decay_window: tuple[int, int] | None,
    custom: Schedule | None = None,
) -> ResumedSchedule:
    """Return how the learning rate continues from a checkpoint.

    The warm-up stays that of the beginning, unless --warmup-steps has changed. The decay that --max-time
    began counts only for a run without more time.

    Args:
        config: of the run as it continues.
        total_steps: optimizer steps of the whole run, as it continues.
        saved: settings of the checkpoint.
        step: optimizer steps done.
        decay_window: of the checkpoint.
        custom: see `LearningRateSchedule`.
    """
    if custom is not None:
        return ResumedSchedule(LearningRateSchedule(config, total_steps, custom=custom), None, ())
    warmup = None
    if config.warmup_steps == saved.get("warmup_steps"):
        warmup = stored_warmup_steps(saved)
    schedule = LearningRateSchedule(config, total_steps, warmup)
    notes = []
    window = None if decay_window is None or _allows_more(config, saved) else decay_window
    if window is not None and step >= window[1]:
        timed = config.budget is None
        limit, value = ("--max-time", config.max_time) if timed else ("--budget", config.budget)
        notes.append(
            f"finished at step {step:,} within {limit} {value}; a longer {limit}, or {limit} none, trains on."
        )
    elif step and "total_steps" in saved and step < total_steps:
        names = [name for name in _SCHEDULE_OPTIONS if name in saved]
        before = dataclasses.replace(config, **{name: saved[name] for name in names})
        old = LearningRateSchedule(before, saved["total_steps"], stored_warmup_steps(saved))
        if not math.isclose(old.at(step, decay_window), schedule.at(step, window), rel_tol=1e-9):
            last = old.at(step - 1, decay_window)
            notes.append(
                f"the learning rate goes from {last:.3g} before the resume to "
                f"{schedule.at(step, window):.3g} after it (step {step:,}), because its schedule has "
                f"changed; the run ends at step {total_steps:,}."
            )
    return ResumedSchedule(schedule, window, tuple(notes))


def _allows_more(config: PretrainConfig, saved: Mapping[str, Any]) -> bool:
    """Return whether a resumed run has more time than before, by --budget or else by --max-time."""
    now, before = config.budget, saved.get("budget")
    if now is not None and before is not None:
        return (parse_budget(now).seconds or math.inf) > (parse_budget(before).seconds or math.inf)
    if now is not None or before is not None:
        return True
    now, before = config.max_time, saved.get("max_time")
    if now is None or before is None:
        return now is None
    return parse_duration(now) > parse_duration(before)


def stable_phase(
    config: PretrainConfig, total_steps: int, decay_window: tuple[int, int] | None = None
) -> tuple[int, int] | None:
    """Return between which numbers of steps a run is past its warm-up and not yet decaying.

    Args:
        decay_window: see `LearningRateSchedule.at`.

    Returns:
        The smallest and the largest number of steps; None for a schedule that has no such phase.
    """
    first, last = max(warmup_steps(config, total_steps), 1), total_steps
    if config.lr_schedule == "wsd":
        decay = config.decay_steps or round(config.decay_ratio * total_steps)
        last = max(first, total_steps - max(decay, 1))
        if decay_window is not None:
            last = min(last, decay_window[0])
    elif config.lr_schedule != "constant":
        return None
    return first, last


def decay_steps_due(
    *,
    steps_done: int,
    decay_ratio: float,
    decay_steps: int | None = None,
    seconds_left: float,
    seconds_per_step: float,
) -> int:
    """Return the length of the decay that a `wsd` run must begin now to end in time; 0 while it can wait.

    The decay is `decay_ratio` of all steps, itself included, so it has r/(1 - r) times as many steps as come
    before it, unless their number is given. It begins when the time left just suffices for it, or at once
    with the steps that the time allows when there is less.

    Args:
        steps_done: optimizer steps of the whole run so far.
        decay_ratio: r.
        decay_steps: number of steps to decay, which takes precedence.
        seconds_left: time for training steps, without saving and evaluation at the end.
        seconds_per_step: recent speed.
    """
    wanted = decay_steps
    if wanted is None:
        wanted = math.ceil(steps_done * decay_ratio / max(1 - decay_ratio, 0.05))
    possible = int(seconds_left / seconds_per_step)
    return max(min(wanted, possible), 1) if possible <= wanted else 0


def warmup_problem(
    config: PretrainConfig, *, warmup: int, steps_done: int, seconds_left: float, seconds_per_step: float
) -> str | None:
    """Return a sentence where --max-time ends the run inside a warm-up that `fit_to_time` does not shorten.

    See `fit_to_time` for the arguments.
    """
    possible = steps_done + int(max(seconds_left, 0.0) / seconds_per_step)
    if possible >= warmup or (config.lr_schedule == "wsd" and config.warmup_steps is None):
        return None
    return (
        f"--max-time {config.max_time} allows about {possible:,} steps, fewer than the {warmup:,} of the "
        f"warm-up: the learning rate only reaches {possible / warmup:.1%} of its peak; lower --warmup-steps."
    )


def fit_to_time(
    config: PretrainConfig,
    *,
    warmup: int,
    total_steps: int,
    steps_done: int,
    seconds_left: float,
    seconds_per_step: float,
) -> int:
    """Return how a `wsd` run changes its schedule now so that it ends within --max-time.

    Args:
        warmup: current number of warm-up steps.
        total_steps: optimizer steps of the run without a time limit.
        steps_done: optimizer steps of the whole run so far.
        seconds_left: time for training steps.
        seconds_per_step: recent speed.

    Returns:
        The steps to decay from now on, never inside the warm-up; or as a negative number the warm-up steps,
        where the default is more than twice as long as that of the steps that the time allows; else 0.
    """
    if config.lr_schedule != "wsd":
        return 0
    if steps_done < warmup:
        possible = steps_done + int(max(seconds_left, 0.0) / seconds_per_step)
        fitting = max(default_warmup_steps(possible), 1)
        by_default = config.warmup_steps is None and possible < total_steps
        return -fitting if by_default and fitting < warmup // 2 else 0
    steps = decay_steps_due(
        steps_done=steps_done,
        decay_ratio=config.decay_ratio,
        decay_steps=config.decay_steps,
        seconds_left=seconds_left,
        seconds_per_step=seconds_per_step,
    )
    return steps if steps_done + steps < total_steps else 0
