"""metrics.jsonl: one JSON object per line, readable while the run continues."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..io.append import AppendFile
from ..io.atomic import write_text
from ..io.reading import parse_json, read_bytes

_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}

_log = logging.getLogger(__name__)


class MetricsFile:
    """Appends one line per report.

    A line has `step`, `time` (ISO 8601, UTC), `kind` (`train`, `evaluation`, `score`, `rewind` or `text`) and
    the values by name: numbers or strings. A number that is not finite is null, because JSON has no NaN.
    Lines that the disk refuses stay in memory and are retried; see `AppendFile`.
    """

    def __init__(self, path: Path, *, keep_to_step: int, warn: Callable[[str], None] = _log.warning) -> None:
        """Open the file and remove lines of later steps, which the resumed run repeats.

        Args:
            path: the file; created if missing.
            keep_to_step: lines of later steps are removed; 0 removes all lines.
            warn: shows a sentence to the user.

        Raises:
            OSError: when the file cannot be rewritten; it is unchanged.
        """
        self._path, self._warn = path, warn
        if path.exists():
            old = read_bytes(path).decode(errors="replace")
            kept = "".join(_lines_up_to(old.split("\n"), keep_to_step))
            if kept != old:
                write_text(path, kept)
        self._file = AppendFile(path, self._report)

    def write(self, values: Mapping[str, Any], step: int) -> None:
        """Append one line. Never raises OSError."""
        kind = "train"
        if any(name.startswith("val_") for name in values):
            kind = "evaluation"
        elif any(name.startswith("cloze_") for name in values):
            kind = "score"
        elif "rewound_from" in values:
            kind = "rewind"
        elif all(isinstance(value, str) for value in values.values()):
            kind = "text"
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        plain = {name: _plain(value) for name, value in values.items()}
        record = {"step": step, "time": now, "kind": kind, **plain}
        # Readable in any script, except for characters that some programs read as the end of a line.
        line = json.dumps(record, allow_nan=False, ensure_ascii=False).translate(_LINE_ENDS)
        # An unpaired surrogate becomes an escape, which is also JSON.
        self._file.append((line + "\n").encode(errors="backslashreplace"))

    def sync(self) -> None:
        """Wait until all lines are on the disk.

        Raises:
            OSError: when the disk refuses.
        """
        self._file.sync()

    def close(self) -> None:
        """Write pending lines and close the file."""
        self._file.close()
        if lost := self._file.num_pending + self._file.dropped:
            self._warn(f"{lost} lines of {self._path} could not be written and are lost.")

    def _report(self, error: OSError) -> None:
        self._warn(
            f"{self._path.name} cannot be written ({error.strerror}); new lines stay in memory until the "
            "disk of --output-dir accepts them."
        )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file as dicts, without incomplete or damaged ones.

    A number that is not finite is None, also where the file has `NaN` or 1e999.

    Raises:
        OSError: when `path` exists but cannot be read, or is not a regular file.
    """
    if not path.exists():
        return []
    parsed = map(parse_line, read_bytes(path).decode(errors="replace").split("\n"))
    return [line for line in parsed if line is not None]


def parse_line(text: str) -> dict[str, Any] | None:
    """Return a line of the file, None for an incomplete or damaged one."""
    with suppress(ValueError):
        line = parse_json(text, parse_float=_finite, parse_int=_bounded, parse_constant=lambda _: None)
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            return line
    return None


def _finite(digits: str) -> float | None:
    number = float(digits)
    return number if math.isfinite(number) else None


def _bounded(digits: str) -> int | None:
    """Return an integer that a float can represent, else None."""
    return int(digits) if len(digits) <= 18 else None


def last_with(path: Path, name: str) -> dict[str, Any] | None:
    """Return the last line that has the value `name`, or None."""
    return next((line for line in reversed(read_metrics(path)) if name in line), None)


def _lines_up_to(lines: Iterable[str], step: int) -> Iterator[str]:
    """Yield the complete lines of steps up to `step`."""
    for line in lines:
        try:
            kept = step > 0 and parse_json(line)["step"] <= step
        except (ValueError, TypeError, KeyError):
            continue
        if kept:
            yield line + "\n"


def _plain(value: Any) -> int | float | str | None:
    if isinstance(value, str):
        return value
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None
