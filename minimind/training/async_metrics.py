"""Non-blocking device-to-host copies of scalar metrics."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

Tag = TypeVar("Tag")

# On a GPU a value is read this many steps after it was enqueued.
DELAY_STEPS = 2


@dataclass(frozen=True)
class HostValues(Generic[Tag]):
    """Values on the host.

    Attributes:
        time: the clock's reading when the device had computed them, which on a GPU is before they are read.
    """

    tag: Tag
    values: list[float]
    time: float


class AsyncScalars(Generic[Tag]):
    """A queue of small device tensors, each read a fixed number of enqueued tensors later.

    Reading a value at once (`tensor.item()`) would make the host wait for the device, and then the device for
    the host's next launch. Instead a copy to pinned memory is enqueued on the stream, and read when `delay`
    further tensors have been enqueued: the copy is complete by then, while the device still computes later
    steps. The delay is a fixed number, not a poll, so that all ranks read the same value at the same step.
    """

    def __init__(
        self, device: torch.device, delay: int = DELAY_STEPS, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._delay = delay if device.type == "cuda" else 0
        self._clock = clock
        self._pending: deque[tuple[Tag, torch.Tensor, torch.cuda.Event | float]] = deque()
        self._previous: tuple[torch.cuda.Event, float] | None = None

    def enqueue(self, tag: Tag, values: torch.Tensor) -> None:
        """Start the copy of `values` (any shape) to the host; `tag` is returned with them."""
        values = values.detach()
        if values.device.type != "cuda":
            self._pending.append((tag, values.cpu().clone(), self._clock()))
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._pending.append((tag, host, event))

    def __len__(self) -> int:
        """Return how many tensors have not been read."""
        return len(self._pending)

    def clear(self) -> None:
        """Drop what has not been read."""
        self._pending.clear()

    def ready(self, *, everything: bool = False) -> Iterator[HostValues[Tag]]:
        """Yield what was enqueued at least `delay` tensors ago, oldest first; or wait for everything."""
        while len(self._pending) > (0 if everything else self._delay):
            tag, host, made = self._pending.popleft()
            when = made if isinstance(made, float) else self._time_of(made)
            yield HostValues(tag, host.flatten().tolist(), when)

    def _time_of(self, event: torch.cuda.Event) -> float:
        """Wait for an event and return its time: that of the previous one plus the measured difference."""
        event.synchronize()
        if self._previous is None:
            when = self._clock()
        else:
            earlier, then = self._previous
            when = then + earlier.elapsed_time(event) / 1000
        self._previous = event, when
        return when
