"""TensorBoard, WandB and SwanLab behind one interface, and the thread that feeds them.

WandB and SwanLab are Accelerate's tracker classes, extended by run descriptions, text, resuming, and settings
that collect no secrets. TensorBoard's event files are written here, because its own writer thread ends with a
traceback when the disk is full.
"""

from __future__ import annotations

import html
import io
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.tracking import SwanLabTracker, WandBTracker

from ..io.append import AppendFile
from .environment import hide_secrets
from .plugins import PluggedTracker

# What TensorBoard shows beside the hyper-parameters of each run.
COMPARED_METRICS = ("val_loss", "val_bits_per_byte", "loss")
_EVENTS = "events.out.tfevents."

HyperParameters = Mapping[str, bool | int | float | str]


class TensorBoard:
    """Event files in the folder `tensorboard` of a run: one curve, however often the run is resumed."""

    def __init__(self, folder: Path, start_step: int, on_error: Callable[[OSError], None]) -> None:
        """Store the arguments; the disk is not touched.

        Args:
            folder: the run folder.
            start_step: older events of later steps become invalid; 0 invalidates all.
            on_error: called when the disk refuses events, which then stay in memory; see `AppendFile`.
        """
        self._folder, self._start_step, self._on_error = folder / "tensorboard", start_step, on_error

    def start(self) -> None:
        """Begin an event file that invalidates older events of later steps."""
        old = [path.name.removeprefix(_EVENTS).partition(".")[0] for path in self._folder.glob(f"{_EVENTS}*")]
        # TensorBoard reads event files in the order of their names: also after the clock was set back.
        latest = max((int(seconds) for seconds in old if seconds.isdigit()), default=0)
        name = f"{_EVENTS}{max(int(time.time()), latest + 1):010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._resumed = self._start_step > 0 and bool(old)
        self._file = AppendFile(self._folder / name, self._on_error)
        from tensorboard.compat.proto.event_pb2 import SessionLog

        purge_step = self._start_step + 1 if self._start_step else 0
        self._write(file_version="brain.Event:2")
        self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def describe(self, values: HyperParameters, environment: Mapping[str, Any], step: int) -> None:
        """Show hyper-parameters, in their tab and as text, and the environment as text."""
        if not self._resumed:
            from torch.utils.tensorboard.summary import hparams

            for summary in hparams(dict(values), dict.fromkeys(COMPARED_METRICS, 0.0)):
                self._write(summary=summary)
        self.log_text("configuration", "\n".join(f"{name} = {value}" for name, value in values.items()), step)
        self.log_text("environment", json.dumps(environment, indent=2, ensure_ascii=False), step)

    def log(self, values: Mapping[str, int | float], step: int) -> None:
        """Add a point to each curve."""
        from torch.utils.tensorboard.summary import scalar

        for name, value in values.items():
            self._write(summary=scalar(name, value), step=step)

    def log_text(self, name: str, text: str, step: int) -> None:
        """Show a text in the Text tab, with its line breaks."""
        from torch.utils.tensorboard.summary import text as text_summary

        # The tab renders Markdown, where indented lines are verbatim.
        verbatim = "\n".join("    " + line for line in text.splitlines())
        self._write(summary=text_summary(name, verbatim), step=step)

    def finish(self) -> None:
        """Write pending events and close the file."""
        self._file.close()

    def _write(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        buffer = io.BytesIO()
        RecordWriter(buffer).write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._file.append(buffer.getvalue())


class WandB(WandBTracker):
    """A WandB run, with its local files in the folder `wandb` of the run."""

    def __init__(self, project: str, name: str, folder: Path, run_id: str | None) -> None:
        """Store the arguments; nothing is sent.

        Args:
            project: name of the project.
            name: name of the run.
            folder: the run folder.
            run_id: id of the WandB run to resume.
        """
        # The URL of a git remote may hold a token; the commit is part of the environment.
        settings = {"disable_git": True}
        super().__init__(project, name=name, dir=str(folder), settings=settings, **_resumed(run_id))

    def start(self) -> None:
        """Open the run."""
        with secrets_hidden():
            super().start()

    def describe(self, values: HyperParameters, environment: Mapping[str, Any], step: int) -> None:
        """Set `wandb.config`; the environment goes under the key `environment`."""
        self.store_init_configuration({**values, "environment": dict(environment)})

    def log_text(self, name: str, text: str, step: int) -> None:
        """Show a text in a panel with one entry per step."""
        import wandb

        self.run.log({name: wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)}, step=step)


class SwanLab(SwanLabTracker):
    """A SwanLab experiment, with its local files in the folder `swanlab` of the run."""

    def __init__(self, project: str, name: str, folder: Path, run_id: str | None) -> None:
        """Store the arguments, which are those of `WandB`; nothing is sent."""
        logdir = str(folder / "swanlab")
        super().__init__(project, experiment_name=name, logdir=logdir, **_resumed(run_id))

    def start(self) -> None:
        """Open the experiment."""
        import swanlab

        # Its probes record the command line and the URL of the git remote with any tokens in them. Their
        # other findings are part of the environment.
        self.init_kwargs["settings"] = swanlab.Settings(probe={"git": False, "runtime": False})
        super().start()

    def describe(self, values: HyperParameters, environment: Mapping[str, Any], step: int) -> None:
        """Set `swanlab.config`; the environment goes under the key `environment`."""
        import swanlab

        # Accelerate's method would add one of its arguments to the hyper-parameters.
        swanlab.config.update({**values, "environment": dict(environment)})

    def log_text(self, name: str, text: str, step: int) -> None:
        """Show a text in a panel with one entry per step."""
        import swanlab

        self.run.log({name: swanlab.Text(text)}, step=step)


Client = TensorBoard | WandB | SwanLab | PluggedTracker


class BackgroundThread:
    """Runs functions one after another in a daemon thread; `on_error` gets what they raise."""

    def __init__(self, name: str, on_error: Callable[[Exception], None]) -> None:
        self._on_error = on_error
        self._queue: queue.Queue[Callable[[], object] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[[], object]) -> None:
        """Run a function after all earlier ones; return at once."""
        self._queue.put(function)

    def call(self, function: Callable[[], object], timeout: float) -> bool:
        """Run a function after all earlier ones; return whether it finished within `timeout` seconds.

        Raises:
            OSError: raised by the function.
        """
        done = threading.Event()
        errors: list[OSError] = []

        def run() -> None:
            try:
                function()
            except OSError as error:
                errors.append(error)
            finally:
                done.set()

        self._queue.put(run)
        finished = done.wait(timeout)
        if errors:
            raise errors[0]
        return finished

    def close(self, timeout: float) -> bool:
        """End the thread after all earlier functions; return whether it ended within `timeout` seconds."""
        self._queue.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (function := self._queue.get()) is not None:
            try:
                function()
            except Exception as error:
                self._on_error(error)


@contextmanager
def secrets_hidden() -> Iterator[None]:
    """Hide keys, tokens and passwords in `sys.argv` meanwhile."""
    argv = sys.argv
    sys.argv = hide_secrets(argv)
    try:
        yield
    finally:
        sys.argv = argv


def _resumed(run_id: str | None) -> dict[str, str]:
    return {"id": run_id, "resume": "allow"} if run_id is not None else {}
