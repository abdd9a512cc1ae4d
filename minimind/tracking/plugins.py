"""Trackers of the caller, and of other packages by the entry points `minimind.trackers`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..config.entry_points import load_plugin
from ..errors import ConfigError

GROUP = "minimind.trackers"


@dataclass(frozen=True)
class TrackedRun:
    """Description of a run for a tracker.

    Attributes:
        folder: the output folder, where a tracker may keep files.
        project: the option `project`.
        name: the option `run_name`, by default the name of the folder.
        start_step: steps done; values of later steps that an earlier part of the run logged are invalid.
        options: the configuration, as numbers, text and booleans.
        environment: versions, hardware and launch, as JSON values.
        run_id: `run_id` of the tracker in the part of the run that is resumed, else None.
    """

    folder: Path
    project: str
    name: str
    start_step: int
    options: Mapping[str, bool | int | float | str]
    environment: Mapping[str, Any]
    run_id: str | None


class Tracker(Protocol):
    """Gets the metrics of a run on the main process. Subclass it, or pass any object with these methods.

    One background thread calls all trackers, so a slow one delays no step. A tracker that raises is dropped
    with one warning, and training continues. After a rewind `finish` and `start` are called again. Set the
    attribute `run_id` to a text to get it back when the run is resumed.
    """

    run_id: str | None = None

    def start(self, run: TrackedRun) -> None:
        """Open the tracker."""

    def log(self, values: Mapping[str, int | float], step: int) -> None:
        """Log numbers by the names of metrics.jsonl; `step` optimizer steps are done."""

    def log_text(self, name: str, text: str, step: int) -> None:
        """Log a text, such as a generated sample."""

    def finish(self) -> None:
        """Write what is pending and close the tracker."""


def load_tracker(name: str) -> Any:
    """Return a new tracker of the package that registered `name`.

    Raises:
        ConfigError: when there is no such entry point, or it cannot be loaded.
    """
    return load_plugin(GROUP, name, "--tracker")()


def check_tracker(tracker: Any) -> None:
    """Refuse an object that is no tracker.

    Raises:
        ConfigError: naming the missing methods.
    """
    missing = [name for name in ("start", "log") if not callable(getattr(tracker, name, None))]
    if missing or isinstance(tracker, type):
        raise ConfigError(
            f"trackers= got {tracker!r}, which is no tracker; pass an object with the methods start and log."
        )
