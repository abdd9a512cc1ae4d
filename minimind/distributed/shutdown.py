"""Ending a run early in good order: signals and a time limit, noted here, acted on between steps."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

SIGNALS = ("SIGINT", "SIGTERM")

# A launcher passes on a Ctrl-C that the terminal has already sent to every process: two signals, one wish.
ECHO_SECONDS = 3.0


class StopRequest:
    """Remembers that this process was asked to stop, by a signal or by the clock.

    As a context manager it takes over SIGINT and SIGTERM. The first one is only noted: the loop ends the
    step, all processes agree, the state is saved; while text is tokenized the run ends there. A second one
    leaves at once, with the exit code that shells give for the signal (128 + its number).

    Args:
        max_seconds: stop by itself so long after `started`; None for never.
        started: reading of `clock` from which the time counts.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        max_seconds: float | None = None,
        *,
        started: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._deadline = (
            None if max_seconds is None else max_seconds + (clock() if started is None else started)
        )
        self._signal: int | None = None
        self._asked: str | None = None
        self._noted_at = 0.0
        self._previous: dict[int, Any] = {}

    @property
    def reason(self) -> str | None:
        """Why to stop, such as `SIGTERM` or `--max-time`; None while nobody asked."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if self._asked is not None:
            return self._asked
        if self._deadline is not None and self._clock() >= self._deadline:
            return "--max-time"
        return None

    def seconds_left(self) -> float | None:
        """Return the time to the limit, None without one."""
        return None if self._deadline is None else self._deadline - self._clock()

    def ask(self, reason: str) -> None:
        """Wish for a stop from inside the program; callable from any thread."""
        self._asked = reason

    def exit_if_signalled(self) -> None:
        """End the program where a signal has asked to stop, from a place with nothing to save.

        Raises:
            KeyboardInterrupt: for any signal.
        """
        if self._signal is not None:
            raise KeyboardInterrupt

    def __enter__(self) -> StopRequest:
        # Python lets only the main thread set handlers; a run inside another thread goes without.
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                number = getattr(signal, name)
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self._signal is None:
            self._signal, self._noted_at = number, self._clock()
            return
        echo = "WORLD_SIZE" in os.environ and self._clock() - self._noted_at < ECHO_SECONDS
        if number == self._signal and not echo:
            # Nothing may delay the exit here, neither threads nor handlers at exit. What is being written
            # lies beside its place until it is whole.
            sys.stderr.flush()
            os._exit(128 + number)
