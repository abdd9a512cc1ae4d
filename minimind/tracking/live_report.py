"""Keeps `report.html` of a run up to date, from a thread of the main process."""

from __future__ import annotations

import logging
import os
import threading
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..io.atomic import write_text
from ..io.reading import open_regular, read_json
from ..run_folder import RunFolder
from .metrics_file import parse_line
from .report_page import DRAWN, MOST_SAMPLES, RunFacts, RunState, report_html, spread

# The first page, and the shortest time between two: a page may take at most this share of the time.
FIRST_SECONDS = 3.0
REFRESH_SECONDS = 15.0
SHARE_OF_TIME = 0.005
WORST_DOCUMENTS = 3

_log = logging.getLogger(__name__)


class LiveReport:
    """Writes `report.html` while a run continues, from the files of its folder.

    The thread reads new lines of metrics.jsonl and samples.jsonl and new spike reports. Training never waits
    for it. A disk that refuses the page is reported once.
    """

    def __init__(
        self,
        folder: RunFolder,
        facts: RunFacts,
        *,
        warnings: Sequence[str] = (),
        totals: Callable[[], Mapping[str, float]] = dict,
        warn: Callable[[str], None] = _log.warning,
    ) -> None:
        """Write nothing yet.

        Args:
            folder: of the run.
            facts: known at the start.
            warnings: list to which the terminal's warnings are appended.
            totals: returns the seconds by phase so far.
            warn: shows a sentence to the user.
        """
        self._folder, self._facts, self._warnings = folder, facts, warnings
        self._totals, self._warn = totals, warn
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="report", daemon=True)
        self._failed = self._finished = False
        self.reread()

    def __enter__(self) -> LiveReport:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not self._finished:
            reason = "Interrupted." if error is None else f"{type(error).__name__}: {error}."
            self.finish(reason, problem=True)

    def reread(self) -> None:
        """Read all files again: a resumed or rewound run has removed what it repeats."""
        with self._lock:
            self._state = RunState()
            self._metrics, self._samples = _Lines(self._folder.metrics), _Lines(self._folder.samples)
            self._spikes: dict[str, Mapping[str, Any]] = {}

    def finish(self, end: str, *, problem: bool = False) -> Path | None:
        """Write the last page, and return its path, or None where it could not be written."""
        self._finished = True
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._state.end, self._state.problem = end, problem
        self._write(REFRESH_SECONDS)
        # Unlike Path.exists, false where the folder cannot be read any more.
        return None if self._failed or not os.path.exists(self._folder.report) else self._folder.report

    def _run(self) -> None:
        interval = FIRST_SECONDS
        while not self._stop.wait(interval):
            began = time.thread_time()
            self._write(max(interval, REFRESH_SECONDS))
            interval = max(REFRESH_SECONDS, (time.thread_time() - began) / SHARE_OF_TIME)

    def _write(self, reload_seconds: float) -> None:
        # Before the first report the folder of a failed run is removed, which a page would prevent.
        if not os.path.exists(self._folder.metrics):
            return
        try:
            with self._lock:
                self._update()
                page = report_html(self._facts, self._state, reload_seconds)
            write_text(self._folder.report, page)
            self._failed = False
        except Exception as error:
            if not self._failed:
                self._failed = True
                reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
                self._warn(f"{self._folder.report} cannot be written ({reason}); training continues.")

    def _update(self) -> None:
        state = self._state
        for line in self._metrics.new():
            state.clock.add(line)
            state.step = max(state.step, line["step"])
            for name, value in line.items():
                if not isinstance(value, int | float):
                    continue
                state.last[name] = value
                if name in DRAWN:
                    steps, values = state.series.setdefault(name, (array("d"), array("d")))
                    steps.append(line["step"])
                    values.append(value)
        for line in self._samples.new():
            texts = state.samples.setdefault(str(line.get("prompt", "")), [])
            texts.append((line["step"], str(line.get("text", ""))))
            if len(texts) > 8 * MOST_SAMPLES:
                texts[:] = spread(texts, 4 * MOST_SAMPLES)
        for file in sorted(self._folder.spikes.glob("step-*.json")):
            if file.name not in self._spikes:
                self._spikes[file.name] = _worst_documents(file)
        state.spikes = [spike for _, spike in sorted(self._spikes.items()) if spike]
        state.warnings = list(self._warnings)
        with suppress(RuntimeError):  # a phase began meanwhile
            state.totals = self._totals()


class _Lines:
    """The complete lines that were appended to a file of JSON objects since the last look."""

    def __init__(self, path: Path) -> None:
        self._path, self._position = path, 0

    def new(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with open_regular(self._path) as file:
            file.seek(self._position)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._position += len(whole)
        parsed = map(parse_line, whole.decode(errors="replace").split("\n"))
        return [line for line in parsed if line is not None]


def _worst_documents(file: Path) -> Mapping[str, Any]:
    """Return a spike report with its worst documents only; empty for a damaged one."""
    try:
        report = read_json(file)
        documents = [document for document in report["documents"] if isinstance(document, dict)]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    infinite = [document for document in documents if not isinstance(document.get("loss"), int | float)]
    finite = [document for document in documents if isinstance(document.get("loss"), int | float)]
    finite.sort(key=lambda document: -document["loss"])
    return {**report, "documents": (infinite + finite)[:WORST_DOCUMENTS]}
