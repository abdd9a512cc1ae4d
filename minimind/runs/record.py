"""What a run has left in its folder, read back: options, environment, numbers, checkpoints.

Runs of other versions are read as far as they can be: a file or an option that is missing or unknown is no
error, for what there is still tells something.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

from ..checkpoint.files import StoredCheckpoint, stored_checkpoints
from ..config.options import PretrainConfig
from ..config.schema import parse_values, read_toml
from ..errors import ConfigError, UserError
from ..io.reading import parse_json, read_bytes
from ..run_folder import RunFolder
from ..tracking.metrics_file import read_metrics

# Numbers that an interval of training steps reports, and those of an evaluation.
LOSS, BITS = "loss", "val_bits_per_byte"
# What environment.json holds; anything else under these names is as good as missing.
_KINDS = {"packages": dict, "launch": dict, "gpus": list, "working_folder": str}
_LAUNCH_KINDS = {"processes": int, "machines": int, "kind": str, "precision": str, "variables": dict}


@dataclass(frozen=True)
class Point:
    """One report of a run.

    Attributes:
        step: optimizer steps done.
        tokens: real input tokens trained, None where that is not known.
        seconds: of training so far, over all parts of a run that was resumed; None where not known.
        value: what was reported.
    """

    step: int
    tokens: float | None
    seconds: float | None
    value: float


@dataclass(frozen=True)
class RunRecord:
    """One run, as its folder tells it.

    Attributes:
        folder: where it lies.
        config: its options.
        unread: keys of its config.toml that this version does not know or take.
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
        """What the newest checkpoint that can be read holds besides tensors; empty without one."""
        for checkpoint in reversed(self.checkpoints):
            try:
                return checkpoint.trainer
            except UserError:
                continue
        return {}

    @property
    def steps(self) -> int:
        """Optimizer steps done, as far as is known."""
        reported = max((line["step"] for line in self.metrics), default=0)
        saved = self.trainer.get("step")
        return max(reported, saved) if isinstance(saved, int) else reported

    @property
    def tokens(self) -> int | None:
        """Real input tokens trained, None where nothing tells."""
        counts = [line["tokens"] for line in self.metrics if isinstance(line.get("tokens"), int)]
        if isinstance(saved := self.trainer.get("tokens"), int):
            counts.append(saved)
        return max(counts, default=None)

    @property
    def finished(self) -> bool:
        """Whether the run has delivered its model."""
        return (self.folder.model / "model.safetensors").is_file()

    def fingerprint(self, what: str) -> str | None:
        """Return what tells the `tokenizer`, the `training text` or the `mixture` from any other."""
        found = self.environment.get("fingerprints")
        if isinstance(found, dict) and isinstance(found.get(what), str):
            return str(found[what])
        key = {"training text": "data_fingerprint", "mixture": "data_mixture"}.get(
            what, f"{what}_fingerprint"
        )
        saved = self.trainer.get("settings", {}).get(key)
        return None if saved is None else str(saved)

    def best(self) -> dict[str, Any] | None:
        """Return the evaluation with the lowest validation loss, None without any."""
        lines = [line for line in self.metrics if isinstance(line.get("val_loss"), int | float)]
        return min(lines, key=lambda line: line["val_loss"], default=None)

    def last(self, name: str) -> float | None:
        """Return the last value of a number, None where there is none."""
        values = [line[name] for line in self.metrics if isinstance(line.get(name), int | float)]
        return values[-1] if values else None

    def curve(self, name: str) -> list[Point]:
        """Return all reports of a number; null ones are left out."""
        clock = self._clock
        return [
            Point(
                line["step"],
                _at(clock, line["step"], 1),
                _at(clock, line["step"], 2),
                float(line[name]),
            )
            for line in self.metrics
            if isinstance(line.get(name), int | float)
        ]

    @cached_property
    def _clock(self) -> list[tuple[float, float, float]]:
        """Step, tokens and seconds at each training report, from nothing on."""
        marks = [(0.0, 0.0, 0.0)]
        offset = before = 0.0
        for line in self.metrics:
            step, tokens, elapsed = line["step"], line.get("tokens"), line.get("elapsed")
            if not isinstance(tokens, int | float) or not isinstance(elapsed, int | float):
                continue
            if elapsed < before:  # A part of the run that was resumed counts anew.
                offset += before
            before = elapsed
            if step > marks[-1][0]:
                marks.append((step, tokens, offset + elapsed))
        return marks


def read_run(path: Path) -> RunRecord:
    """Read the folder of a run.

    Raises:
        ConfigError: when there is no run, or its config.toml is not TOML.
    """
    folder = RunFolder(Path(path))
    if not folder.holds_a_run():
        raise ConfigError(f"{path} holds no run; name the --output-dir of one.")
    config: PretrainConfig = PretrainConfig()
    unread: tuple[str, ...] = ()
    if folder.config.is_file():
        config, unread = _config(folder.config)
    return RunRecord(folder, config, unread, _environment(folder.environment), read_metrics(folder.metrics))


def _config(path: Path) -> tuple[PretrainConfig, tuple[str, ...]]:
    try:
        values = read_toml(path)
    except ConfigError as error:
        # Nobody gave the option here.
        raise ConfigError([problem.removeprefix("--config ") for problem in error.problems]) from error
    parsed, _ = parse_values(PretrainConfig, values)
    unread = tuple(sorted(values.keys() - parsed.keys()))
    try:
        return PretrainConfig(**parsed), unread
    except ConfigError:
        # Values that do not go together any more: shown as they are rather than not at all.
        config = PretrainConfig()
        for name, value in parsed.items():
            object.__setattr__(config, name, value)
        return config, unread


def _environment(path: Path) -> dict[str, Any]:
    try:
        values = parse_json(read_bytes(path))
    except (OSError, ValueError):
        return {}
    if not isinstance(values, dict):
        return {}
    known = _of_kinds(values, _KINDS)
    return known | {"launch": _of_kinds(known["launch"], _LAUNCH_KINDS)} if "launch" in known else known


def _of_kinds(values: Mapping[str, Any], kinds: Mapping[str, type]) -> dict[str, Any]:
    """Return what is of the kind that this version reads, and what it does not read."""
    return {name: value for name, value in values.items() if isinstance(value, kinds.get(name, object))}


def _at(marks: list[tuple[float, float, float]], step: int, column: int) -> float | None:
    """Return tokens (1) or seconds (2) at a step, in proportion between two reports; None without any."""
    if len(marks) < 2:
        return 0.0 if step == 0 else None
    after = bisect_left(marks, step, key=itemgetter(0))
    if after == len(marks):
        return marks[-1][column]
    high = marks[after]
    low = marks[max(after - 1, 0)]
    share = (step - low[0]) / (high[0] - low[0]) if high[0] > low[0] else 1.0
    return low[column] + share * (high[column] - low[column])
