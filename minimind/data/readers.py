"""Read documents from JSONL, plain text and Parquet files, one document in memory at a time."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from ..errors import DataError

FORMATS = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz", ".parquet")
# Longer plain text files become several documents, so that they need not fit in memory.
TEXT_PIECE_BYTES = 1 << 20
_PROBE_BYTES = 1 << 16
_BOM = b"\xef\xbb\xbf"
_FIX = "fix it, or pass --bad-lines skip to skip and count invalid lines."


def find_files(patterns: Sequence[str], option: str) -> list[Path]:
    """Return the data files of paths, folders and globs, each once, folders in sorted order.

    Args:
        patterns: paths, folders or globs; `~` is expanded.
        option: `--data` or `--val-data`, named in errors.

    Raises:
        DataError: for a path that does not exist or matches no file, and for an unknown suffix.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        found.update(dict.fromkeys(_matches(pattern, option)))
    return list(found)


def _matches(pattern: str, option: str) -> list[Path]:
    path = Path(pattern).expanduser()
    readable = ", ".join(FORMATS)
    if path.is_file():
        if format_of(path) is None:
            raise DataError(f"{option} {pattern} has an unknown suffix; use one of {readable}.")
        return [path.resolve()]
    if path.is_dir():
        candidates = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
    elif glob.has_magic(pattern):
        candidates = [Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name)]
    else:
        raise DataError(f"{option} {pattern} does not exist; pass a file, a folder or a glob.")
    files = sorted(candidate.resolve() for candidate in candidates if format_of(candidate))
    if not files:
        where = "contains" if path.is_dir() else "matches"
        raise DataError(f"{option} {pattern} {where} no data file; use one of {readable}.")
    return files


def format_of(path: Path) -> str | None:
    """Return the suffix of a file name in `FORMATS`, or None."""
    return next((suffix for suffix in FORMATS if path.name.lower().endswith(suffix)), None)


def identify(path: Path, option: str) -> dict[str, Any]:
    """Return the identity of a file's content: path, size, modification time and three samples.

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
        raise _unreadable(path, option, error) from error
    return {
        "path": str(path),
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "probe": digest.hexdigest(),
    }


@dataclass
class Reading:
    """Counts of one file while it is read.

    Attributes:
        empty: documents of only white space, which are dropped.
        bad_lines: skipped invalid lines by reason.
        done_bytes: bytes of the file on the disk read so far.
    """

    empty: int = 0
    bad_lines: Counter[str] = field(default_factory=Counter)
    done_bytes: int = 0


class _LineError(Exception):
    """An invalid line; the argument is the reason."""


@dataclass(frozen=True)
class TextFile:
    """One data file.

    Attributes:
        path: the suffix determines the format.
        option: the option that named it, for errors.
        text_key: field of a JSON object or Parquet row that contains the text.
        bad_lines: raise for an invalid line, or count it.
    """

    path: Path
    option: str
    text_key: str = "text"
    bad_lines: Literal["error", "skip"] = "error"

    def documents(self, reading: Reading) -> Iterator[str]:
        """Yield the non-empty documents and count dropped ones in `reading`.

        Raises:
            DataError: with file and line for an invalid line, or for an unreadable file.
        """
        suffix = format_of(self.path)
        try:
            if suffix == ".parquet":
                yield from self._kept(self._parquet_texts(reading), reading)
                return
            with self.path.open("rb") as raw:
                lines = gzip.GzipFile(fileobj=raw) if suffix and suffix.endswith(".gz") else raw
                read = self._json_texts if suffix and suffix.startswith(".jsonl") else self._plain_texts
                yield from self._kept(read(lines, raw, reading), reading)  # type: ignore[arg-type]
        except OSError as error:
            raise _unreadable(self.path, self.option, error) from error

    def _kept(self, texts: Iterator[str], reading: Reading) -> Iterator[str]:
        for text in texts:
            if text and not text.isspace():
                yield text
            else:
                reading.empty += 1

    def _bad(self, line: int, reason: str, reading: Reading) -> None:
        if self.bad_lines == "error":
            raise DataError(f"{self.path}:{line}: {reason}; {_FIX}")
        reading.bad_lines[reason] += 1

    def _json_texts(self, file: BinaryIO, raw: BinaryIO, reading: Reading) -> Iterator[str]:
        for number, line in self._lines(file, raw, reading, limit=-1):
            if not line.strip():
                continue
            try:
                yield _text_of_json(line, self.text_key)
            except _LineError as bad:
                self._bad(number, str(bad), reading)

    def _plain_texts(self, file: BinaryIO, raw: BinaryIO, reading: Reading) -> Iterator[str]:
        pieces: list[str] = []
        size, carried = 0, b""
        for number, line in self._lines(file, raw, reading, limit=TEXT_PIECE_BYTES):
            line = carried + line
            carried = b""
            if not line.endswith(b"\n"):
                # A line cut by its length may end inside a character; its bytes join the next piece.
                cut = _whole_characters(line)
                line, carried = line[:cut], line[cut:]
            try:
                pieces.append(_decode(line))
                size += len(line)
            except _LineError as bad:
                self._bad(number, str(bad), reading)
            if size >= TEXT_PIECE_BYTES:
                yield "".join(pieces)
                pieces, size = [], 0
        if carried:
            self._bad(number, "broken UTF-8", reading)
        if pieces:
            yield "".join(pieces)

    def _lines(
        self, file: BinaryIO, raw: BinaryIO, reading: Reading, limit: int
    ) -> Iterator[tuple[int, bytes]]:
        """Yield (line number, bytes), at most `limit` bytes at a time; -1 for whole lines."""
        number = 1
        first = True
        while True:
            try:
                line = file.readline(limit)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                reason = "the gzip data ends early" if isinstance(error, EOFError) else "damaged gzip data"
                self._bad(number, reason, reading)
                return
            if number % 64 == 1 or not line:
                reading.done_bytes = raw.tell()
            if not line:
                return
            if first:
                line, first = line.removeprefix(_BOM), False
            yield number, line
            number += line.endswith(b"\n")

    def _parquet_texts(self, reading: Reading) -> Iterator[str]:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise DataError(
                f"{self.option}: reading {self.path} needs the package pyarrow, which is not installed; "
                "pip install pyarrow."
            ) from error
        try:
            with parquet.ParquetFile(self.path) as file:
                names = file.schema_arrow.names
                if self.text_key not in names:
                    raise DataError(
                        f"{self.path} has no column '{self.text_key}'; "
                        f"set --text-key to one of {', '.join(names)}."
                    )
                yield from self._parquet_rows(file, reading)
        except pyarrow.ArrowInvalid as error:
            raise DataError(
                f"{self.option}: {self.path} is not a valid Parquet file ({error}); "
                "download or write it again."
            ) from error

    def _parquet_rows(self, file: Any, reading: Reading) -> Iterator[str]:
        num_rows, size = max(file.metadata.num_rows, 1), self.path.stat().st_size
        row = 0
        # Small batches and one thread: otherwise pyarrow decodes whole row groups ahead.
        for batch in file.iter_batches(batch_size=256, columns=[self.text_key], use_threads=False):
            for value in batch.column(0):
                row += 1
                try:
                    yield _checked_text(_python_value(value))
                except _LineError as bad:
                    self._bad(row, str(bad), reading)
            reading.done_bytes = size * row // num_rows


def _unreadable(path: Path, option: str, error: OSError) -> DataError:
    return DataError(
        f"{option}: {path} cannot be read ({error.strerror or error}); "
        "check that it exists, its permissions and the disk."
    )


def _text_of_json(line: bytes, text_key: str) -> str:
    try:
        record = json.loads(_decode(line))
    except (ValueError, RecursionError) as error:
        raise _LineError("invalid JSON") from error
    if not isinstance(record, dict):
        raise _LineError("not a JSON object")
    if text_key not in record:
        raise _LineError(f"no '{text_key}' field (--text-key names the field)")
    text = _checked_text(record[text_key])
    if b"\\u" in line:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            # JSON can escape half of a surrogate pair, which is no character.
            raise _LineError("half of a surrogate pair in the text") from error
    return text


def _checked_text(text: Any) -> str:
    if not isinstance(text, str):
        raise _LineError("the text is not a string")
    return text


def _python_value(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise _LineError("broken UTF-8") from error


def _decode(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise _LineError("broken UTF-8") from error


def _whole_characters(data: bytes) -> int:
    """Return the length of `data` without an incomplete UTF-8 character at its end."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:
            width = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if back < width else len(data)
        if byte < 0x80:
            break
    return len(data)
