"""Times of the phases of a step, for `bench`, `--plan` and `--batch-size auto`."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class PhaseMarks(Protocol):
    """What the forward and backward pass of a micro-batch reports to."""

    def mark(self, phase: str) -> None:
        """Note that a phase has ended."""


class StepTimer:
    """Times consecutive phases. On a GPU by CUDA events, which do not make the host wait.

    Call `start`, then `mark` at the end of each phase; call `seconds` at the end.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: Any = None
        self._spans: list[tuple[str, Any, Any]] = []

    def start(self) -> None:
        """Begin a phase now."""
        self._last = self._now()

    def mark(self, phase: str) -> None:
        """End a phase now; the next one begins."""
        self.mark_event(phase, self._now())

    def mark_event(self, phase: str, event: Any) -> None:
        """End a phase at an event that is recorded elsewhere, such as inside a CUDA graph."""
        self._spans.append((phase, self._last, event))
        self._last = event

    def resolve(self) -> None:
        """Wait for the device and read all events, so that they can be recorded again."""
        self.synchronize()
        self._spans = [
            (phase, 0.0, end - begin if isinstance(end, float) else begin.elapsed_time(end) / 1e3)
            for phase, begin, end in self._spans
        ]

    def seconds(self) -> dict[str, list[float]]:
        """Wait for the device and return the times of each phase, in order."""
        self.resolve()
        times: dict[str, list[float]] = {}
        for phase, _, spent in self._spans:
            times.setdefault(phase, []).append(spent)
        return times

    def synchronize(self) -> float:
        """Wait for the device and return the host's clock in seconds."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return self.synchronize()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
