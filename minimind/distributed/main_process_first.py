"""Whose turn it is to build the token cache, where the processes of a run are on several machines.

On one machine the lock of the cache settles that; see `data.cache`. Locks may not reach over to other
machines, even where the folder does.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import RankError
from ..launch_env import is_main_process, meets_at_launcher, num_machines, rank, restarts, world_size
from .heartbeat import Heartbeat, format_error, launcher_store, post_error

# The main process writes a word into the cache folder; whoever reads it there shares the folder.
_MARK = ".shared-by"
_SECONDS_BEFORE_A_WORD = 10.0
# In so many of its beats a process hears why another one failed.
HEARING_BEATS = 3


@contextmanager
def main_process_first(cache_dir: Path, patience: float, note: Callable[[str], None]) -> Iterator[None]:
    """Prepare the data of one process of several inside of this block, before the processes are joined.

    Processes of several machines that share the cache folder let the main process go first, and find there
    what it built. At the end all wait for each other, however long one of them takes: what is limited is only
    how long a process may say nothing.

    Args:
        cache_dir: the cache of this process.
        patience: seconds without a sign of life after which a process is given up.
        note: hears who is waited for.

    Raises:
        RankError: when a process that is waited for failed or is lost.
    """
    # A restart finds the caches built; its machines may count restarts differently, and miss each other.
    if num_machines() == 1 or restarts() or not meets_at_launcher():
        yield
        return
    place = f"minimind/{os.environ.get('TORCHELASTIC_RUN_ID')}/data"
    with Heartbeat(place, rank(), world_size()) as roll:
        try:
            if is_main_process():
                word = uuid.uuid4().hex
                _leave_mark(cache_dir, word)
                _tell(place, "word", word, patience)
            else:
                word = roll.wait_for(f"{place}/word", [0], patience).decode()
                if _read_mark(cache_dir) == word:
                    roll.wait_for(f"{place}/done/0", [0], patience)
            yield
            _tell(place, f"done/{rank()}", "", patience)
            began = time.monotonic()
            for other in roll.others:
                if time.monotonic() - began > _SECONDS_BEFORE_A_WORD:
                    note(f"waiting for the data of rank {other}.")
                roll.wait_for(f"{place}/done/{other}", [other], patience)
        except Exception as error:
            post_error(place, rank(), "" if isinstance(error, RankError) else format_error(error))
            # The store goes with the launcher, which ends with this process.
            time.sleep(HEARING_BEATS * roll.interval)
            raise


def _tell(place: str, key: str, value: str, patience: float) -> None:
    launcher_store(patience).set(f"{place}/{key}", value)


def _leave_mark(cache_dir: Path, word: str) -> None:
    # A folder that cannot be written is reported by the build, in better words.
    with suppress(OSError):
        cache_dir.mkdir(parents=True, exist_ok=True)
        (cache_dir / _MARK).write_text(word)


def _read_mark(cache_dir: Path) -> str | None:
    with suppress(OSError):
        return (cache_dir / _MARK).read_text()
    return None
