"""A lock between processes, which the kernel releases when its holder ends, also by SIGKILL."""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_POLL_SECONDS = 0.1
# Errors of file systems without locks, such as some network file systems: there nothing is locked.
_UNSUPPORTED = {
    getattr(errno, name, None) for name in ("ENOLCK", "ENOSYS", "EOPNOTSUPP", "ENOTSUP", "EINVAL")
}
_held: set[int] = set()


class LockedError(Exception):
    """Another process holds the lock; `holder` says which one, for example `process 17 on host3`."""

    def __init__(self, holder: str) -> None:
        self.holder = holder
        super().__init__(holder)


@contextmanager
def hold_lock(
    path: Path, timeout: float = 0.0, on_wait: Callable[[str], object] = lambda holder: None
) -> Iterator[None]:
    """Hold an exclusive lock on a file, which names the holder and is removed at the end.

    Args:
        path: the lock file; its folder is created if needed.
        timeout: seconds to wait for another holder.
        on_wait: called once with the holder, before waiting.

    Raises:
        LockedError: another process, or this one, holds the lock.
        OSError: the file cannot be created or written.
    """
    handle = _acquire(path, time.monotonic() + timeout, on_wait)
    _held.add(handle)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held: nobody else can hold it under this name
        if handle in _held:
            _held.discard(handle)
            os.close(handle)


def _acquire(path: Path, deadline: float, on_wait: Callable[[str], object]) -> int:
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    waited = False
    while True:
        # The previous holder may have removed a folder that stayed empty.
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, flags, 0o666)
        try:
            _lock(handle)
            # The previous holder may have removed the file after it was opened here.
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                return handle
            os.close(handle)
        except BlockingIOError:
            holder = os.read(handle, 300).decode(errors="replace").strip() or "another process"
            os.close(handle)
            if time.monotonic() >= deadline:
                raise LockedError(holder) from None
            if not waited:
                on_wait(holder)
            waited = True
            time.sleep(_POLL_SECONDS)
        except BaseException:
            os.close(handle)
            raise


def _lock(handle: int) -> None:
    """Lock a file; BlockingIOError when it is locked."""
    if sys.platform == "win32":
        os.lseek(handle, 1 << 30, os.SEEK_SET)  # a locked byte cannot be read by others
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError from error
        finally:
            os.lseek(handle, 0, os.SEEK_SET)
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _close_in_child() -> None:
    """Close the lock in a forked process, which would otherwise hold it after its parent was killed."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
