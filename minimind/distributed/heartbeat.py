"""Heartbeats of all ranks over the launcher's TCPStore.

Each process increments its own counter there in a thread and reads the counters of the others. Unlike a
collective operation this works before the process group exists, while data is tokenized, and while the main
thread is blocked in an operation that another process never joins.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta

from torch import distributed as dist

from ..errors import RankError
from ..launch_env import launcher_has_store, restarts, world_size

# Key by which processes that the launcher restarts see that earlier ones started the run.
_STARTED = "minimind/started"

# A store that does not answer within this time counts as lost.
CONNECT_SECONDS = 3.0
INTERVAL_SECONDS = 1.0
# With more processes than this the interval grows, so that the load of the store stays the same.
_PROCESSES_PER_INTERVAL = 16
# Before the watchdog ends a process, its main thread has this long to raise: the error of its operation says
# more.
GRACE_SECONDS = 5.0
# The launcher sends SIGKILL 30 s after SIGTERM.
SHUTDOWN_SECONDS = 15.0


def launcher_store(timeout: float = CONNECT_SECONDS) -> dist.TCPStore:
    """Connect to the launcher's rendezvous store; `timeout` in seconds also limits each request.

    Raises:
        RuntimeError: when no store answers.
    """
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout),
    )


class Heartbeat:
    """Context manager that sends heartbeats of this process and records those of the others.

    Attributes:
        interval: seconds between two heartbeats.
    """

    def __init__(self, prefix: str, rank: int, num_processes: int) -> None:
        """Prepare; the thread starts on entering.

        Args:
            prefix: of the keys in the store; the same in all processes, and unused before.
            num_processes: number of participants.
        """
        self.prefix, self.rank = prefix, rank
        self.others = sorted(set(range(num_processes)) - {rank})
        self.interval = INTERVAL_SECONDS * max(1.0, num_processes / _PROCESSES_PER_INTERVAL)
        self._counts = dict.fromkeys(self.others, 0)
        self._last_seen: dict[int, float] = {}
        self._errors: dict[int, tuple[float, str]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._last_seen = dict.fromkeys(self.others, time.monotonic())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        # The thread may be waiting for a store that is gone; it is a daemon and can be left behind.
        self._thread.join(timeout=1.0)

    def missed(self, seconds: float) -> list[int]:
        """Return the ranks whose last heartbeat is more than `seconds` old."""
        now = time.monotonic()
        return [rank for rank in self.others if now - self._last_seen[rank] > seconds]

    def failed(self, seconds: float = 0.0) -> dict[int, str]:
        """Return the errors that other ranks posted at least `seconds` ago, by rank."""
        now = time.monotonic()
        return {rank: error for rank, (at, error) in self._errors.items() if error and now - at >= seconds}

    def wait_for(self, key: str, ranks: list[int], timeout: float) -> bytes:
        """Return the value of a key of the store, waiting for it while `ranks` send heartbeats.

        Raises:
            RankError: when a rank failed, or one of `ranks` sent no heartbeat for `timeout` seconds.
        """
        while True:
            with suppress(RuntimeError):
                store = launcher_store()
                while True:
                    if store.check([key]):
                        return store.get(key)
                    self._check_alive(ranks, timeout)
                    time.sleep(min(0.2, self.interval))
            # The store does not answer: all heartbeats are missing, and soon for long enough.
            self._check_alive(ranks, timeout)

    def _check_alive(self, ranks: list[int], timeout: float) -> None:
        if failed := self.failed():
            raise RankError(f"{describe_failed(failed)}; rank {self.rank} stopped.")
        if lost := [rank for rank in self.missed(timeout) if rank in ranks]:
            raise RankError(f"{describe_lost(lost)}; rank {self.rank} stopped.")

    def _run(self) -> None:
        store: dist.TCPStore | None = None
        while True:
            try:
                store = launcher_store() if store is None else store
                self._exchange(store)
            except RuntimeError:
                store = None
            if self._stop.wait(self.interval):
                return

    def _exchange(self, store: dist.TCPStore) -> None:
        store.add(f"{self.prefix}/heartbeat/{self.rank}", 1)
        for other in self.others:
            # Adding 0 reads a counter without waiting until it exists.
            count = store.add(f"{self.prefix}/heartbeat/{other}", 0)
            if count != self._counts[other]:
                self._counts[other], self._last_seen[other] = count, time.monotonic()
            key = error_key(self.prefix, other)
            if other not in self._errors and store.check([key]):
                self._errors[other] = (time.monotonic(), store.get(key).decode())


def error_key(prefix: str, rank: int) -> str:
    """Return the key of a process's error message; the message is empty if it only lost its connection."""
    return f"{prefix}/error/{rank}"


def post_error(prefix: str, rank: int, message: str) -> None:
    """Store the reason why this process ends, if the store still answers."""
    with suppress(RuntimeError, KeyError):
        launcher_store().set(error_key(prefix, rank), message)


def format_error(error: Exception) -> str:
    """Return the type of an error and the first line of its message, without a final full stop."""
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")


def describe_failed(failed: Mapping[int, str]) -> str:
    """Return a clause that names the ranks that raised, and their errors."""
    return "; ".join(f"rank {rank} failed with {error}" for rank, error in sorted(failed.items()))


def describe_lost(ranks: Iterable[int]) -> str:
    """Return a clause that names the ranks that ended or hang without posting an error."""
    names = ", ".join(map(str, sorted(ranks)))
    return f"rank {names} no longer answers: it was killed, hangs, or its machine cannot be reached"


@contextmanager
def watchdog(
    heartbeat: Heartbeat, timeout: float, end: Callable[[str], None], *, shutting_down: Callable[[], bool]
) -> Iterator[None]:
    """End this process when another one is lost while the main thread is blocked inside this context.

    Args:
        timeout: seconds without a heartbeat after which a process is lost.
        end: called once, from a thread, with a sentence that names the lost rank.
        shutting_down: whether this process was asked to stop, which shortens the timeout.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(min(INTERVAL_SECONDS, timeout / 10)):
            if failed := heartbeat.failed(GRACE_SECONDS):
                problem = describe_failed(failed)
            elif lost := heartbeat.missed(min(SHUTDOWN_SECONDS, timeout) if shutting_down() else timeout):
                problem = describe_lost(lost)
            else:
                continue
            end(f"{problem}; rank {heartbeat.rank} stopped.")
            return

    threading.Thread(target=watch, name="watchdog", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def started_before() -> bool:
    """Whether earlier processes of this launch started the run, so that its folder belongs to this launch.

    A launcher also restarts processes that were refused, for example because the folder holds another run.
    """
    if not restarts():
        return False
    if launcher_has_store():
        with suppress(RuntimeError):
            return launcher_store().check([_STARTED])
    return True


def record_start() -> None:
    """Make `started_before` true for the processes that the launcher may start after these."""
    if launcher_has_store():
        with suppress(RuntimeError):
            launcher_store().set(_STARTED, "")


def first_choice(name: str, choice: str) -> str:
    """Return the value that the first process of this launch chose; `choice` if there is one process only.

    For what other processes, or those started by a restart, might choose differently.
    """
    if world_size() > 1 and launcher_has_store():
        with suppress(RuntimeError):
            return launcher_store().compare_set(f"minimind/{name}", "", choice).decode()
    return choice
