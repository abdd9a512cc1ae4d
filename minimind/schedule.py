"""Learning-rate schedules as pure functions of the optimizer step: no state to save."""

from __future__ import annotations

import math
from functools import partial

from .config.options import PretrainConfig

DEFAULT_WARMUP_SHARE = 0.02
DEFAULT_WARMUP_LIMIT = 1000


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
        total_steps: optimizer steps of the whole run.
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


class LearningRateSchedule:
    """The learning rate of each optimizer step of a run."""

    def __init__(self, config: PretrainConfig, total_steps: int) -> None:
        """Take the schedule of a configuration for a run of `total_steps`."""
        self._peak, self._total_steps = config.peak_learning_rate, total_steps
        self._factor = partial(
            lr_factor,
            warmup_steps=warmup_steps(config, total_steps),
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
                --max-time set them.
        """
        if decay_window is None:
            return self._peak * self._factor(step, total_steps=self._total_steps)
        begin, end = decay_window
        # A decay that begins inside the warm-up or the planned decay starts from the rate reached there.
        reached = self._factor(begin, total_steps=self._total_steps)
        decayed = self._factor(step, total_steps=end, warmup_steps=0, decay_steps=end - begin)
        return self._peak * reached * decayed


def warmup_steps(config: PretrainConfig, total_steps: int) -> int:
    """Return the number of warm-up steps of a run."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return min(DEFAULT_WARMUP_LIMIT, round(DEFAULT_WARMUP_SHARE * total_steps))


def stable_phase(
    config: PretrainConfig, total_steps: int, decay_window: tuple[int, int] | None = None
) -> tuple[int, int] | None:
    """Return between which numbers of steps a run is past its warm-up and not yet decaying.

    Args:
        config: of the run.
        total_steps: optimizer steps of the whole run.
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
