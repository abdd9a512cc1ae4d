"""Reads regular files only, and JSON whose every defect is a ValueError."""

from __future__ import annotations

import errno
import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading. A FIFO or device is refused, where `open` could block forever.

    Raises:
        OSError: also when `path` is not a regular file.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    return os.fdopen(open_handle(path, flags), "rb")


def open_handle(path: Path, flags: int) -> int:
    """Return a file descriptor of a regular file, as `os.open` does; see `open_regular`."""
    handle = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return handle


def read_bytes(path: Path) -> bytes:
    """Read a regular file; see `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def parse_json(text: str | bytes, **hooks: Any) -> Any:
    """Parse JSON; `hooks` are passed to `json.loads`.

    Raises:
        ValueError: also for nesting that exceeds the recursion limit, and for text that is not UTF-8.
    """
    try:
        return json.loads(text, **hooks)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; see `open_regular` and `parse_json`."""
    return parse_json(read_bytes(path))
