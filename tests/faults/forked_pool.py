"""A pool of forked processes, which start with all that the parent has imported."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Work = Callable[[int, Path], dict[str, Any]]
Done = Callable[[dict[str, Any], int], None]


class Pool:
    """Runs functions in forked processes, so many at a time.

    Attributes:
        slots: numbers of the places at work; a function is given the one that it has to itself.
    """

    def __init__(self, jobs: int, folder: Path) -> None:
        self.free, self._folder = list(range(jobs)), folder
        self._running: dict[int, tuple[int, Path, Done, float]] = {}

    def submit(self, work: Work, done: Done, limit: float) -> None:
        """Run `work(slot, folder)` once a slot is free, and later `done(result, slot)` in this process.

        After `limit` seconds the process is killed with all that it has started.
        """
        while not self.free:
            self._collect()
        slot = self.free.pop()
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            _work(work, slot, folder)
        self._running[child] = slot, folder, done, time.monotonic() + limit

    def wait(self) -> None:
        """Wait for all."""
        while self._running:
            self._collect()

    def _collect(self) -> None:
        """Take in the processes that have ended; end those that have run out of time."""
        for child, (slot, folder, done, deadline) in list(self._running.items()):
            if time.monotonic() > deadline:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                del self._running[child]
                # Processes that a killed test has left behind.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(child, signal.SIGKILL)
                file = folder / "result.json"
                result = json.loads(file.read_text()) if file.exists() else {"code": f"ended by {status}"}
                self.free.append(slot)
                done(result, slot)
                shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.02)


def _work(work: Work, slot: int, folder: Path) -> None:
    """Do the work of a forked process, which never returns."""
    os.setsid()
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 1
    try:
        result = json.dumps(work(slot, folder))
        (folder / "result.tmp").write_text(result)
        (folder / "result.tmp").rename(folder / "result.json")
        code = 0
    finally:
        os._exit(code)
