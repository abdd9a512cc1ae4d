"""Numbers computed on a device, read on the host without making either wait."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

Tag = TypeVar("Tag")

# Puts between that of a value and its arrival, where a device works beside the host.
DELAY_STEPS = 2


@dataclass(frozen=True)
class HostValues(Generic[Tag]):
    """Values that have come to the host.

    Attributes:
        tag: what they were put with.
        values: the numbers, flattened.
        time: reading of the clock when the device had made them, which on a GPU is before they are read.
    """

    tag: Tag
    values: list[float]
    time: float


class AsyncScalars(Generic[Tag]):
    """A queue of small device tensors on their way to the host, read a fixed number of puts later.

    Reading a value at once (`tensor.item()`) would make the host wait for the device, and the device then
    for the host's next launch. Here a copy to pinned memory is enqueued behind the work that makes the
    values, and read when `lag` further puts have been made: by then the copy has long ended while the
    device still has the later steps to do. The lag is a number, not a poll, so that all processes of a run
    see the same value at the same step and decide alike.
    """

    def __init__(
        self, device: torch.device, lag: int = DELAY_STEPS, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._lag = lag if device.type == "cuda" else 0
        self._clock = clock
        self._pending: deque[tuple[Tag, torch.Tensor, torch.cuda.Event | float]] = deque()
        self._previous: tuple[torch.cuda.Event, float] | None = None

    def put(self, tag: Tag, values: torch.Tensor) -> None:
        """Start the way of `values` (any shape) to the host; `tag` comes back with them."""
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
        """Return how many puts have not arrived."""
        return len(self._pending)

    def clear(self) -> None:
        """Forget what has not arrived."""
        self._pending.clear()

    def arrived(self, *, everything: bool = False) -> Iterator[HostValues[Tag]]:
        """Yield what was put at least `lag` puts ago, oldest first; or wait for everything."""
        while len(self._pending) > (0 if everything else self._lag):
            tag, host, made = self._pending.popleft()
            moment = made if isinstance(made, float) else self._moment(made)
            yield HostValues(tag, host.flatten().tolist(), moment)

    def _moment(self, event: torch.cuda.Event) -> float:
        """Wait for an event and return when it was, as the device measures time since the last one."""
        event.synchronize()
        if self._previous is None:
            moment = self._clock()
        else:
            earlier, then = self._previous
            moment = then + earlier.elapsed_time(event) / 1000
        self._previous = event, moment
        return moment
