"""A folder of builds: each is built once, under a file lock, and appears only when it is complete."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ..io.atomic import sync_folder, write_file
from ..io.lock import hold_lock
from ..io.reading import open_handle, read_bytes, read_json
from .checksums import MANIFEST, corrupt_chunk

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_BUILDING = ".building-"
# A smaller build is checked when it is opened, a larger one as it is read.
_CHECK_BYTES = 1 << 26
# A build of another machine that wrote nothing for this long is removed.
_STALE_SECONDS = 24 * 3600.0

Build = Callable[[Path], Mapping[str, Any]]


@dataclass(frozen=True)
class Opened:
    """A complete build.

    Attributes:
        manifest: as `build` returned it, with the sizes of the files.
        built: whether this call built it.
        corrupt: why an earlier build was replaced, naming the file, or None.
    """

    folder: Path
    manifest: dict[str, Any]
    built: bool = False
    corrupt: str | None = None


def open_or_build(cache_dir: Path, key: str, build: Build) -> Opened:
    """Open a build; build it first when it is missing, incomplete or corrupt.

    Args:
        cache_dir: folder of all builds; created if needed.
        key: name of this build.
        build: writes files into the given folder and returns the manifest.

    Raises:
        OSError: when the cache cannot be written, or a file does not read back as it was written.
    """
    folder = cache_dir / key
    if isinstance(manifest := _check(folder), dict):
        return Opened(folder, manifest)
    cache_dir.mkdir(parents=True, exist_ok=True)
    with _locked(cache_dir / f"{key}.lock"):
        # Another process may have built it while this one waited.
        if isinstance(manifest := _check(folder), dict):
            return Opened(folder, manifest)
        _remove_stale(cache_dir, key)
        return Opened(folder, _build(folder, build), True, manifest)


def find(cache_dir: Path, key: str) -> dict[str, Any] | None:
    """Return the manifest of a complete build, or None."""
    manifest = _check(cache_dir / key)
    return manifest if isinstance(manifest, dict) else None


def _build(folder: Path, build: Build) -> dict[str, Any]:
    draft = folder.with_name(f"{folder.name}{_BUILDING}{socket.gethostname()}-{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        manifest = dict(build(draft))
        files = sorted(draft.iterdir())
        manifest["files"] = {file.name: file.stat().st_size for file in files}
        manifest["checksums"] = {file.name: _crc(file) for file in files if file.suffix == ".crc"}
        manifest["checksum"] = _checksum(manifest)
        write_file(draft / MANIFEST, [json.dumps(manifest).encode()])
        if isinstance(reason := _check(draft, limit=None), str):
            raise OSError(errno.EIO, f"a new build does not read back: {reason}")
        # An existing folder is damaged, or _check would have accepted it.
        shutil.rmtree(folder, ignore_errors=True)
        try:
            draft.rename(folder)
        except OSError:
            # Another machine, which does not share the lock, finished first; its build is equal.
            if not isinstance(theirs := _check(folder), dict):
                raise
            return theirs
        sync_folder(folder.parent)
        return manifest
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _check(folder: Path, limit: int | None = _CHECK_BYTES) -> dict[str, Any] | str | None:
    """Return the manifest of a complete build, why it is corrupt, or None if there is no build.

    Sizes, the manifest, the tables and the checksums are always checked; tokens and offsets only if the build
    has at most `limit` bytes. Those of larger builds are checked when they are read; see `CheckedArray`.
    """
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = read_json(path)
        if manifest["checksum"] != _checksum(manifest):
            return f"{path} does not match its checksum"
        files: dict[str, int] = manifest["files"]
        for name, size in files.items():
            if (folder / name).stat().st_size != size:
                return f"{folder / name} has not its size of {size:,} bytes"
        for name, expected in manifest["checksums"].items():
            if _crc(folder / name) != expected:
                return f"{folder / name} does not match its checksum"
        whole = limit is None or sum(files.values()) <= limit
        for name in files:
            small = not name.endswith((".crc", ".bin", ".offsets"))
            checked = f"{name}.crc" in files and (whole or small)
            if checked and (start := corrupt_chunk(folder / name)) is not None:
                return f"{folder / name} does not match its checksum at byte {start:,}"
    except FileNotFoundError as error:
        return f"{error.filename} is missing" if folder.is_dir() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{path} cannot be read"
    return manifest


def _checksum(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _crc(file: Path) -> int:
    return zlib.crc32(read_bytes(file))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for an exclusive lock on a file and hold it."""
    if fcntl is None:
        with hold_lock(path, timeout=math.inf):
            yield
        return
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    with os.fdopen(open_handle(path, flags), "wb") as file:
        # Some network file systems have no locks; the rename still publishes complete builds only.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_stale(cache_dir: Path, key: str) -> None:
    """Remove the drafts of dead builds of any key; the caller holds the lock of `key`."""
    for draft in cache_dir.glob(f"*{_BUILDING}*"):
        name, _, builder = draft.name.partition(_BUILDING)
        host, _, pid = builder.rpartition("-")
        if not host or not pid.isdecimal():
            continue  # not one of ours
        here = host == socket.gethostname()
        dead = here and (name == key or not psutil.pid_exists(int(pid)))
        if dead or time.time() - _last_written(draft) > _STALE_SECONDS:
            shutil.rmtree(draft, ignore_errors=True)


def _last_written(folder: Path) -> float:
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    except OSError:
        return 0.0
