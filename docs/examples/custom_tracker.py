"""A tracker of your own: metrics as a CSV file.

python custom_tracker.py corpus.jsonl

A package offers a tracker to the command line by an entry point, `--tracker csv` here:

    [project.entry-points."minimind.trackers"]
    csv = "my_package:CsvTracker"
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping
from typing import Any

import minimind


class CsvTracker(minimind.Tracker):
    """Writes `step,name,value` lines to metrics.csv in the run's folder."""

    def start(self, run: Any) -> None:
        """Open the file; a resumed run drops the lines of steps that it repeats."""
        path, kept = run.folder / "metrics.csv", []
        if run.start_step and path.exists():
            with path.open(newline="") as file:
                kept = [row for row in csv.reader(file) if int(row[0]) <= run.start_step]
        self.file = path.open("w", newline="")
        self.writer = csv.writer(self.file)
        self.writer.writerows(kept)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Write numbers; a background thread calls this, so it may be slow."""
        self.writer.writerows((step, name, value) for name, value in values.items())

    def finish(self) -> None:
        """Close the file."""
        self.file.close()


def train(**options: Any) -> Any:
    """Train with the preset `tiny`, changed by `options`."""
    config = minimind.preset_config("tiny", output_dir="runs/csv", **options)
    return minimind.pretrain(config, trackers=[CsvTracker()])


if __name__ == "__main__":
    train(data=(sys.argv[1],))
