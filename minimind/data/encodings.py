"""Recognize what is not UTF-8 text, and decompress Zstandard data."""

from __future__ import annotations

import gzip
import io
import zlib
from typing import Any, BinaryIO

_BYTES = 1 << 16
_TO_TEXT = "convert it to text"
# First bytes, the name of the format, and how to fix it.
_FORMATS = (
    (b"\xff\xfe\0\0", "UTF-32 text", "convert it: iconv -f UTF-32 -t UTF-8"),
    (b"\0\0\xfe\xff", "UTF-32 text", "convert it: iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", "UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8"),
    (b"\x1f\x8b", "gzip data", "add .gz to its name"),
    (b"\x28\xb5\x2f\xfd", "Zstandard data", "add .zst to its name"),
    (b"BZh91AY&SY", "bzip2 data", "decompress it"),
    (b"\xfd7zXZ\0", "xz data", "decompress it"),
    (b"PK\x03\x04", "a ZIP archive or an Office document", "extract its text"),
    (b"%PDF-", "a PDF", "extract its text"),
    (b"{\\rtf", "an RTF document", _TO_TEXT),
    (b"PAR1", "a Parquet file", "name it .parquet"),
    (b"\x89PNG", "a PNG image", "remove it"),
    (b"\xff\xd8\xff", "a JPEG image", "remove it"),
    (b"SQLite format 3\0", "an SQLite database", _TO_TEXT),
)


class _ZstdEndsEarlyError(Exception):
    pass


def _zstd_errors() -> tuple[type[Exception], ...]:
    try:
        import zstandard
    except ImportError:
        return ()
    return (zstandard.ZstdError,)


DAMAGED: tuple[type[Exception], ...] = (
    EOFError,
    zlib.error,
    gzip.BadGzipFile,
    _ZstdEndsEarlyError,
    *_zstd_errors(),
)
"""What reading damaged compressed data raises."""


class ZstdReader(io.RawIOBase):
    """Decompresses a file of Zstandard frames."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame: Any = None
        self._compressed = self._data = b""

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; 0 at the end of the last frame."""
        import zstandard

        while not self._data:
            self._compressed = self._compressed or self._file.read(_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise _ZstdEndsEarlyError
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._data = self._frame.decompress(self._compressed)
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._data))
        buffer[:count], self._data = self._data[:count], self._data[count:]
        return count


def damage(error: Exception) -> str:
    """Return the reason of one of the errors `DAMAGED`."""
    if isinstance(error, _ZstdEndsEarlyError | EOFError):
        return f"the {'zstd' if isinstance(error, _ZstdEndsEarlyError) else 'gzip'} data ends early"
    return f"damaged {'gzip' if isinstance(error, zlib.error | gzip.BadGzipFile) else 'zstd'} data"


def binary_format(head: bytes) -> tuple[str, str] | None:
    """Return what the first bytes of a file seem to be and how to fix it, or None for text."""
    for magic, name, fix in _FORMATS:
        if head.startswith(magic):
            return name, fix
    sample = head[:4096]
    if sample.count(0) * 10 > len(sample):
        zeros = [sample[start::2].count(0) * 10 for start in (0, 1)]
        if max(zeros) > 4 * len(sample) // 2 and min(zeros) < len(sample) // 4:
            order = "BE" if zeros[0] > zeros[1] else "LE"
            return "UTF-16 text without a byte order mark", f"convert it: iconv -f UTF-16{order} -t UTF-8"
        return "binary data", _TO_TEXT
    return None


def likely_encoding(data: bytes) -> str | None:
    """Return the likely encoding of bytes that are not UTF-8, or None if they are."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        data = data[max(error.start - 2000, 0) : error.start + 2000]
    else:
        return None
    if sum(byte < 32 and byte not in b"\t\r\n\f\x1b" for byte in data) * 10 > len(data):
        return "binary data"
    try:
        text = data.decode("gb18030", "replace")
        marks = [character for character in text if ord(character) > 127]
        chinese = sum(
            "\u3000" <= character <= "\u9fff" or "\uff00" <= character <= "\uffef" for character in marks
        )
        if len(marks) >= 4 and chinese * 10 >= len(marks) * 9:
            return "GB18030 (GBK) text"
    except LookupError:
        pass
    return "Latin-1 or Windows-1252 text"
