"""Find the data files of --data: paths, folders and globs, with what was skipped and why."""

from __future__ import annotations

import fnmatch
import glob
import gzip
import hashlib
import importlib.util
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..io.reading import read_json

_TEXT = (".jsonl", ".ndjson", ".json", ".txt")
FORMATS = (
    *(f"{text}{compressed}" for text in _TEXT for compressed in ("", ".gz", ".zst")),
    *(".parquet", ".arrow"),
)
_COMPRESSED = {".gz", ".zst", ".bz2", ".xz"}
_PROBE_BYTES = 1 << 16
# Beside the data files of a data set that the package datasets saved.
_DATASET_FILES = {"state.json", "dataset_info.json"}


def find_files(
    patterns: Sequence[str], option: str, skipped: Counter[str] | None = None, text_key: str = "text"
) -> list[Path]:
    """Return the data files of paths, folders and globs, each once, folders in sorted order.

    The suffix of the given name determines the format, also of a link. Linked sub-folders are searched, each
    once. In folders and globs, hidden files, folders of training runs, unknown suffixes and JSON files
    without `text_key` are skipped.

    Args:
        patterns: paths, folders or globs; `~` is expanded.
        option: `--data` or `--val-data`, named in errors.
        skipped: counts what was skipped, by reason.
        text_key: the field of a document, which tells a `.json` file of documents from another.

    Raises:
        DataError: for a path that does not exist or matches no file, and for an unknown suffix.
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        try:
            for path in _matches(pattern, option, Counter() if skipped is None else skipped, text_key):
                found.setdefault(path.resolve(), path)
        except OSError as error:
            raise unreadable(Path(pattern), option, error) from error
    return list(found.values())


def _matches(pattern: str, option: str, skipped: Counter[str], text_key: str) -> list[Path]:
    path = Path(os.path.abspath(Path(pattern).expanduser()))
    readable = ", ".join(FORMATS)
    if path.is_file():
        if format_of(path) is None:
            raise DataError(f"{option} {pattern} has an unknown suffix; use one of {readable}.")
        return [path]
    if path.is_dir():
        candidates = _walk(path, skipped)
    elif path.exists():
        raise DataError(
            f"{option} {pattern} is a pipe or a device, but data is read more than once; write it to a "
            "file and pass the file."
        )
    elif glob.has_magic(pattern):
        candidates = _glob(path, skipped)
    else:
        raise DataError(f"{option} {pattern} does not exist; pass a file, a folder or a glob.")
    files = sorted(candidate for candidate in candidates if not _is_skipped(candidate, skipped, text_key))
    if not files:
        where = "contains" if path.is_dir() else "matches"
        reasons = f" ({'; '.join(skipped_lines(skipped))} skipped)" if skipped else ""
        raise DataError(f"{option} {pattern} {where} no data file{reasons}; use one of {readable}.")
    return files


def _glob(pattern: Path, skipped: Counter[str]) -> list[Path]:
    """Return the files of a glob; below `**`, each folder once, as in `_walk`."""
    parts = pattern.parts
    if "**" not in parts:
        return [Path(name) for name in glob.glob(str(pattern)) if not os.path.isdir(name)]
    start = parts.index("**")
    return [
        file
        for root in glob.glob(str(Path(*parts[:start])))
        for file in _walk(Path(root), skipped)
        if _fits(file.relative_to(root).parts, parts[start:])
    ]


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether the parts of a path match those of a glob, where `**` matches any number."""
    if not parts or not pattern:
        return not parts and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return _fits(parts, pattern[1:]) or _fits(parts[1:], pattern)
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _walk(root: Path, skipped: Counter[str]) -> list[Path]:
    """Return all files below a folder, following links, each folder once."""
    files: list[Path] = []
    visited: set[tuple[int, int]] = set()

    def unreadable(error: OSError) -> None:
        skipped[f"folder that cannot be read: {error.filename} ({error.strerror})"] += 1

    for folder, folders, names in os.walk(root, followlinks=True, onerror=unreadable):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        if "dataset_dict.json" in names:
            folders[:], names = _training_split(Path(folder), skipped), []
        elif {"state.json", "dataset_info.json"} <= set(names):
            names = _files_of_dataset(Path(folder), names, skipped)
        kept = []
        for name in sorted(folders):
            if name.startswith("."):
                skipped["hidden folder"] += 1
            elif _is_run(Path(folder, name)):
                skipped[f"folder of a training run: {Path(folder, name)}"] += 1
            elif _is_token_cache(Path(folder, name)):
                skipped["folder of a token cache"] += 1
            else:
                kept.append(name)
        folders[:] = kept
        own = {"config.toml", "metrics.jsonl", "samples.jsonl"} if _is_run(Path(folder)) else set()
        for name in sorted(names):
            if name in own:
                skipped["file of a training run"] += 1
            else:
                files.append(Path(folder, name))
    return files


def _training_split(folder: Path, skipped: Counter[str]) -> list[str]:
    """Return the folder of the split `train` of a saved `datasets.DatasetDict`, or of its only split."""
    splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
    if "train" not in splits and len(splits) != 1:
        raise DataError(f"{folder} has the splits {', '.join(splits) or 'none'}; name one of their folders.")
    chosen = "train" if "train" in splits else splits[0]
    skipped.update(f"split of a saved data set: {folder / name}" for name in splits if name != chosen)
    return [chosen]


def _files_of_dataset(folder: Path, names: Sequence[str], skipped: Counter[str]) -> list[str]:
    """Return the data files of a `datasets.Dataset` saved on the disk, without cached results beside them."""
    try:
        state = read_json(folder / "state.json")
        files = [str(entry["filename"]) for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / 'state.json'} cannot be read; save the data set again.") from error
    if missing := [name for name in files if name not in names]:
        raise DataError(f"{folder / missing[0]} is missing; save or copy the data set again.")
    if others := len(set(names) - set(files) - _DATASET_FILES):
        skipped["other file of a saved data set"] += others
    return files


def _is_run(folder: Path) -> bool:
    # Unlike Path.is_file, os.path.isfile is False where permission is missing.
    others = ("metrics.jsonl", "checkpoints", "environment.json")
    return os.path.isfile(folder / "config.toml") and any(os.path.exists(folder / name) for name in others)


def _is_token_cache(folder: Path) -> bool:
    return all(os.path.isfile(folder / name) for name in ("manifest.json", "train.offsets"))


def _is_skipped(path: Path, skipped: Counter[str], text_key: str) -> bool:
    """Return whether to skip a file of a folder or glob, and count the reason."""
    suffix = format_of(path)
    if path.name.startswith("."):
        reason = "hidden file"
    elif suffix is None:
        suffixes = path.suffixes[-2:] if path.suffix in _COMPRESSED else path.suffixes[-1:]
        reason = f"file with the unknown suffix {''.join(suffixes)}" if suffixes else "file without a suffix"
    elif not os.path.isfile(path):
        missing = "broken link" if os.path.islink(path) else "file that cannot be read"
        reason = "pipe or device" if os.path.exists(path) else f"{missing}: {path}"
    elif suffix.endswith(".zst") and not has_zstd():
        reason = f"{suffix} file, which needs pip install zstandard"
    elif suffix in (".json", ".json.gz") and not _holds_documents(path, suffix, text_key):
        reason = f"{suffix} file without documents (no field '{text_key}')"
    else:
        return False
    skipped[reason] += 1
    return True


def _holds_documents(path: Path, suffix: str, text_key: str) -> bool:
    try:
        with gzip.open(path) if suffix.endswith(".gz") else path.open("rb") as file:
            head = file.read(_PROBE_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    except (OSError, EOFError):
        return True  # reading it names the error
    line, newline, _ = head.partition(b"\n")
    if head.startswith(b"[") or not newline:
        return json.dumps(text_key).encode() in head
    try:
        return text_key in json.loads(line)
    except (ValueError, TypeError, RecursionError):
        return False


def has_zstd() -> bool:
    """Return whether `.zst` files can be read."""
    return importlib.util.find_spec("zstandard") is not None


def format_of(path: Path) -> str | None:
    """Return the suffix of a file name in `FORMATS`, or None."""
    return next((suffix for suffix in FORMATS if path.name.lower().endswith(suffix)), None)


def skipped_lines(skipped: Counter[str]) -> list[str]:
    """Return counts and reasons, such as `2 x hidden file`."""
    return [f"{count:,} x {reason}" for reason, count in sorted(skipped.items())]


def identify(path: Path, option: str) -> dict[str, Any]:
    """Return the identity of a file's content: path, size, times of change and three samples.

    The time of the last status change cannot be set by programs, so it reveals a change that kept size and
    modification time.

    Raises:
        DataError: for an unreadable file.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        status = path.stat()
        with path.open("rb") as file:
            for start in (0, status.st_size // 2, max(status.st_size - _PROBE_BYTES, 0)):
                file.seek(start)
                digest.update(file.read(_PROBE_BYTES))
    except OSError as error:
        raise unreadable(path, option, error) from error
    return {
        "path": str(path),
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
        "probe": digest.hexdigest(),
    }


def unreadable(path: Path, option: str, error: OSError) -> DataError:
    """Return the error of a file that the system cannot read."""
    return DataError(
        f"{option}: {path} cannot be read ({error.strerror or error}); "
        "check that it exists, its permissions and the disk."
    )
