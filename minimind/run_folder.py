"""The folder that a run leaves: where each thing lies, and that no run writes over another."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config.options import CONFIG_SECTIONS, PretrainConfig
from .config.schema import write_toml
from .errors import ConfigError
from .io.atomic import write_text


@dataclass(frozen=True)
class RunFolder:
    """Paths inside one output folder."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration, readable by `--config`."""
        return self.path / "config.toml"

    @property
    def environment(self) -> Path:
        """Versions, hardware and command line."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per report."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """What the model wrote in training: one JSON object a sample."""
        return self.path / "samples.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Full training states."""
        return self.path / "checkpoints"

    @property
    def spikes(self) -> Path:
        """One report for each loss that jumped or was not finite."""
        return self.path / "spikes"

    @property
    def model(self) -> Path:
        """The model in the format of Hugging Face transformers."""
        return self.path / "model"

    @property
    def profile(self) -> Path:
        """Traces of --profile."""
        return self.path / "profile"

    def holds_a_run(self) -> bool:
        """Whether a run has written here before."""
        return self.config.exists() or self.metrics.exists() or self.checkpoints.exists()

    def claim(self, *, resume: bool) -> bool:
        """Make the folder, unless it holds another run.

        Returns:
            Whether it was not there before.

        Raises:
            ConfigError: when a run lies there and `resume` is off, or the folder cannot be written.
        """
        try:
            taken = not resume and self.holds_a_run()
            new = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            # Always the same name: should a process be killed right here, the next one removes it.
            probe = self.path / ".write-test"
            probe.touch()
            probe.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--output-dir {self.path} cannot be written ({error.strerror}); name another folder."
            ) from error
        if taken:
            raise ConfigError(
                f"--output-dir {self.path} already holds a run; go on with it by --resume, "
                "or name another folder."
            )
        return new

    def remove_if_empty(self) -> None:
        """Take the folder away again where a run failed before it wrote anything."""
        with suppress(OSError):
            self.path.rmdir()

    def describe(self, config: PretrainConfig, environment: dict[str, Any]) -> None:
        """Write `config.toml` and `environment.json`."""
        write_text(self.config, write_toml(config, CONFIG_SECTIONS))
        write_text(self.environment, json.dumps(environment, indent=2, ensure_ascii=False) + "\n")


def find_run(path: Path) -> RunFolder:
    """Return the run that a path belongs to: its folder, its `model` folder, `checkpoints`, or a checkpoint.

    A path outside of any run is returned itself.
    """
    path = path.resolve()
    for folder in (path, path.parent, path.parent.parent):
        run = RunFolder(folder)
        if run.config.is_file() and path in (folder, run.model, run.checkpoints, run.checkpoints / path.name):
            return run
    return RunFolder(path)
