"""The output folder of a run: its paths, and the lock that keeps other runs out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config.options import CONFIG_SECTIONS, PretrainConfig
from .config.schema import write_toml
from .errors import ConfigError
from .io.atomic import cannot_write, remove, write_file, write_text
from .io.lock import LockedError, hold_lock

# More than the options and the description of the machine take.
_PROBE_BYTES = 64 << 10


@dataclass
class RunFolder:
    """Paths inside one output folder.

    Attributes:
        config: the resolved configuration, readable by `--config`.
        environment: versions, hardware and command line.
        metrics: one JSON object per report.
        samples: generated during training: one JSON object per sample.
        report: page with curves, samples, configuration and environment, for a browser.
        checkpoints: full training states.
        spikes: one report per loss spike.
        model: the model in the format of Hugging Face transformers.
        initial: configuration and tokenizer of a model of transformers that the run continues.
        profile: traces of --profile.
    """

    path: Path

    def __post_init__(self) -> None:
        self.config = self.path / "config.toml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.report = self.path / "report.html"
        self.checkpoints = self.path / "checkpoints"
        self.spikes = self.path / "spikes"
        self.model = self.path / "model"
        self.initial = self.path / "initial"
        self.profile = self.path / "profile"

    def holds_a_run(self) -> bool:
        """Whether a run has written here."""
        return self.config.exists() or self.metrics.exists() or self.checkpoints.exists()

    def occupied(self) -> str | None:
        """Return a sentence where the folder holds a run, so that no other can begin in it."""
        if not self.holds_a_run():
            return None
        return (
            f"--output-dir {self.path} already holds a run; continue it with --resume, or name another "
            "folder."
        )

    @contextmanager
    def claim(
        self,
        *,
        resume: bool,
        wait_seconds: float = 0.0,
        note: Callable[[str], object] = lambda sentence: None,
    ) -> Iterator[None]:
        """Create the folder and lock it against other runs; remove temporary files of a killed run.

        If an error ends the block before a new run has done a step, its options and the folder are removed
        again.

        Args:
            resume: accept a folder that holds a run.
            wait_seconds: how long to wait for another run in the folder to end.
            note: gets a sentence before waiting.

        Raises:
            ConfigError: when another run uses the folder, or it holds a run and `resume` is off.
            UserError: when the folder cannot be written.
        """
        lock = self.path / ".lock"
        waiting = f"{self.path} is in use; waiting up to {wait_seconds:.0f} s for the other run to end"
        with ExitStack() as held:
            try:
                if not self.path.exists():
                    held.callback(self._remove_if_empty)
                held.enter_context(hold_lock(lock, wait_seconds, lambda other: note(f"{waiting} ({other}).")))
                if not resume and (occupied := self.occupied()) is not None:
                    raise ConfigError(occupied)
                self._probe()
            except LockedError as error:
                raise ConfigError(
                    f"--output-dir {self.path} is in use by another run ({error.holder}); "
                    "wait until it ends, or name another folder."
                ) from error
            except OSError as error:
                raise cannot_write("--output-dir", self.path, error) from error
            new = not self.holds_a_run()
            try:
                yield
            except Exception:
                if new and not any(path.exists() for path in (self.metrics, self.checkpoints, self.spikes)):
                    for path in (self.config, self.environment, self.initial, self.path / "tensorboard"):
                        remove(path)
                raise

    def save_options(self, config: PretrainConfig) -> None:
        """Write `config.toml` unless it exists, so that a run killed before its first step can be resumed.

        Raises:
            UserError: when it cannot be written.
        """
        if not self.config.exists():
            self._write(self.config, write_toml(config, CONFIG_SECTIONS))

    def describe(self, config: PretrainConfig, environment: dict[str, Any]) -> None:
        """Write `config.toml` and `environment.json`.

        Raises:
            UserError: when they cannot be written.
        """
        self._write(self.config, write_toml(config, CONFIG_SECTIONS))
        self._write(self.environment, json.dumps(environment, indent=2, ensure_ascii=False) + "\n")

    def _write(self, path: Path, text: str) -> None:
        try:
            write_text(path, text)
        except OSError as error:
            raise cannot_write("--output-dir", self.path, error) from error

    def _probe(self) -> None:
        """Find a full disk by writing a small file; remove temporary files of killed runs."""
        for pattern in (".*.tmp", "model/.tmp*", "model/.*.tmp", "spikes/.*.tmp"):
            for left in self.path.glob(pattern):
                if not left.parent.is_symlink():  # never remove files outside the folder
                    remove(left)
        probe = self.path / ".write-test"
        try:
            write_file(probe, [bytes(_PROBE_BYTES)])
        finally:
            with suppress(OSError):
                remove(probe)

    def _remove_if_empty(self) -> None:
        with suppress(OSError):
            self.path.rmdir()


def find_run(path: Path) -> RunFolder:
    """Return the run that a path belongs to: its folder, its `model` folder, `checkpoints`, or a checkpoint.

    A path outside of any run is returned itself.
    """
    resolved = Path(os.path.realpath(path))
    with suppress(OSError):  # a text that is too long for a file name
        for folder in (resolved, resolved.parent, resolved.parent.parent):
            run = RunFolder(folder)
            inside = (folder, run.model, run.checkpoints, run.checkpoints / resolved.name)
            if run.config.is_file() and resolved in inside:
                return run
    return RunFolder(path)
