"""Atomic, durable writes: a reader sees the old content or the new content, also after a power cut.

Every writer follows the same protocol: write under a hidden name, `fsync`, rename, `fsync` the folder.
Temporary names are fixed, so that the next writer removes what a killed one left.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import ConfigError, UserError
from .checksums import write_checksums

# File types of a model. A folder with other files is more than a model and is never replaced.
_REPLACEABLE = (".safetensors", ".json", ".pth", ".gguf")
DISK_FULL = tuple(getattr(errno, name) for name in ("ENOSPC", "EDQUOT") if hasattr(errno, name))


def cannot_write(option: str, path: Path, error: OSError) -> UserError:
    """Return the error for a place that cannot be written; `option` is the option that names it."""
    fix = "name another folder"
    if error.errno in DISK_FULL:
        fix = f"the disk of {option} is full: free space there, or name another folder"
    return UserError(f"{option} {path} cannot be written ({refusal(path, error)}); {fix}.")


def refusal(path: Path, error: OSError) -> str:
    """Return why the system refused to create a folder or something in it."""
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        for place in (path, *path.parents):
            if place.is_symlink() and not place.exists():
                return f"{place} links to {os.readlink(place)}, which does not exist"
            if place.exists():
                return f"{place} is not a folder"
    return error.strerror or str(error)


def write_output(option: str, path: Path, text: str) -> None:
    """Replace the file that an option names; write into a pipe or device without replacing it.

    Raises:
        ConfigError: it cannot be written. A pipe without a reader is refused, where `open` would block.
    """
    path = resolved(path)
    try:
        if path.is_file() or not path.exists():
            write_text(path, text)
        else:
            handle = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
            with os.fdopen(handle, "wb") as stream:
                os.set_blocking(handle, True)
                stream.write(text.encode())
    except OSError as error:
        raise ConfigError(
            f"{option} {path} cannot be written ({error.strerror}); choose another file."
        ) from error


def create_file(path: Path) -> BinaryIO:
    """Open a new file for unbuffered writing, in place of any file or link of that name.

    The file gets the permissions of the umask. A link at `path` is removed and never followed.
    """
    remove(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(path, flags, 0o666), "wb", buffering=0)


def write_file(path: Path, parts: Sequence[Any]) -> dict[str, Any]:
    """Write bytes-like parts to a new file and `fsync` it.

    Returns:
        `bytes` and `sha256` of the file, as a manifest records them.

    Raises:
        OSError: with the path as `filename`.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with create_file(path) as stream:
            for part in parts:
                rest = memoryview(part)
                digest.update(rest)
                size += len(rest)
                while rest:  # an unbuffered write may be short
                    rest = rest[stream.write(rest) :]
            os.fsync(stream.fileno())
    except OSError as error:
        error.filename = str(path)  # a failed write does not name the file
        raise
    return {"bytes": size, "sha256": digest.hexdigest()}


def sync_folder(folder: Path) -> None:
    """Flush the directory entries of a folder, so that a rename survives a power cut."""
    if os.name == "nt":  # Windows cannot open folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, a link (never its target) or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """Return the hidden name under which a file or folder is written first."""
    return path.with_name(f".{path.name}.tmp")


def resolved(path: Path) -> Path:
    """Return the path without links; unlike `Path.resolve`, never raise for a link to itself."""
    return Path(os.path.realpath(path))


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically."""
    temporary = temporary_path(path)
    try:
        write_file(temporary, [text.encode()])
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise
    sync_folder(path.parent)


@contextmanager
def replace_files(folder: Path) -> Iterator[Path]:
    """Yield an empty folder; at the end its files replace those of the same name in `folder`.

    Other files in `folder` stay. All new files are on the disk before the first one is renamed. A folder that
    did not exist appears with all its files at once. `checksums.json` records all files.

    Raises:
        OSError: `folder` is unchanged, and temporary files are removed.
    """
    folder = resolved(folder)
    exists = folder.is_dir()
    # Inside an existing folder, which may be a mount point; beside a new one.
    written = folder / ".tmp" if exists else temporary_path(folder)
    try:
        remove(written)
        written.mkdir(parents=True)
        yield written
        write_checksums(written, folder if exists else None)
        _sync_files(written)
        if exists:
            for file in sorted(written.iterdir()):
                os.replace(file, folder / file.name)
        else:
            written.rename(folder)
        sync_folder(folder if exists else folder.parent)
    finally:
        remove(written)


@contextmanager
def new_folder(path: Path, option: str, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder; at the end it is flushed to the disk and renamed to `path`.

    Args:
        path: the final place; parents are created.
        option: the option that errors name.
        overwrite: replace a model at `path`.

    Raises:
        ConfigError: `path` holds something that must not be replaced.
        UserError: `path` cannot be written.
    """
    path = resolved(path)
    if not path.name:
        raise ConfigError(f"{option} {path} is no place for a new folder; name one below it.")
    written, replaced = temporary_path(path), path.with_name(f".{path.name}.replaced")
    try:
        if replaced.exists() and not path.exists():  # killed between the two renames of `publish_folder`
            replaced.rename(path)
        _check_replaceable(path, option, overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(written)
        written.mkdir()
    except OSError as error:
        raise cannot_write(option, path, error) from error
    try:
        yield written
        _sync_files(written)
        publish_folder(written, path, replaced)
    except OSError as error:
        raise UserError(f"{option} {path} could not be written: {error}.") from error
    finally:
        remove(written)


def publish_folder(written: Path, path: Path, replaced: Path) -> None:
    """Rename a folder, whose files are on the disk, to `path`.

    A folder cannot be renamed over another, so an old one at `path` is called `replaced` meanwhile; after a
    crash in between it must be renamed back.
    """
    remove(replaced)
    if path.exists():
        path.rename(replaced)
    try:
        written.rename(path)
    except OSError:
        if replaced.exists():
            replaced.rename(path)
        raise
    sync_folder(path.parent)
    remove(replaced)


def _check_replaceable(path: Path, option: str, overwrite: bool) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise ConfigError(f"{option} {path} is a file; name a folder.")
    files = sorted(path.iterdir())
    if files and not overwrite:
        raise ConfigError(
            f"{option} {path} is not empty; name another folder, or replace the model in it by --overwrite."
        )
    for file in files:
        if file.is_dir() or file.suffix not in _REPLACEABLE:
            raise ConfigError(
                f"{option} {path} holds {file.name}, which is no part of an exported model; "
                "--overwrite does not replace it, name another folder."
            )


def _sync_files(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("r+b") as stream:
            os.fsync(stream.fileno())
    sync_folder(folder)
