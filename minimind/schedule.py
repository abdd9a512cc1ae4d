"""The learning rate as a pure function of the optimizer step: nothing to carry along, nothing to save."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from .config import PretrainConfig

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
) -> float:
    """Return the learning rate of a step as a share of the peak.

    Warm-up is linear and its first step already learns: step s of w has (s + 1) / w, and step w - 1 the
    peak. From there the schedules fall so that the last step, `total_steps - 1`, has exactly
    `min_lr_ratio`:

    - `cosine`: half a cosine (Loshchilov and Hutter, SGDR, arXiv:1608.03983);
    - `linear`: a straight line;
    - `wsd`: the peak, then a decay over the last `decay_ratio` of the steps (Hu et al., MiniCPM,
      arXiv:2404.06395) that falls as 1 - sqrt, which Hägele et al. (arXiv:2405.18392) found best;
    - `constant`: the peak to the end; `min_lr_ratio` means nothing to it.

    A run that is shorter than its warm-up only warms up, and a run of one step has the peak.

    Args:
        step: from 0; beyond the last step the factor stays as it was there.
        total_steps: optimizer steps of the whole run.
        warmup_steps: 0 starts at the peak.
        schedule: one of the names above.
        min_lr_ratio: the factor at the end.
        decay_ratio: share of all steps that `wsd` decays; its decay never starts inside the warm-up.

    Raises:
        ValueError: for an unknown schedule.
    """
    if schedule not in ("cosine", "linear", "wsd", "constant"):
        raise ValueError(f"unknown schedule '{schedule}'")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    last = total_steps - 1
    peak = max(warmup_steps - 1, 0)
    if schedule == "wsd":
        peak = max(peak, last - max(round(decay_ratio * total_steps), 1))
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


def learning_rates(config: PretrainConfig, total_steps: int) -> Callable[[int], float]:
    """Return the function from optimizer step, from 0, to learning rate that a configuration asks for."""
    warmup = config.warmup_steps
    if warmup is None:
        warmup = min(DEFAULT_WARMUP_LIMIT, round(DEFAULT_WARMUP_SHARE * total_steps))
    factor = partial(
        lr_factor,
        total_steps=total_steps,
        warmup_steps=warmup,
        schedule=config.lr_schedule,
        min_lr_ratio=config.min_lr_ratio,
        decay_ratio=config.decay_ratio,
    )
    return lambda step: config.learning_rate * factor(step)
