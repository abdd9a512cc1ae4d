"""Read JSON files that anyone may have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        OSError: when the file cannot be read or is not a regular file: a FIFO would block.
        ValueError: when it is not JSON, not UTF-8, or nested too deeply to be parsed.
    """
    if path.exists() and not path.is_file():
        raise OSError(None, "not a regular file", str(path))
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
