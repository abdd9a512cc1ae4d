"""Checksums of the files of a token cache: CRC-32 per 256 KiB chunk, checked on first use.

The checksums of `NAME` are in `NAME.crc`, 4 bytes per chunk: 3 MB for 100 billion tokens. A large file is
checked chunk by chunk as it is read, so opening it takes constant time.
"""

from __future__ import annotations

import mmap
import os
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

CHUNK_BYTES = 1 << 18
MANIFEST = "manifest.json"


class ChecksummedFile:
    """Writes a file and, when it is closed, the checksums of its chunks."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("wb")
        self._checksums: list[int] = []
        self._crc = self._filled = 0

    def write(self, data: Any) -> None:
        """Append bytes or an array."""
        view = memoryview(data).cast("B") if memoryview(data).nbytes else memoryview(b"")
        self._file.write(view)
        while view:
            part = view[: CHUNK_BYTES - self._filled]
            self._crc, self._filled = zlib.crc32(part, self._crc), self._filled + len(part)
            if self._filled == CHUNK_BYTES:
                self._checksums.append(self._crc)
                self._crc = self._filled = 0
            view = view[len(part) :]

    def close(self) -> None:
        """Force the file and its checksums to the disk."""
        if self._filled:
            self._checksums.append(self._crc)
        with _checksum_path(self._path).open("wb") as checksums:
            checksums.write(np.array(self._checksums, np.uint32).tobytes())
            for file in (self._file, checksums):
                file.flush()
                os.fsync(file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close the file of a build that failed."""
        self._file.close()


class CheckedArray:
    """A memory-mapped array whose chunks are checked when they are first indexed.

    Attributes:
        unchecked: (chunks,) which chunks have not been checked yet; shared by maps of the same file.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], unchecked: NDArray[np.bool_] | None = None) -> None:
        """Map a file.

        Raises:
            DataError: later, on access, when a chunk does not match its checksum; the message names the file.
        """
        self._path = path
        with path.open("rb") as file:
            self.mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # Views of the array keep the map alive.
        self.array: NDArray[Any] = np.frombuffer(self.mapped, dtype)
        self._checksums = read_checksums(path)
        self.unchecked = np.ones(len(self._checksums), bool) if unchecked is None else unchecked

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, where: Any) -> Any:
        if self.unchecked.any():
            size = self.array.itemsize
            if isinstance(where, slice):
                start, stop, _ = where.indices(len(self.array))
                self._check(slice(start * size // CHUNK_BYTES, -(-stop * size // CHUNK_BYTES)))
            else:
                self._check(np.asarray(where) * size // CHUNK_BYTES)
        return self.array[where]

    def check_spans(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        """Check the chunks of spans of elements."""
        if not self.unchecked.any():
            return
        size, count = self.array.itemsize, len(self.unchecked)
        first, last = starts * size // CHUNK_BYTES, ((starts + lengths) * size - 1) // CHUNK_BYTES
        opened = np.bincount(first, minlength=count + 1)[: count + 1]
        closed = np.bincount(last + 1, minlength=count + 1)[: count + 1]
        self._check(np.cumsum(opened - closed)[:count] > 0)

    def _check(self, chunks: Any) -> None:
        chosen = np.zeros_like(self.unchecked)
        chosen[chunks] = True
        for chunk in np.flatnonzero(chosen & self.unchecked).tolist():
            start = chunk * CHUNK_BYTES
            if zlib.crc32(memoryview(self.mapped)[start : start + CHUNK_BYTES]) != self._checksums[chunk]:
                # Without its manifest the build is incomplete, so the next start builds it again.
                with suppress(OSError):
                    (self._path.parent / MANIFEST).unlink()
                raise DataError(
                    f"the token cache is corrupt: {self._path} does not match its checksum at byte "
                    f"{start:,}. Run again, with --resume if the run has checkpoints; it is then tokenized "
                    "again."
                )
            self.unchecked[chunk] = False


def read_checksums(path: Path) -> NDArray[np.uint32]:
    """Return the checksums of the chunks of a file, none for a file without them."""
    checksums = _checksum_path(path)
    return np.fromfile(checksums, np.uint32) if checksums.exists() else np.empty(0, np.uint32)


def corrupt_chunk(path: Path) -> int | None:
    """Return the start of the first chunk of a file that does not match its checksum, or None."""
    checksums = read_checksums(path).tolist()
    with path.open("rb") as file:
        for number, expected in enumerate([*checksums, 0]):
            if zlib.crc32(file.read(CHUNK_BYTES)) != expected:
                return number * CHUNK_BYTES
    return None


def _checksum_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.crc")
