"""Read documents from JSON, plain text and Parquet files, one document in memory at a time."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from ..errors import DataError, needs_package
from .chat import CHAT_KEYS, ChatRenderer
from .encodings import DAMAGED, ZstdReader, binary_format, damage, likely_encoding
from .files import format_of, has_zstd, unreadable

# Longer plain text files become several documents, so that they need not fit in memory.
TEXT_PIECE_BYTES = 1 << 20
_READ_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
# What separates values, the beginning and the end of an array.
_BETWEEN = re.compile(r"[\s,]*")
_FIX = "fix it, or pass --bad-lines skip to skip and count invalid lines."


@dataclass
class Reading:
    """Counts of one file while it is read.

    Attributes:
        empty: documents of only white space, which are dropped.
        conversations: documents rendered by a chat template.
        bad_lines: skipped invalid lines by reason.
        done_bytes: bytes of the file on the disk read so far.
    """

    empty: int = 0
    conversations: int = 0
    bad_lines: Counter[str] = field(default_factory=Counter)
    done_bytes: int = 0

    def keeps(self, text: str) -> bool:
        """Return whether a document is more than white space, and count one that is not."""
        kept = bool(text) and not text.isspace()
        self.empty += not kept
        return kept


class _LineError(Exception):
    """An invalid line; the argument is the reason."""


@dataclass(frozen=True)
class TextFile:
    """One data file.

    Attributes:
        path: the suffix determines the format.
        option: the option that named it, for errors.
        text_key: field of a JSON object, or column of a Parquet or Arrow row, that contains the text.
        bad_lines: raise for an invalid line, or count it.
        chat: renders lists of messages; None where they are invalid.
    """

    path: Path
    option: str
    text_key: str = "text"
    bad_lines: Literal["error", "skip"] = "error"
    chat: ChatRenderer | None = None

    def documents(self, reading: Reading) -> Iterator[str]:
        """Yield the non-empty documents and count dropped ones in `reading`.

        Raises:
            DataError: with file and line for an invalid line, or for an unreadable file.
        """
        suffix = format_of(self.path) or ""
        try:
            if suffix in (".parquet", ".arrow"):
                yield from filter(reading.keeps, self._columnar_texts(suffix, reading))
                return
            with self.path.open("rb") as raw:
                file = self._decompressed(raw, suffix)
                read = self._plain_texts if suffix.startswith(".txt") else self._json_texts
                if self._check_text(file) and suffix in (".json", ".json.gz", ".json.zst"):
                    read = self._json_array_texts
                yield from filter(reading.keeps, read(file, raw, reading))
        except OSError as error:
            raise unreadable(self.path, self.option, error) from error

    def _decompressed(self, raw: io.BufferedReader, suffix: str) -> io.BufferedReader:
        if suffix.endswith(".gz"):
            return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
        if suffix.endswith(".zst"):
            if not has_zstd():
                raise DataError(f"{self.option}: reading {self.path} needs zstandard; pip install zstandard.")
            return io.BufferedReader(ZstdReader(raw))
        return raw

    def _check_text(self, file: io.BufferedReader) -> bool:
        """Refuse a file whose first bytes are not UTF-8 text; return whether it is not JSON lines.

        Errors of compressed data are left to the reader, which names the line.
        """
        try:
            head = file.peek(_READ_BYTES)
        except DAMAGED:
            return False
        if (found := binary_format(head)) is not None:
            kind, fix = found
            raise DataError(f"{self.option}: {self.path} is not UTF-8 text but seems to be {kind}; {fix}.")
        first = head.removeprefix(_BOM).lstrip()
        if not first.startswith(b"{"):
            return first.startswith(b"[")
        line, newline, _ = first.partition(b"\n")
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            # An object over several lines, unless it is a damaged line.
            return bool(newline) and line.rstrip() == b"{"
        return False

    def _bad(self, line: int | str, reason: str | Exception, reading: Reading, data: bytes = b"") -> None:
        reason = "broken UTF-8" if isinstance(reason, UnicodeDecodeError) else str(reason)
        if self.bad_lines == "error":
            hint = ""
            if encoding := data and likely_encoding(data):
                hint = f" (the file seems to be {encoding}; convert it to UTF-8)"
            raise DataError(f"{self.path}:{line}: {reason}{hint}; {_FIX}")
        reading.bad_lines[reason] += 1

    def _json_texts(self, file: BinaryIO, raw: BinaryIO, reading: Reading) -> Iterator[str]:
        for number, line in self._lines(file, raw, reading, limit=-1):
            if not line.strip():
                continue
            try:
                yield self._document_of_json(line, reading)
            except (_LineError, UnicodeDecodeError) as bad:
                self._bad(number, bad, reading, line)

    def _json_array_texts(self, file: BinaryIO, raw: BinaryIO, reading: Reading) -> Iterator[str]:
        """Yield the documents of one JSON array, or of objects that span lines."""
        decoder, utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8-sig")()
        buffer, position, item, size, ended, in_array = "", 0, 0, _READ_BYTES, False, False
        while True:
            position = _BETWEEN.match(buffer, position).end()  # type: ignore[union-attr]
            if not item and not in_array and buffer.startswith("[", position):
                in_array, position = True, position + 1
                continue
            if in_array and buffer.startswith("]", position):
                in_array, position = False, position + 1
                continue
            try:
                record, position = decoder.raw_decode(buffer, position)
            except (ValueError, RecursionError):  # incomplete
                if ended:
                    if position < len(buffer) or in_array:
                        self._bad(f"item {item + 1}", "invalid JSON", reading)
                    return
                data, size = b"", size * 2
                try:
                    data = file.read(size)
                    buffer, position = buffer[position:] + utf8.decode(data, final=not data), 0
                except DAMAGED as error:
                    self._bad(f"item {item + 1}", damage(error), reading)
                    return
                except UnicodeDecodeError as error:
                    self._bad(f"item {item + 1}", error, reading, data)
                    return
                reading.done_bytes, ended = raw.tell(), not data
                continue
            item, size = item + 1, _READ_BYTES
            try:
                yield self._document(record, reading)
            except _LineError as bad:
                self._bad(f"item {item}", bad, reading)

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
                pieces.append(line.decode())
                size += len(line)
            except UnicodeDecodeError as bad:
                self._bad(number, bad, reading, line)
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
            except DAMAGED as error:
                self._bad(number, damage(error), reading)
                return
            if number % 64 == 1 or not line:
                reading.done_bytes = raw.tell()
            if not line:
                return
            if first:
                line, first = line.removeprefix(_BOM), False
            yield number, line
            number += line.endswith(b"\n")

    def _columnar_texts(self, suffix: str, reading: Reading) -> Iterator[str]:
        try:
            import pyarrow
        except ImportError as error:
            raise DataError(needs_package(f"{self.option}: reading {self.path}", "pyarrow")) from error
        kind = "Parquet" if suffix == ".parquet" else "Arrow"
        batches = _parquet_batches if suffix == ".parquet" else _arrow_batches
        row = 0
        try:
            for names, values, done in batches(self.path, self.text_key):
                if values is None:
                    raise DataError(
                        f"{self.path} has no column '{self.text_key}'; "
                        f"set --text-key to one of {', '.join(names)}."
                    )
                for value in values:
                    row += 1
                    try:
                        yield self._checked(value.as_py(), reading)
                    except (_LineError, UnicodeDecodeError) as bad:
                        self._bad(row, bad, reading)
                reading.done_bytes = int(self.path.stat().st_size * done)
        except pyarrow.ArrowInvalid as error:
            raise DataError(
                f"{self.option}: {self.path} is not a valid {kind} file ({error}); "
                "download or write it again."
            ) from error

    def _document_of_json(self, line: bytes, reading: Reading) -> str:
        text = line.decode()
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _LineError("invalid JSON") from error
        return self._document(record, reading)

    def _document(self, record: Any, reading: Reading) -> str:
        """Return the document of a JSON object."""
        if not isinstance(record, dict):
            raise _LineError("not a JSON object")
        if self.text_key not in record:
            chats = [key for key in CHAT_KEYS if isinstance(record.get(key), list)]
            hint = f"; --text-key {chats[0]} renders its conversations" if chats else ""
            raise _LineError(f"no '{self.text_key}' field (--text-key names the field{hint})")
        text = self._checked(record[self.text_key], reading)
        if not text.isascii():
            try:
                # In slices, which bound the memory of a long document.
                for start in range(0, len(text), _READ_BYTES):
                    text[start : start + _READ_BYTES].encode()
            except UnicodeEncodeError as error:
                # JSON can escape half of a surrogate pair, which is no character.
                raise _LineError("half of a surrogate pair in the text") from error
        return text

    def _checked(self, value: Any, reading: Reading) -> str:
        """Return the text of a value: a string, or a conversation."""
        if isinstance(value, str):
            return value
        if self.chat is None:
            raise _LineError("the text is not a string")
        try:
            text = self.chat.render(value)
        except ValueError as error:
            raise _LineError(str(error)) from error
        reading.conversations += 1
        return text


def _parquet_batches(path: Path, column: str) -> Iterator[tuple[list[str], Any, float]]:
    """Yield column names, the values of a column or None without it, and the share of the file read."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        names, done = file.schema_arrow.names, 0
        if column not in names:
            yield names, None, 0.0
        # Small batches and one thread: otherwise pyarrow decodes whole row groups ahead.
        for batch in file.iter_batches(batch_size=256, columns=[column], use_threads=False):
            done += batch.num_rows
            yield names, batch.column(0), done / max(file.metadata.num_rows, 1)


def _arrow_batches(path: Path, column: str) -> Iterator[tuple[list[str], Any, float]]:
    """Yield what `_parquet_batches` yields; `datasets` writes streams, other programs also files."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        is_file, size = source.read(6) == b"ARROW1", source.size()
        source.seek(0)
        opened = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
        names = opened.schema.names
        if column not in names:
            yield names, None, 0.0
        batches = map(opened.get_batch, range(opened.num_record_batches)) if is_file else opened
        for batch in batches:
            yield names, batch.column(column), source.tell() / size


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
