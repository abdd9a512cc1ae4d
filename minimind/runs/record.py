"""Read the folder of a run: options, environment, metrics, checkpoints.

Runs of other versions are read as far as possible: missing files and unknown options are no errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoint.files import StoredCheckpoint, stored_checkpoints
from ..config.options import PretrainConfig
from ..config.schema import parse_values, read_toml
from ..errors import ConfigError, UserError
from ..io.reading import read_json
from ..run_folder import RunFolder
from ..tracking.curves import Point, RunClock, curve, thinned
from ..tracking.metrics_file import read_metrics

# Metrics of training reports and of evaluations.
LOSS, BITS = "loss", "val_bits_per_byte"
# The settings of a checkpoint that hold fingerprints, by what they are of.
FINGERPRINTS = {
    "training text": "data_fingerprint",
    "tokenizer": "tokenizer_fingerprint",
    "mixture": "data_mixture",
}
# Types of the keys of environment.json; values of another type are ignored.
_KINDS = {"packages": dict, "launch": dict, "gpus": list, "working_folder": str}
_LAUNCH_KINDS = {"processes": int, "machines": int, "kind": str, "precision": str, "variables": dict}


@dataclass(frozen=True)
class RunRecord:
    """One run, as recorded in its folder.

    Attributes:
        folder: paths of the run.
        config: its options.
        unread: keys of its config.toml that this version does not support.
        environment: versions, hardware, command line, launch and fingerprints.
        metrics: all reports.
    """

    folder: RunFolder
    config: PretrainConfig
    unread: tuple[str, ...]
    environment: Mapping[str, Any]
    metrics: list[dict[str, Any]]

    @property
    def path(self) -> Path:
        """The folder of the run."""
        return self.folder.path

    @cached_property
    def checkpoints(self) -> list[StoredCheckpoint]:
        """All checkpoints, oldest first, unverified."""
        return stored_checkpoints(self.folder.checkpoints)

    @cached_property
    def trainer(self) -> Mapping[str, Any]:
        """The trainer state of the newest readable checkpoint; empty without one."""
        for checkpoint in reversed(self.checkpoints):
            try:
                return checkpoint.trainer
            except UserError:
                continue
        return {}

    @property
    def steps(self) -> int:
        """Optimizer steps done, by reports and checkpoints."""
        reported = max((line["step"] for line in self.metrics), default=0)
        saved = self.trainer.get("step")
        return max(reported, saved) if isinstance(saved, int) else reported

    @property
    def tokens(self) -> int | None:
        """Real input tokens trained, None where not known."""
        counts = [line["tokens"] for line in self.metrics if isinstance(line.get("tokens"), int)]
        if isinstance(saved := self.trainer.get("tokens"), int):
            counts.append(saved)
        return max(counts, default=None)

    @property
    def finished(self) -> bool:
        """Whether the run has saved its final model."""
        return (self.folder.model / "model.safetensors").is_file()

    def fingerprint(self, what: str) -> str | None:
        """Return one of `FINGERPRINTS`, None where it was not recorded."""
        found = self.environment.get("fingerprints")
        if isinstance(found, dict) and isinstance(found.get(what), str):
            return str(found[what])
        saved = self.trainer.get("settings", {}).get(FINGERPRINTS[what])
        return None if saved is None else str(saved)

    def best(self) -> dict[str, Any] | None:
        """Return the evaluation with the lowest validation loss, None without evaluations."""
        lines = [line for line in self.metrics if isinstance(line.get("val_loss"), int | float)]
        return min(lines, key=lambda line: line["val_loss"], default=None)

    def last(self, name: str) -> float | None:
        """Return the last value of a metric, None without any."""
        values = [line[name] for line in self.metrics if isinstance(line.get(name), int | float)]
        return values[-1] if values else None

    def curve(self, name: str) -> list[Point]:
        """Return all reports of a metric; null values are skipped."""
        return curve(*self._reports_of(name), self._clock)

    def thinned(self, name: str) -> list[Point]:
        """Return a curve to draw; see `curves.thinned`."""
        return thinned(*self._reports_of(name), self._clock)

    @property
    def seconds(self) -> float | None:
        """Training time over all parts of a resumed run, None where nothing was reported."""
        return self._clock.seconds or None

    def _reports_of(self, name: str) -> tuple[list[float], list[float]]:
        found = [
            (line["step"], line[name]) for line in self.metrics if isinstance(line.get(name), int | float)
        ]
        return [float(step) for step, _ in found], [float(value) for _, value in found]

    @cached_property
    def _clock(self) -> RunClock:
        clock = RunClock()
        for line in self.metrics:
            clock.add(line)
        return clock


def read_run(path: Path) -> RunRecord:
    """Read the folder of a run.

    Raises:
        ConfigError: when there is no run, or its config.toml is not TOML.
    """
    folder = RunFolder(Path(path))
    if not folder.holds_a_run():
        raise ConfigError(f"{path} contains no run; name the --output-dir of one.")
    config: PretrainConfig = PretrainConfig()
    unread: tuple[str, ...] = ()
    if folder.config.is_file():
        config, unread = _config(folder.config)
    metrics = read_metrics(folder.metrics) if folder.metrics.is_file() else []
    return RunRecord(folder, config, unread, _environment(folder.environment), metrics)


def _config(path: Path) -> tuple[PretrainConfig, tuple[str, ...]]:
    try:
        values = read_toml(path)
    except ConfigError as error:
        # The file was not given by --config here.
        raise ConfigError([problem.removeprefix("--config ") for problem in error.problems]) from error
    parsed, _ = parse_values(PretrainConfig, values)
    unread = tuple(sorted(values.keys() - parsed.keys()))
    try:
        return PretrainConfig(**parsed), unread
    except ConfigError:
        # Show values that are not valid together any more.
        config = PretrainConfig()
        for name, value in parsed.items():
            object.__setattr__(config, name, value)
        return config, unread


def _environment(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path)
    except (OSError, ValueError):
        return {}
    if not isinstance(values, dict):
        return {}
    known = _of_kinds(values, _KINDS)
    return known | {"launch": _of_kinds(known["launch"], _LAUNCH_KINDS)} if "launch" in known else known


def _of_kinds(values: Mapping[str, Any], kinds: Mapping[str, type]) -> dict[str, Any]:
    """Return the values, without those of an unexpected type."""
    return {name: value for name, value in values.items() if isinstance(value, kinds.get(name, object))}
