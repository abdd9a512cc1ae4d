"""TensorBoard, WandB and SwanLab behind one interface: start, describe, log, log a text, finish.

Accelerate's tracker classes do the talking. Added is what they leave out: the description of a run where
people look for it, texts, and that nothing secret is collected.
"""

from __future__ import annotations

import html
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.tracking import SwanLabTracker, TensorBoardTracker, WandBTracker

from .environment import hide_secrets

# What TensorBoard shows beside the hyper-parameters of each run.
COMPARED_METRICS = ("val_loss", "val_bits_per_byte", "loss")

HyperParameters = Mapping[str, bool | int | float | str]


class TensorBoard(TensorBoardTracker):
    """Events in the folder `tensorboard` of a run, one curve however often the run is resumed."""

    def __init__(self, folder: Path, start_step: int) -> None:
        """Name the folder; nothing is touched yet.

        Args:
            folder: of the run.
            start_step: events of later steps, from before a resume, are void; 0 voids all.
        """
        self._folder = str(folder)
        self._resumed = start_step > 0 and any((folder / "tensorboard").glob("events.*"))
        super().__init__("tensorboard", self._folder, purge_step=start_step + 1 if start_step else 0)

    def describe(self, values: HyperParameters, environment: Mapping[str, Any], step: int) -> None:
        """Show hyper-parameters, in their tab and as text, and the environment as text."""
        if not self._resumed:
            from torch.utils.tensorboard.summary import hparams

            # In the file of the curves: Accelerate would put them beside it, as a run without any curve.
            for part in hparams(dict(values), dict.fromkeys(COMPARED_METRICS, 0.0)):
                self.writer.file_writer.add_summary(part)
        self.log_text("configuration", "\n".join(f"{name} = {value}" for name, value in values.items()), step)
        self.log_text("environment", json.dumps(environment, indent=2, ensure_ascii=False), step)

    def log_text(self, name: str, text: str, step: int) -> None:
        """Show a text in the tab of texts, line by line as it is."""
        # The tab reads Markdown, in which indented lines are left alone.
        self.writer.add_text(name, "\n".join("    " + line for line in text.splitlines()), step)
        self.writer.flush()


class WandB(WandBTracker):
    """A run of WandB, with its local files in the folder `wandb` of the run."""

    def __init__(self, project: str, name: str, folder: Path, run_id: str | None) -> None:
        """Name the run; nothing is sent yet.

        Args:
            project: a name.
            name: of the run.
            folder: of the run.
            run_id: of the run of WandB to go on with.
        """
        # The address of a git remote may hold a token; the commit is part of the environment.
        settings = {"disable_git": True}
        super().__init__(project, name=name, dir=str(folder), settings=settings, **_resumed(run_id))

    def start(self) -> None:
        """Open the run."""
        with secrets_hidden():
            super().start()

    def describe(self, values: HyperParameters, environment: Mapping[str, Any], step: int) -> None:
        """Set `wandb.config`, the environment under a key of its own."""
        self.store_init_configuration({**values, "environment": dict(environment)})

    def log_text(self, name: str, text: str, step: int) -> None:
        """Show a text in a panel that has one for each step."""
        import wandb

        self.run.log({name: wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)}, step=step)


class SwanLab(SwanLabTracker):
    """An experiment of SwanLab, with its local files in the folder `swanlab` of the run."""

    def __init__(self, project: str, name: str, folder: Path, run_id: str | None) -> None:
        """Name the experiment; nothing is sent yet. Arguments are those of `WandB`."""
        logdir = str(folder / "swanlab")
        super().__init__(project, experiment_name=name, logdir=logdir, **_resumed(run_id))

    def start(self) -> None:
        """Open the experiment."""
        import swanlab

        # Its probes write down the command line and the address of the git remote, tokens and all. What
        # they would tell besides is part of the environment.
        self.init_kwargs["settings"] = swanlab.Settings(probe={"git": False, "runtime": False})
        super().start()

    def describe(self, values: HyperParameters, environment: Mapping[str, Any], step: int) -> None:
        """Set `swanlab.config`, the environment under a key of its own."""
        import swanlab

        # Accelerate's way would leave an argument of its own among the hyper-parameters.
        swanlab.config.update({**values, "environment": dict(environment)})

    def log_text(self, name: str, text: str, step: int) -> None:
        """Show a text in a panel that has one for each step."""
        import swanlab

        self.run.log({name: swanlab.Text(text)}, step=step)


Client = TensorBoard | WandB | SwanLab


@contextmanager
def secrets_hidden() -> Iterator[None]:
    """Let what reads the command line meanwhile see no keys, tokens or passwords in it."""
    words = sys.argv
    sys.argv = hide_secrets(words)
    try:
        yield
    finally:
        sys.argv = words


def _resumed(run_id: str | None) -> dict[str, str]:
    return {"id": run_id, "resume": "allow"} if run_id is not None else {}
