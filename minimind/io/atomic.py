"""Files that have reached the disk when the call returns, tensors among them."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConfigError, UserError

# How the files of a model end. A folder with others in it is more than a model, and is never replaced.
_REPLACEABLE = (".safetensors", ".json", ".pth", ".gguf")


def write_file(file: Path, parts: list[Any]) -> dict[str, Any]:
    """Write bytes-like parts to a new file and force them to the disk.

    Returns:
        The size and the SHA-256 of the file, as a manifest records them.

    Raises:
        OSError: with the path as `filename`.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with file.open("wb", buffering=0) as stream:
            for part in parts:
                rest = memoryview(part)
                digest.update(rest)
                size += len(rest)
                while rest:  # an unbuffered write may take less than it was given
                    rest = rest[stream.write(rest) :]
            os.fsync(stream.fileno())
    except OSError as error:
        error.filename = str(file)  # a failed write does not say where
        raise
    return {"bytes": size, "sha256": digest.hexdigest()}


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk, so that a rename outlives a power cut."""
    if os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole, so that no reader ever sees half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


@contextmanager
def new_folder(path: Path, option: str, *, overwrite: bool = False) -> Iterator[Path]:
    """Give an empty folder to write files into. At the end they are forced to the disk and get their place.

    Args:
        path: the place; its parents are made.
        option: how errors name it.
        overwrite: let the new folder replace a model that lies there.

    Raises:
        ConfigError: when something lies there that is not to be replaced.
        UserError: when it cannot be written.
    """
    path = path.resolve()
    if not path.name:
        raise ConfigError(f"{option} {path} is no place for a new folder; name one below it.")
    written, replaced = (path.with_name(f".{path.name}.{what}") for what in ("tmp", "replaced"))
    try:
        if replaced.exists() and not path.exists():  # killed between the two renames below
            replaced.rename(path)
        _refuse_to_replace(path, option, overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(written, ignore_errors=True)
        written.mkdir()
    except OSError as error:
        raise UserError(
            f"{option} {path} cannot be written ({error.strerror}); name another folder."
        ) from error
    try:
        yield written
        _publish(written, path, replaced)
    except OSError as error:
        raise UserError(f"{option} {path} could not be written: {error}.") from error
    finally:
        shutil.rmtree(written, ignore_errors=True)


def _refuse_to_replace(path: Path, option: str, overwrite: bool) -> None:
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


def _publish(written: Path, path: Path, replaced: Path) -> None:
    for file in written.iterdir():
        with file.open("r+b") as stream:
            os.fsync(stream.fileno())
    sync_folder(written)
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        path.rename(replaced)  # a folder cannot be renamed over another
    try:
        written.rename(path)
    except OSError:
        if replaced.exists():
            replaced.rename(path)
        raise
    sync_folder(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)
