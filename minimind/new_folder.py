"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .durable_files import sync_folder
from .errors import ConfigError, UserError

# How the files of a model end. A folder with others in it is more than a model, and is never replaced.
_REPLACEABLE = (".safetensors", ".json", ".pth", ".gguf")


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
