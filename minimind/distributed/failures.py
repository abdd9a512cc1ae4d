"""Several processes as one run: found to be alike at the start, and named when one of them fails."""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import distributed as dist

from ..errors import RankError
from ..launch_env import restarts
from .heartbeat import (
    Heartbeat,
    Watchdog,
    describe_failed,
    describe_lost,
    format_error,
    launcher_store,
    note_key,
    post_error,
)
from .shutdown import StopRequest

# A process that failed tells the others in this time. The launcher kills 30 s after its SIGTERM.
SECONDS_TO_TELL = 3.0


@contextmanager
def report_peer_failures(accelerator: Accelerator) -> Iterator[str]:
    """Turn the loss of another process inside this block into an error that says which one, and why.

    A process that fails by itself leaves a note where the processes met, and its error goes on as it is. One
    that lost touch with the others looks there: who left a note failed, who left none no longer runs.

    Yields the place in the launcher's store where the notes of this run are, for `watch_peers`.

    Raises:
        RankError: instead of the error of a collective operation.
    """
    if accelerator.num_processes == 1:
        yield ""
        return
    place = f"minimind/{os.environ.get('TORCHELASTIC_RUN_ID')}/{restarts()}"
    try:
        # Agreed upon: machines may count restarts differently, and notes of earlier processes are kept.
        place = broadcast_object_list([f"minimind/{uuid.uuid4().hex}"])[0]
        yield place
    except Exception as error:
        lost = _is_lost_touch(error)
        post_error(place, accelerator.process_index, "" if lost else format_error(error))
        if not lost:
            raise
        raise RankError(_what_happened(accelerator, _notes(accelerator, place), error)) from error


@contextmanager
def watch_peers(
    accelerator: Accelerator, place: str, patience: float, stop: StopRequest, last: Callable[[], object]
) -> Iterator[None]:
    """End this process when another one is lost while the main thread is stuck inside this block.

    An operation over NCCL that a process is missing from neither returns nor raises.

    Args:
        accelerator: of this run.
        place: from `report_peer_failures`.
        patience: seconds of a collective operation; a process that is silent for 0.9 of them is lost, and one
            that is silent while this one was asked to stop, as a launcher does when a process died, sooner.
        stop: tells whether this process was asked to stop.
        last: done before the end, such as waiting for a checkpoint that is being written.
    """
    if accelerator.num_processes == 1:
        yield
        return

    def end(what: str) -> None:
        last()
        prefix = "" if accelerator.is_main_process else f"rank {accelerator.process_index}: "
        print(f"{prefix}error: {what}", file=sys.stderr, flush=True)
        os._exit(1)

    with Heartbeat(place, accelerator.process_index, accelerator.num_processes) as roll:
        with Watchdog(roll, 0.9 * patience, end, shutting_down=lambda: stop.reason is not None):
            yield


def _is_lost_touch(error: Exception) -> bool:
    """Whether an error comes from a collective operation. Gloo raises no type of its own."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )


def _notes(accelerator: Accelerator, place: str) -> dict[int, str]:
    """Return the notes of the others by rank, waiting a while: empty where one lost touch too."""
    found: dict[int, str] = {}
    others = set(range(accelerator.num_processes)) - {accelerator.process_index}
    # The store may have gone down with the process or machine that held it: then nobody can tell anything.
    with suppress(RuntimeError, KeyError):
        store = launcher_store()
        deadline = time.monotonic() + SECONDS_TO_TELL
        while others - found.keys() and time.monotonic() < deadline:
            for rank in others - found.keys():
                if store.check([note_key(place, rank)]):
                    found[rank] = store.get(note_key(place, rank)).decode()
            time.sleep(0.05)
    return found


def _what_happened(accelerator: Accelerator, others: Mapping[int, str], error: Exception) -> str:
    mine = f"rank {accelerator.process_index} went on no further"
    if failed := {rank: note for rank, note in others.items() if note}:
        return f"{describe_failed(failed)}; {mine}."
    if ranks := set(range(accelerator.num_processes)) - {accelerator.process_index} - others.keys():
        return f"{describe_lost(ranks)}; {mine} ({_short(error)})."
    return f"the processes lost touch with each other; {mine} ({_short(error)})."


def _short(error: Exception) -> str:
    """Return the part of an error of gloo after the place in its source."""
    return str(error).splitlines()[0].rpartition("] ")[2].strip(" .")
