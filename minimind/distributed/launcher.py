"""Stops a run whose launcher was killed: nothing else would end its processes."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from ..launch_env import launcher_has_store, num_machines
from .shutdown import StopRequest

PARENT_SECONDS = 1.0
STORE_SECONDS = 5.0
# The store of a busy machine may answer late.
STORE_LOST_SECONDS = 9.0


@contextmanager
def watch_launcher(stop: StopRequest) -> Iterator[None]:
    """Ask for a stop when the launcher of this process ends while this context is active.

    A launcher that gets SIGKILL, for example from the out-of-memory killer, cannot end its processes. They
    see that they have another parent or, where a script stands between launcher and process, that the
    launcher's store on this machine no longer answers.
    """
    if not _has_launcher():
        yield
        return
    over = threading.Event()
    arguments = (stop, os.getppid(), over)
    threading.Thread(target=_watch, args=arguments, name="launcher watchdog", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _has_launcher() -> bool:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    # For one process `accelerate launch` does without torch's launcher; anyone may set its variables.
    try:
        parent = " ".join(psutil.Process(os.getppid()).cmdline())
    except psutil.Error:
        return False
    return "ACCELERATE_MIXED_PRECISION" in os.environ and "accelerate" in parent


def _watch(stop: StopRequest, parent: int, over: threading.Event) -> None:
    # The store of several machines is on one of them, where its loss may be that of the network.
    check_store = launcher_has_store() and num_machines() == 1
    answered = checked = time.monotonic()
    while not over.wait(PARENT_SECONDS):
        now = time.monotonic()
        if check_store and now - checked >= STORE_SECONDS:
            # A plain connection: a failed one of TCPStore prints a stack trace.
            with suppress(OSError):
                address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
                socket.create_connection(address, timeout=STORE_SECONDS).close()
                answered = time.monotonic()
            checked = time.monotonic()
        # On Windows a process keeps the number of a parent that has ended.
        if os.getppid() != parent or not psutil.pid_exists(parent) or checked - answered > STORE_LOST_SECONDS:
            stop.launcher_lost()
            return
