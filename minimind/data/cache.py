"""A folder of builds: each is built once, under a file lock, and appears only when it is complete."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: without the lock two processes may both build; the first to finish wins.
    fcntl = None  # type: ignore[assignment]

_MANIFEST = "manifest.json"
_BUILDING = ".building-"
# A build of another machine that wrote nothing for this long is removed.
_STALE_SECONDS = 24 * 3600.0

Build = Callable[[Path], Mapping[str, Any]]


def open_or_build(cache_dir: Path, key: str, build: Build) -> tuple[Path, dict[str, Any], bool]:
    """Return the folder and manifest of a build; build it when it is missing or incomplete.

    Args:
        cache_dir: folder of all builds; created if needed.
        key: name of this build.
        build: writes files into the given folder and returns the manifest.

    Returns:
        The folder, its manifest, and whether this call built it.

    Raises:
        OSError: when the cache cannot be written.
    """
    folder = cache_dir / key
    if (manifest := _whole(folder)) is not None:
        return folder, manifest, False
    cache_dir.mkdir(parents=True, exist_ok=True)
    with _locked(cache_dir / f"{key}.lock"):
        # Another process may have built it while this one waited.
        if (manifest := _whole(folder)) is not None:
            return folder, manifest, False
        _remove_stale(cache_dir, key)
        return folder, _build(folder, build), True


def find(cache_dir: Path, key: str) -> dict[str, Any] | None:
    """Return the manifest of a complete build, or None."""
    return _whole(cache_dir / key)


def _build(folder: Path, build: Build) -> dict[str, Any]:
    draft = folder.with_name(f"{folder.name}{_BUILDING}{socket.gethostname()}-{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        manifest = dict(build(draft))
        manifest["files"] = {file.name: file.stat().st_size for file in sorted(draft.iterdir())}
        with (draft / _MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(manifest, file)
            file.flush()
            os.fsync(file.fileno())
        # An existing folder is damaged, or _whole would have found it.
        shutil.rmtree(folder, ignore_errors=True)
        try:
            draft.rename(folder)
        except OSError:
            # Another machine, which does not share the lock, finished first; its build is equal.
            if (theirs := _whole(folder)) is None:
                raise
            return theirs
        _sync_folder(folder.parent)
        return manifest
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _whole(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a complete build whose files have the recorded sizes."""
    try:
        manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if sizes == manifest["files"] else None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for an exclusive lock on a file and hold it."""
    if fcntl is None:
        yield
        return
    with path.open("a") as file:
        # Some network file systems have no locks; the rename still publishes complete builds only.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_stale(cache_dir: Path, key: str) -> None:
    """Remove the drafts of dead builds of any key; the caller holds the lock of `key`."""
    for draft in cache_dir.glob(f"*{_BUILDING}*"):
        name, _, builder = draft.name.partition(_BUILDING)
        host, _, pid = builder.rpartition("-")
        here = fcntl is not None and host == socket.gethostname()
        dead = here and (name == key or not _alive(int(pid)))
        if dead or time.time() - _last_written(draft) > _STALE_SECONDS:
            shutil.rmtree(draft, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # It belongs to another user.
        return True
    return True


def _last_written(folder: Path) -> float:
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    except OSError:
        return 0.0


def _sync_folder(folder: Path) -> None:
    """Force a rename to the disk, where the system supports syncing folders."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
