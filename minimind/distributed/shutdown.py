"""Graceful shutdown on SIGINT, SIGTERM or a time limit."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# SIGBREAK is Ctrl-Break of Windows.
SIGNALS = tuple(name for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name))

# A launcher forwards a Ctrl-C that the terminal has already sent to every process: a signal repeated within
# this time is the same request.
ECHO_SECONDS = 3.0


class StopRequest:
    """Records that this process should stop: on a signal, at a time limit, or by `request`.

    As a context manager it handles SIGINT and SIGTERM. The first signal is only recorded: the loop finishes
    the step, all processes agree, the state is saved; tokenization ends at once, and so does the process
    inside `default_handlers`. A second signal exits immediately, with the exit code that shells use for the
    signal (128 + its number).

    Args:
        max_seconds: time limit, counted from `started`; None for no limit.
        started: reading of `clock` at the start.
        clock: seconds, monotonic.

    Attributes:
        has_launcher: False once `launcher_lost` was called.
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
        self._requested: str | None = None
        self.has_launcher = True
        self._signalled_at = 0.0
        self._previous: dict[int, Any] = {}
        # The only queue whose `put` a signal handler may call.
        self._signals: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._finished = False

    @property
    def reason(self) -> str | None:
        """Why to stop, such as `SIGTERM` or `--max-time`; None without a reason."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if self._requested is not None:
            return self._requested
        if self._deadline is not None and self._clock() >= self._deadline:
            return "--max-time"
        return None

    def seconds_left(self) -> float | None:
        """Return the seconds until the time limit, None without one."""
        return None if self._deadline is None else self._deadline - self._clock()

    def request(self, reason: str) -> None:
        """Ask for a stop from inside the program; thread-safe."""
        self._requested = reason

    def launcher_lost(self) -> None:
        """Ask for a stop because the launcher ended, and its store with it; thread-safe."""
        self.has_launcher = False
        self.request("the end of its launcher")

    def finish(self) -> None:
        """Announce no further signal: there is no step left after which to stop."""
        self._finished = True

    @contextmanager
    def announced(self, show: Callable[[str], object]) -> Iterator[None]:
        """Call `show` with a sentence as soon as a signal asks to stop, from another thread."""

        def announce() -> None:
            if (name := self._signals.get()) is not None and not self._finished:
                again = "press Ctrl-C again" if name == "SIGINT" else f"send {name} again"
                show(f"Stopping after this step and saving; {again} to quit without saving.")

        thread = threading.Thread(target=announce, name="signals", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._signals.put(None)
            thread.join()

    @contextmanager
    def default_handlers(self) -> Iterator[None]:
        """Restore the default signal handlers, which end the process at once.

        For blocking C++ calls, during which Python runs no handler, and with nothing to save.

        Raises:
            KeyboardInterrupt: where a signal arrived before.
        """
        for number in self._previous:
            signal.signal(number, signal.SIG_DFL)
        try:
            self.exit_if_signalled()
            yield
        finally:
            for number in self._previous:
                signal.signal(number, self._handle)

    def exit_if_signalled(self) -> None:
        """End the program if a signal arrived or the launcher ended; for code with nothing to save.

        Raises:
            KeyboardInterrupt: in both cases.
        """
        if self._signal is not None or not self.has_launcher:
            raise KeyboardInterrupt

    def __enter__(self) -> StopRequest:
        # Only the main thread can set signal handlers; a run in another thread has none.
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                number = getattr(signal, name)
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._signal is None:
            self._signal, self._signalled_at = number, self._clock()
            self._signals.put(signal.Signals(number).name)
            return
        echo = "WORLD_SIZE" in os.environ and self._clock() - self._signalled_at < ECHO_SECONDS
        if number == self._signal and not echo:
            # Skip threads and exit handlers, which could delay the exit. Files are written under temporary
            # names and renamed when complete, so nothing is left half-written.
            sys.stderr.flush()
            os._exit(128 + number)
