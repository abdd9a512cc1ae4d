"""SHA-256 of the files of a model folder in `checksums.json`, which programs that do not know it ignore."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ..errors import ConfigError
from .reading import open_regular, read_json

CHECKSUMS = "checksums.json"


def write_checksums(folder: Path, earlier: Path | None = None) -> None:
    """Write the sums of all files in `folder`, after those of other files that `earlier` holds.

    A model card (Markdown) is for people to edit and has none.

    Raises:
        OSError: when a file cannot be read or written.
    """
    sums: dict[str, str] = {}
    if earlier is not None:
        with suppress(ConfigError):
            sums = {name: value for name, value in _read(earlier).items() if (earlier / name).is_file()}
    files = [file for file in sorted(folder.iterdir()) if file.name != CHECKSUMS and file.suffix != ".md"]
    sums |= {file.name: _sha256(file) for file in files}
    content = {"files": sums, "sha256": _sum_of(sums)}
    (folder / CHECKSUMS).write_text(json.dumps(content, indent=2), encoding="utf-8")


def check_files(folder: Path, names: Iterable[str] | None = None) -> None:
    """Compare files with the `checksums.json` beside them; a folder without one is not checked.

    JSON files are edited by hand, for example `generation_config.json`: a difference there is a warning.

    Args:
        folder: of the files.
        names: files to check, where they exist and are recorded; None for all.

    Raises:
        ConfigError: when weights differ, a file cannot be read, or `checksums.json` is damaged.
    """
    sums = _read(folder)
    for name in sums if names is None else names:
        file = folder / name
        try:
            if name not in sums or not file.is_file() or _sha256(file) == sums[name]:
                continue
        except OSError as error:
            raise ConfigError(f"{file} cannot be read ({error.strerror or error}); copy it again.") from error
        if file.suffix == ".json":
            warnings.warn(f"{file} was edited or is damaged: it does not match {CHECKSUMS}.", stacklevel=3)
        else:
            raise ConfigError(
                f"{file} is damaged: it does not match {CHECKSUMS}; copy it again, or remove {CHECKSUMS} if "
                "the file was replaced on purpose."
            )


def _read(folder: Path) -> dict[str, str]:
    path = folder / CHECKSUMS
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
        if content["sha256"] == _sum_of(content["files"]):
            return dict(content["files"])
        problem = "it does not match itself"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = str(error)
    raise ConfigError(f"{path} is damaged ({problem}); copy it again, or remove it.")


def _sum_of(sums: dict[str, str]) -> str:
    text = "".join(f"{value}  {name}\n" for name, value in sorted(sums.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256(file: Path) -> str:
    with open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
