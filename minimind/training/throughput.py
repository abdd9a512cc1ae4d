"""Throughput, remaining time, and time by phase.

On a GPU the host runs some steps ahead of the device, and the time to launch a step says little about its
duration. A report is therefore given the time when the device had computed the step
(`async_metrics.HostValues.time`), and the time between two reports is that of the steps between them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import psutil  # a dependency of Accelerate
import torch

# The first steps compile kernels, fill the allocator's pools and start the prefetch: none is typical.
WARMUP_STEPS = 3
# The estimate of the remaining time uses this many last report intervals.
RECENT_INTERVALS = 10
# Part of training time: the throughput of a run that waits for data must show it.
_WAITING = "data"


class _Mark(NamedTuple):
    """The clock and the counters at one moment."""

    time: float
    step: int
    tokens: int
    waiting: float
    excluded: float


class Meter:
    """Measures steps and tokens per second; create it just before the first step."""

    def __init__(
        self,
        flops_per_token: float,
        num_processes: int,
        peak_flops: float | None,
        total_steps: int,
        *,
        start_step: int = 0,
        intervals: Mapping[str, int] | None = None,
        device: torch.device | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start the clock.

        Args:
            flops_per_token: of forward and backward pass.
            peak_flops: of one device, see `peak_flops_of`; None reports no MFU.
            total_steps: steps of the whole run, for the remaining time.
            start_step: steps done before, on a resume.
            intervals: steps between phases by name, such as {"evaluation": 100, "saving": 1000}; the
                remaining time includes those to come, one of each after the last step.
            device: whose memory is reported; None or not CUDA for the memory of the process.
            clock: monotonic seconds.
        """
        self._flops_per_token = flops_per_token
        self._peak = None if peak_flops is None else peak_flops * num_processes
        self._total_steps = total_steps
        self._periods = dict(intervals or {})
        self._device = device
        self._clock = clock
        self._began = clock()
        self._start_step = self._step = start_step
        self._tokens = 0
        self._tokens_at: deque[tuple[int, int]] = deque()
        self._phase_seconds: dict[str, float] = {}
        self._phase_counts: dict[str, int] = {}
        self._mark: _Mark | None = None
        self._first_steps = 0.0
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT_INTERVALS)
        self._measured_tokens = 0
        self._measured_seconds = 0.0

    def end_at(self, total_steps: int) -> None:
        """Change the length of the run."""
        self._total_steps = total_steps

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside as `name`; phases do not nest.

        `data` is waiting for a batch and belongs to training. Any other phase (`evaluation`, `saving`,
        `compile`) does not count for the throughput.
        """
        began = self._clock()
        try:
            yield
        finally:
            self._phase_seconds[name] = self._phase_seconds.get(name, 0.0) + self._clock() - began
            self._phase_counts[name] = self._phase_counts.get(name, 0) + 1

    def step(self, num_tokens: int) -> None:
        """Count a step that the host has launched, with its tokens over all ranks, without padding."""
        self._step += 1
        self._tokens += num_tokens
        self._tokens_at.append((self._step, self._tokens))
        if self._mark is None and self._step - self._start_step == WARMUP_STEPS:
            self._begin_measuring(self._step, self._tokens, self._clock())

    def rewind(self, step: int) -> None:
        """Continue from an earlier step; the time of the steps beyond it stays in the totals."""
        self._step = step
        self._tokens_at = deque([(step, self._tokens)])
        self._mark = None if self._mark is None else self._marked(step, self._tokens, self._clock())

    def report(self, step: int, at: float | None = None) -> dict[str, float]:
        """Return the metrics of the interval that ends with `step`; call it when the step's values are read.

        Args:
            step: optimizer steps done.
            at: when the device had computed them, by the same clock; None for now.

        Returns:
            `elapsed` seconds since the start; `memory_gb` (10^9 bytes: the most allocated so far on a CUDA
            device, else the memory of this process now); and, as soon as an interval without the first
            steps lies behind: `tokens_per_second` over all processes, without evaluations and saving;
            `mfu`, the share of the devices' peak that the model's own arithmetic makes up, where the peak
            is known; `data_wait_seconds` and `data_wait`, the host's waiting for batches in seconds and
            as a share of the interval; `eta_seconds` to the end of the run.
        """
        tokens = self._tokens_up_to(step)
        now = self._clock() if at is None else at
        values = {"elapsed": now - self._began, "memory_gb": memory_gb(self._device)}
        if self._mark is None:
            self._begin_measuring(step, tokens, now)
        elif step > self._mark.step:
            mark, self._mark = self._mark, self._marked(step, tokens, now)
            seconds = max(self._mark.time - mark.time - (self._mark.excluded - mark.excluded), 1e-9)
            self._recent.append((step - mark.step, seconds))
            self._measured_tokens += tokens - mark.tokens
            self._measured_seconds += seconds
            waiting = self._mark.waiting - mark.waiting
            values |= self._speed((tokens - mark.tokens) / seconds)
            values |= {"data_wait_seconds": waiting, "data_wait": min(waiting / seconds, 1.0)}
        if self._recent:
            values["eta_seconds"] = self._time_left(step)
        return values

    def seconds_per_step(self) -> float | None:
        """Return the recent time of one step, None before the first whole interval."""
        steps = sum(steps for steps, _ in self._recent)
        return sum(seconds for _, seconds in self._recent) / steps if steps else None

    def seconds_of(self, phase: str) -> float:
        """Return the mean time of a phase, 0 where there was none yet."""
        count = self._phase_counts.get(phase, 0)
        return self._phase_seconds[phase] / count if count else 0.0

    def totals(self) -> dict[str, float]:
        """Return seconds by where they went, and the speed over the whole run.

        Returns:
            `elapsed`, and its parts: `first_steps`, `training`, and each phase seen (`data`, `evaluation`,
            `saving`, `compile`); `tokens_per_second` (and `mfu` where known) over all intervals measured,
            or with everything counted where a run was too short for one.
        """
        elapsed = self._clock() - self._began
        phases = sum(self._phase_seconds.values())
        training = max(elapsed - self._first_steps - phases, 0.0)
        values = {"elapsed": elapsed, "first_steps": self._first_steps, "training": training}
        values |= self._phase_seconds
        if self._measured_seconds:
            return values | self._speed(self._measured_tokens / self._measured_seconds)
        return values | self._speed(self._tokens / max(elapsed, 1e-9))

    def bottleneck(self, *, compiled: bool = True) -> str | None:
        """Return a sentence about what limited the speed, None where nothing did.

        Args:
            compiled: whether the model was compiled.
        """
        totals = self.totals()
        elapsed = max(totals["elapsed"], 1e-9)

        def share(name: str) -> float:
            return totals.get(name, 0.0) / elapsed

        set_up = "set up and compile" if compiled else "allocate memory and start the prefetch"
        advice = {
            "evaluation": (0.2, "Evaluation took {} of the time; a larger --eval-interval shortens it."),
            "saving": (0.1, "Saving took {} of the time; a larger --save-interval shortens it."),
            "data": (
                0.1,
                "Waiting for data took {} of the time; look at the speed of the disk that holds --cache-dir.",
            ),
            "first_steps": (0.3, f"The first steps, which {set_up}, took {{}} of the time."),
            "compile": (0.3, "Compiling took {} of the time."),
        }
        worst = max(advice, key=lambda name: share(name) / advice[name][0])
        limit, sentence = advice[worst]
        if share(worst) > limit:
            return sentence.format(f"{share(worst):.0%}")
        if "mfu" in totals and totals["mfu"] < 0.2:
            return (
                f"The training steps used {totals['mfu']:.0%} of the peak arithmetic; a larger --batch-size "
                "or a larger model uses more, as far as memory goes."
            )
        return None

    def _begin_measuring(self, step: int, tokens: int, now: float) -> None:
        # After WARMUP_STEPS launches this is the host's view, a step or two ahead of the device; from the
        # first report on, the marks are arrivals.
        self._mark = self._marked(step, tokens, now)
        phases = self._mark.excluded + self._mark.waiting
        self._first_steps = max(self._mark.time - self._began - phases, 0.0)

    def _marked(self, step: int, tokens: int, now: float) -> _Mark:
        waiting = self._phase_seconds.get(_WAITING, 0.0)
        excluded = sum(self._phase_seconds.values()) - waiting
        return _Mark(now, step, tokens, waiting, excluded)

    def _tokens_up_to(self, step: int) -> int:
        """Return the tokens of all steps up to `step`, which the host may have passed already."""
        while len(self._tokens_at) > 1 and self._tokens_at[1][0] <= step:
            self._tokens_at.popleft()
        return self._tokens_at[0][1] if self._tokens_at else 0

    def _speed(self, tokens_per_second: float) -> dict[str, float]:
        speed = {"tokens_per_second": tokens_per_second}
        if self._peak is not None:
            speed["mfu"] = tokens_per_second * self._flops_per_token / self._peak
        return speed

    def _time_left(self, step: int) -> float:
        left = (self._total_steps - step) * (self.seconds_per_step() or 0.0)
        for name, period in self._periods.items():
            if count := self._phase_counts.get(name):
                planned = -(-self._total_steps // period) - self._start_step // period
                left += max(planned - count, 0) * self.seconds_of(name)
        return left


def memory_gb(device: torch.device | None) -> float:
    """Return the peak allocation on a CUDA device, else the memory of the process, in 10^9 bytes."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9
