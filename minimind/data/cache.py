"""A folder of finished builds: each is built once, under a lock, and is whole or not there at all."""

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

from ..io.atomic import sync_folder, write_file

try:
    import fcntl
except ImportError:  # Windows: without the lock two processes may both build; the first to finish wins.
    fcntl = None  # type: ignore[assignment]

_MANIFEST = "manifest.json"
_BUILDING = ".building-"
# A build elsewhere that wrote nothing for so long is taken for dead.
_STALE_SECONDS = 24 * 3600.0

Build = Callable[[Path], Mapping[str, Any]]


def open_or_build(cache_dir: Path, key: str, build: Build) -> tuple[Path, dict[str, Any], bool]:
    """Return the folder and manifest of a build, building it first where it is not there or not whole.

    Args:
        cache_dir: folder of all builds; made if needed.
        key: names this build.
        build: writes files into the folder it is given and returns what the manifest shall hold.

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
    """Return the manifest of a build that is there and whole, else None."""
    return _whole(cache_dir / key)


def _build(folder: Path, build: Build) -> dict[str, Any]:
    draft = folder.with_name(f"{folder.name}{_BUILDING}{socket.gethostname()}-{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        manifest = dict(build(draft))
        manifest["files"] = {file.name: file.stat().st_size for file in sorted(draft.iterdir())}
        write_file(draft / _MANIFEST, [json.dumps(manifest).encode()])
        # What lies at the place now is damaged, or _whole would have found it.
        shutil.rmtree(folder, ignore_errors=True)
        try:
            draft.rename(folder)
        except OSError:
            # A machine that does not share the lock was first; its build is as good as this one.
            if (theirs := _whole(folder)) is None:
                raise
            return theirs
        sync_folder(folder.parent)
        return manifest
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _whole(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a finished build whose files have the sizes they should have."""
    try:
        manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if sizes == manifest["files"] else None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, waiting for it."""
    if fcntl is None:
        yield
        return
    with path.open("a") as file:
        # Some network file systems have no locks; the rename still keeps builds whole.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_stale(cache_dir: Path, key: str) -> None:
    """Remove what builds that died have left behind, of any key; the caller holds the lock of `key`."""
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
    except OSError:  # It belongs to someone else.
        return True
    return True


def _last_written(folder: Path) -> float:
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    except OSError:
        return 0.0
