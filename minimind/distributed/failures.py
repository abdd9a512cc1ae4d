"""Error reports that name the rank that failed, and the end of processes whose peers are lost."""

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
    describe_failed,
    describe_lost,
    error_key,
    format_error,
    launcher_store,
    post_error,
    watchdog,
)
from .shutdown import StopRequest

# How long a process waits for the error messages of the others.
ERROR_SECONDS = 3.0


@contextmanager
def report_peer_failures(accelerator: Accelerator) -> Iterator[str]:
    """Replace the error of a collective operation by one that names the rank that failed, and why.

    A process that raises posts its error to the launcher's store. A process whose collective operation fails
    reads the errors there: a rank that posted one failed, a rank that posted nothing no longer runs.

    Yields the prefix of this run's keys in the store, for `watch_peers`.

    Raises:
        RankError: in place of the error of a collective operation.
    """
    if accelerator.num_processes == 1:
        yield ""
        return
    prefix = f"minimind/{os.environ.get('TORCHELASTIC_RUN_ID')}/{restarts()}"
    try:
        # Broadcast: machines may count restarts differently, and the store keeps errors of earlier processes.
        prefix = broadcast_object_list([f"minimind/{uuid.uuid4().hex}"])[0]
        yield prefix
    except Exception as error:
        lost_connection = _is_lost_connection(error)
        message = "" if lost_connection else format_error(error)
        post_error(prefix, accelerator.process_index, message)
        if not lost_connection:
            raise
        raise RankError(_describe(accelerator, _peer_errors(accelerator, prefix), error)) from error


@contextmanager
def watch_peers(
    accelerator: Accelerator, prefix: str, timeout: float, stop: StopRequest, last: Callable[[], object]
) -> Iterator[None]:
    """End this process when another one is lost while the main thread is blocked inside this context.

    An NCCL operation that a process does not join neither returns nor raises.

    Args:
        prefix: from `report_peer_failures`.
        timeout: seconds of a collective operation. A process without a heartbeat for 0.9 of it is lost; less
            once this process was asked to stop, which launchers do when a process died.
        last: called before the process ends, for example to wait for a checkpoint that is being written.
    """
    if accelerator.num_processes == 1:
        yield
        return

    def end(problem: str) -> None:
        last()
        rank = "" if accelerator.is_main_process else f"rank {accelerator.process_index}: "
        print(f"{rank}error: {problem}", file=sys.stderr, flush=True)
        os._exit(1)

    def shutting_down() -> bool:
        # Without the launcher's store no heartbeats arrive, which says nothing about the other processes.
        return stop.reason is not None and stop.has_launcher

    with Heartbeat(prefix, accelerator.process_index, accelerator.num_processes) as heartbeat:
        with watchdog(heartbeat, 0.9 * timeout, end, shutting_down=shutting_down):
            yield


def _is_lost_connection(error: Exception) -> bool:
    """Whether an error comes from a collective operation; gloo raises plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )


def _peer_errors(accelerator: Accelerator, prefix: str) -> dict[int, str]:
    """Return the errors of the others by rank, empty strings for lost connections; waits `ERROR_SECONDS`."""
    found: dict[int, str] = {}
    others = set(range(accelerator.num_processes)) - {accelerator.process_index}
    # The store may be gone with the process or machine that held it.
    with suppress(RuntimeError, KeyError):
        store = launcher_store()
        deadline = time.monotonic() + ERROR_SECONDS
        while others - found.keys() and time.monotonic() < deadline:
            for rank in others - found.keys():
                if store.check([error_key(prefix, rank)]):
                    found[rank] = store.get(error_key(prefix, rank)).decode()
            time.sleep(0.05)
    return found


def _describe(accelerator: Accelerator, peers: Mapping[int, str], error: Exception) -> str:
    stopped = f"rank {accelerator.process_index} stopped"
    if failed := {rank: message for rank, message in peers.items() if message}:
        return f"{describe_failed(failed)}; {stopped}."
    # The part of gloo's message after the place in its source.
    reason = str(error).splitlines()[0].rpartition("] ")[2].strip(" .")
    if ranks := set(range(accelerator.num_processes)) - {accelerator.process_index} - peers.keys():
        return f"{describe_lost(ranks)}; {stopped} ({reason})."
    return f"the processes lost their connections to each other; {stopped} ({reason})."
