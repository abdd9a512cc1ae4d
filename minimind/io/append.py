"""Append-only files that lose no record while the disk is full."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from pathlib import Path

from .reading import open_handle

# Records held back while the disk refuses them: some 100,000 reports.
MAX_PENDING_BYTES = 64 << 20


class AppendFile:
    """Appends records to a file; what the disk refuses stays in memory and is retried with the next record.

    Not thread-safe.

    Attributes:
        dropped: records lost because more than `MAX_PENDING_BYTES` were pending.
    """

    def __init__(self, path: Path, on_error: Callable[[OSError], None]) -> None:
        """Store the arguments; the file is opened, and created if needed, by the first record.

        Args:
            on_error: called when the disk begins to refuse records, not again until one was written.
        """
        self.dropped = 0
        self._path, self._on_error = path, on_error
        self._pending: deque[bytes] = deque()
        self._pending_bytes = 0
        self._handle: int | None = None
        self._size = 0
        self._failing = False

    @property
    def num_pending(self) -> int:
        """Number of records that are not in the file yet."""
        return len(self._pending)

    def append(self, record: bytes) -> None:
        """Append a record after all pending ones. Never raises OSError."""
        self._pending.append(record)
        self._pending_bytes += len(record)
        while self._pending_bytes > MAX_PENDING_BYTES:
            self._pending_bytes -= len(self._pending.popleft())
            self.dropped += 1
        self.retry()

    def retry(self) -> None:
        """Write the pending records. Never raises OSError."""
        try:
            self._write_pending()
            self._failing = False
        except OSError as error:
            if not self._failing:
                self._failing = True
                self._on_error(error)

    def sync(self) -> None:
        """Write the pending records and `fsync` the file.

        Raises:
            OSError: when the disk refuses; with the path as `filename`.
        """
        try:
            self._write_pending()
            if self._handle is not None:
                os.fsync(self._handle)
        except OSError as error:
            error.filename = str(self._path)
            raise

    def close(self) -> None:
        """Try once more to write the pending records, then close the file."""
        self.retry()
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _write_pending(self) -> None:
        if self._pending and self._handle is None:
            self._handle = _open(self._path)
            self._size = os.fstat(self._handle).st_size
        while self._pending:
            assert self._handle is not None
            # An earlier attempt may have written a part of the record.
            if os.fstat(self._handle).st_size != self._size:
                os.ftruncate(self._handle, self._size)
            record = self._pending[0]
            rest = memoryview(record)
            while rest:
                rest = rest[os.write(self._handle, rest) :]
            self._size += len(record)
            self._pending_bytes -= len(record)
            self._pending.popleft()


def _open(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):
        flags |= getattr(os, name, 0)
    return open_handle(path, flags)
