"""Lets rank 0 build the token cache first when nodes share a file system.

On one machine the lock of the cache is enough; see `data.cache`. Locks may not work across machines, even
where the folder is shared.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import RankError
from ..io.atomic import write_text
from ..io.reading import read_bytes
from ..launch_env import is_main_process, launcher_has_store, num_machines, rank, restarts, world_size
from .heartbeat import Heartbeat, format_error, launcher_store, post_error

# The main process writes a token to this file of its cache folder; a process that reads the same token in
# its own cache folder shares the folder.
_MARKER = ".shared-by"
_SECONDS_BEFORE_NOTE = 10.0
# Within this many heartbeats the other processes read a posted error.
ERROR_INTERVALS = 3


@contextmanager
def main_process_first(cache_dir: Path, timeout: float, note: Callable[[str], None]) -> Iterator[None]:
    """Prepare the data of this process inside this context, before the process group exists.

    Processes that share the cache folder with the main process of another machine wait for it and find what
    it built. At the end all wait for each other, however long the work takes: only the time without a
    heartbeat is limited.

    Args:
        timeout: seconds without a heartbeat after which a process is lost.
        note: called with a message while this process waits for another.

    Raises:
        RankError: when a process that this one waits for failed or is lost.
    """
    # After a restart the caches exist, and machines may count restarts differently and never meet.
    if num_machines() == 1 or restarts() or not launcher_has_store():
        yield
        return
    prefix = f"minimind/{os.environ.get('TORCHELASTIC_RUN_ID')}/data"
    with Heartbeat(prefix, rank(), world_size()) as heartbeat:
        try:
            if is_main_process():
                token = uuid.uuid4().hex
                # A folder that cannot be written is reported by the build, with a better message.
                with suppress(OSError):
                    cache_dir.mkdir(parents=True, exist_ok=True)
                    write_text(cache_dir / _MARKER, token)
                launcher_store(timeout).set(f"{prefix}/token", token)
            else:
                token = heartbeat.wait_for(f"{prefix}/token", [0], timeout).decode()
                if _read_marker(cache_dir) == token:
                    heartbeat.wait_for(f"{prefix}/done/0", [0], timeout)
            yield
            launcher_store(timeout).set(f"{prefix}/done/{rank()}", "")
            began = time.monotonic()
            for other in heartbeat.others:
                if time.monotonic() - began > _SECONDS_BEFORE_NOTE:
                    note(f"waiting for the data of rank {other}.")
                heartbeat.wait_for(f"{prefix}/done/{other}", [other], timeout)
        except Exception as error:
            post_error(prefix, rank(), "" if isinstance(error, RankError) else format_error(error))
            # The store ends with the launcher, which ends with this process.
            time.sleep(ERROR_INTERVALS * heartbeat.interval)
            raise


def _read_marker(cache_dir: Path) -> str | None:
    with suppress(OSError):
        return read_bytes(cache_dir / _MARKER).decode(errors="replace")
    return None
