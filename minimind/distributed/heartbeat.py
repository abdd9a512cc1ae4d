"""Which of a run's processes still live: told through the store that the launcher keeps for them to meet.

Each process counts up a number of its own there, in a thread, and looks at the numbers of the others. Unlike
a collective operation this works before the processes are joined, however long one of them prepares its data,
and while the main thread is stuck in an operation that another process will never take part in.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import timedelta

from torch import distributed as dist

from ..errors import RankError
from ..launch_env import meets_at_launcher, restarts, world_size

# Where the launcher's store tells its later processes that earlier ones have begun the run.
_BEGUN = "minimind/begun"


# A store that does not answer in this time is taken for lost.
CONNECT_SECONDS = 3.0
BEAT_SECONDS = 1.0
# So many processes share the rate of one, or the store of many would do nothing else.
_PROCESSES_PER_BEAT = 16


def launcher_store(timeout: float = CONNECT_SECONDS) -> dist.TCPStore:
    """Connect to the store in which the processes meet; `timeout` in seconds also holds for its answers.

    Raises:
        RuntimeError: where nobody keeps it any more, or not yet.
    """
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout),
    )


class Heartbeat:
    """Tells the others that this process lives, and knows since when each of them has been silent.

    Attributes:
        interval: seconds between two beats.
    """

    def __init__(self, place: str, rank: int, num_processes: int) -> None:
        """Say nothing yet.

        Args:
            place: prefix of the keys in the store, the same in all processes and in no earlier call.
            rank: of this process.
            num_processes: that take part.
        """
        self.place, self.rank = place, rank
        self.others = sorted(set(range(num_processes)) - {rank})
        self.interval = BEAT_SECONDS * max(1.0, num_processes / _PROCESSES_PER_BEAT)
        self._beats = dict.fromkeys(self.others, 0)
        self._heard: dict[int, float] = {}
        self._notes: dict[int, tuple[float, str]] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._call, name="roll call", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._heard = dict.fromkeys(self.others, time.monotonic())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        # It may be waiting for a store that is gone; nothing is lost by leaving it there.
        self._thread.join(timeout=1.0)

    def silent(self, seconds: float) -> list[int]:
        """Return the ranks that have not been heard of for so long."""
        now = time.monotonic()
        return [rank for rank in self.others if now - self._heard[rank] > seconds]

    def failed(self, seconds: float = 0.0) -> dict[int, str]:
        """Return by rank why processes failed by themselves, of those that said so `seconds` ago or more."""
        now = time.monotonic()
        return {rank: note for rank, (at, note) in self._notes.items() if note and now - at >= seconds}

    def wait_for(self, key: str, ranks: list[int], patience: float) -> bytes:
        """Return the value of a key of the store, waiting for it as long as `ranks` live.

        Raises:
            RankError: when one of them failed, or was silent for `patience` seconds.
        """
        while True:
            with suppress(RuntimeError):
                store = launcher_store()
                while True:
                    if store.check([key]):
                        return store.get(key)
                    self._refuse_loss(ranks, patience)
                    time.sleep(min(0.2, self.interval))
            # The store is out of reach: so is everyone, and soon long enough.
            self._refuse_loss(ranks, patience)

    def _refuse_loss(self, ranks: list[int], patience: float) -> None:
        if failed := self.failed():
            raise RankError(f"{describe_failed(failed)}; rank {self.rank} went on no further.")
        if silent := [rank for rank in self.silent(patience) if rank in ranks]:
            raise RankError(f"{describe_lost(silent)}; rank {self.rank} went on no further.")

    def _call(self) -> None:
        store: dist.TCPStore | None = None
        while True:
            try:
                store = launcher_store() if store is None else store
                self._exchange(store)
            except RuntimeError:
                store = None
            if self._over.wait(self.interval):
                return

    def _exchange(self, store: dist.TCPStore) -> None:
        store.add(f"{self.place}/beat/{self.rank}", 1)
        for other in self.others:
            # Adding nothing reads a number without waiting for it to be there.
            beats = store.add(f"{self.place}/beat/{other}", 0)
            if beats != self._beats[other]:
                self._beats[other], self._heard[other] = beats, time.monotonic()
            if other not in self._notes and store.check([note_key(self.place, other)]):
                note = store.get(note_key(self.place, other)).decode()
                self._notes[other] = (time.monotonic(), note)


def note_key(place: str, rank: int) -> str:
    """Return where a process that ends leaves the reason, empty where it only lost touch with the others."""
    return f"{place}/note/{rank}"


def post_error(place: str, rank: int, note: str) -> None:
    """Leave the reason why this process ends, if anybody still keeps the store."""
    with suppress(RuntimeError, KeyError):
        launcher_store().set(note_key(place, rank), note)


def format_error(error: Exception) -> str:
    """Return an error as a note, to stand in a sentence: its type and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")


def describe_failed(failed: Mapping[int, str]) -> str:
    """Return words for processes that failed by themselves."""
    return "; ".join(f"rank {rank} failed with {note}" for rank, note in sorted(failed.items()))


def describe_lost(ranks: Iterable[int]) -> str:
    """Return words for processes that said nothing before they ended."""
    names = ", ".join(map(str, sorted(ranks)))
    return f"rank {names} no longer answers: it was killed, hangs, or its machine cannot be reached"


class Watchdog:
    """Ends this process when another one is lost and the main thread does not notice."""

    # A main thread that is told of the loss by its own operation says more than this thread can.
    GRACE_SECONDS = 5.0
    # The launcher kills 30 s after its SIGTERM.
    HURRY_SECONDS = 15.0

    def __init__(
        self,
        roll: Heartbeat,
        patience: float,
        end: Callable[[str], None],
        *,
        shutting_down: Callable[[], bool],
    ) -> None:
        """Watch nothing yet.

        Args:
            roll: who is there.
            patience: seconds that a process may be silent.
            end: called from a thread with a sentence as soon as another process is lost.
            hurried: whether this process was asked to stop, and should not wait so long.
        """
        self._roll, self._patience, self._end, self._hurried = roll, patience, end, shutting_down
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _look(self) -> None:
        while not self._over.wait(min(BEAT_SECONDS, self._patience / 10)):
            patience = min(self.HURRY_SECONDS, self._patience) if self._hurried() else self._patience
            if failed := self._roll.failed(self.GRACE_SECONDS):
                what = describe_failed(failed)
            elif silent := self._roll.silent(patience):
                what = describe_lost(silent)
            else:
                continue
            self._end(f"{what}; rank {self._roll.rank} went on no further.")
            return


def begun_before() -> bool:
    """Whether earlier processes of this launch have begun the run: what lies in its folder is its own then.

    A launcher also starts processes anew that were refused, such as for a folder that holds another run.
    """
    if not restarts():
        return False
    if meets_at_launcher():
        with suppress(RuntimeError):
            return launcher_store().check([_BEGUN])
    return True


def note_begun() -> None:
    """Have `begun_before` be true for the processes that the launcher may start after these."""
    if meets_at_launcher():
        with suppress(RuntimeError):
            launcher_store().set(_BEGUN, "")


def first_choice(name: str, choice: str) -> str:
    """Return what the first process of this launch that asked had chosen; `choice` where there is one only.

    For what may look otherwise to another process, or to those that the launcher starts anew.

    Args:
        name: of what is chosen.
        choice: of this process.
    """
    if world_size() > 1 and meets_at_launcher():
        with suppress(RuntimeError):
            return launcher_store().compare_set(f"minimind/{name}", "", choice).decode()
    return choice
