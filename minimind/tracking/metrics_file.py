"""metrics.jsonl: one JSON object a line, readable while the run goes on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from ..io.atomic import write_text

_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}


class MetricsFile:
    """Appends the numbers of a step as a line that is on its way to the disk when `write` returns.

    A line has `step`, `time` (ISO 8601, UTC), `kind` (`train`, `evaluation`, `rewind` or `text`) and the
    values by name, which are numbers or text; a number that is not finite is null, for JSON has no other
    word for it.
    """

    def __init__(self, path: Path, *, keep_to_step: int) -> None:
        """Open the file, leaving out what an earlier run wrote beyond the step that this one goes on from.

        Args:
            path: the file; made where it is missing.
            keep_to_step: lines of later steps go; 0 is a new start and keeps none.
        """
        self._path = path
        self._file = self._open(keep_to_step)

    def write(self, values: Mapping[str, Any], step: int) -> None:
        """Append one line.

        Raises:
            OSError: when the disk refuses.
        """
        kind = "train"
        if any(name.startswith("val_") for name in values):
            kind = "evaluation"
        elif "rewound_from" in values:
            kind = "rewind"
        elif all(isinstance(value, str) for value in values.values()):
            kind = "text"
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        plain = {name: _plain(value) for name, value in values.items()}
        record = {"step": step, "time": now, "kind": kind, **plain}
        # Any script as people read it, but for what some programs take for the end of a line.
        line = json.dumps(record, allow_nan=False, ensure_ascii=False).translate(_LINE_ENDS)
        self._file.write(line + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until what was written is on the disk.

        Raises:
            OSError: when the disk refuses.
        """
        os.fsync(self._file.fileno())

    def go_back(self, step: int) -> None:
        """Leave out the lines of later steps.

        Raises:
            OSError: when the disk refuses.
        """
        self._file.close()
        self._file = self._open(step)

    def _open(self, keep_to_step: int) -> TextIO:
        if self._path.exists():
            with self._path.open(encoding="utf-8", errors="replace") as old:
                text = "".join(_lines_up_to(old, keep_to_step))
            write_text(self._path, text)
        # Half a pair of surrogates becomes an escape, which is JSON as well.
        return self._path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file, without those that a crash, or a run that goes on, cut short.

    A number that is not finite is None, however it is written.
    """
    if not path.exists():
        return []
    lines = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            with suppress(ValueError, RecursionError):
                line = json.loads(
                    text, parse_float=_finite, parse_int=_of_this_world, parse_constant=lambda _: None
                )
                if isinstance(line, dict) and isinstance(line.get("step"), int):
                    lines.append(line)
    return lines


def _finite(digits: str) -> float | None:
    number = float(digits)
    return number if math.isfinite(number) else None


def _of_this_world(digits: str) -> int | None:
    """Return a whole number that a float can hold; no run counts as far as others go."""
    return int(digits) if len(digits) <= 18 else None


def last_with(path: Path, name: str) -> tuple[int, Any] | None:
    """Return the last step whose line has the value `name`, and the value; None where there is none."""
    if not path.exists():
        return None
    found = None
    with path.open(encoding="utf-8") as file:
        for record in map(json.loads, file):
            if name in record:
                found = record["step"], record[name]
    return found


def _lines_up_to(lines: Iterable[str], step: int) -> Iterator[str]:
    """Yield the whole lines of steps up to `step`; one that a crash cut short is not whole."""
    for line in lines:
        try:
            kept = step > 0 and json.loads(line)["step"] <= step
        except (ValueError, TypeError, KeyError):
            continue
        if kept:
            yield line.rstrip("\n") + "\n"


def _plain(value: Any) -> int | float | str | None:
    if isinstance(value, str):
        return value
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None
