"""TensorBoard, WandB, SwanLab, MLflow and CSV behind one interface, and the thread that feeds them.

WandB, SwanLab and MLflow are Accelerate's tracker classes, extended by run descriptions, text, resuming, and
settings that collect no secrets. TensorBoard's event files are written here, because its own writer thread
ends with a traceback when the disk is full.
"""

from __future__ import annotations

import html
import io
import json
import math
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from accelerate.tracking import MLflowTracker, SwanLabTracker, WandBTracker

from ..io.append import AppendFile
from ..io.atomic import write_text
from ..io.reading import open_regular, read_bytes
from .environment import hide_secrets
from .metric_groups import grouped_name
from .plugins import PluggedTracker

# What TensorBoard shows beside the hyper-parameters of each run, and which of them it shows.
COMPARED_METRICS = ("val/loss", "val/bits_per_byte", "train/loss")
COMPARED_OPTIONS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "use_moe", "max_seq_len", "batch_size"),
    *("optimizer", "learning_rate", "lr_schedule", "weight_decay", "max_steps", "seed"),
)
# The tab of custom scalars: heading, charts, and their curves.
LAYOUT = {
    "loss": {
        "loss": ["Multiline", ["train/loss", "val/loss"]],
        "validation bits per byte": ["Multiline", ["val/bits_per_byte"]],
    },
    "training": {
        "learning rate": ["Multiline", ["train/learning_rate"]],
        "gradient norm": ["Multiline", ["train/grad_norm"]],
    },
    "performance": {
        "tokens per second": ["Multiline", ["perf/tokens_per_second"]],
        "model FLOPs utilization": ["Multiline", ["perf/mfu"]],
    },
}
_LAYOUT_TAG = b"custom_scalars__config__"
_EVENTS = "events.out.tfevents."
# Columns of metrics.csv.
CSV_COLUMNS = (
    *("step", "epoch", "tokens", "loss", "val_loss", "val_perplexity", "val_bits_per_byte", "learning_rate"),
    *("grad_norm", "tokens_per_second", "mfu", "memory_gb", "elapsed"),
)

HyperParameters = Mapping[str, bool | int | float | str]


class TensorBoard:
    """Event files in the folder `tensorboard` of a run: one curve, however often the run is resumed."""

    def __init__(self, folder: Path, start_step: int, on_error: Callable[[OSError], None]) -> None:
        """Store the arguments; the disk is not touched.

        Args:
            start_step: older events of later steps become invalid; 0 invalidates all.
            on_error: called when the disk refuses events, which then stay in memory; see `AppendFile`.
        """
        self._folder, self._start_step, self._on_error = folder / "tensorboard", start_step, on_error

    def start(self) -> None:
        """Begin an event file that invalidates older events of later steps."""
        files = sorted(self._folder.glob(f"{_EVENTS}*"))
        old = [path.name.removeprefix(_EVENTS).partition(".")[0] for path in files]
        # TensorBoard reads event files in the order of their names: also after the clock was set back.
        latest = max((int(seconds) for seconds in old if seconds.isdigit()), default=0)
        name = f"{_EVENTS}{max(int(time.time()), latest + 1):010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._resumed = self._start_step > 0 and bool(old)
        # A run of an earlier version goes on with the names that its charts have.
        self._grouped = not self._resumed or _begins_with_layout(files[0])
        self._file = AppendFile(self._folder / name, self._on_error)
        from tensorboard.compat.proto.event_pb2 import SessionLog

        purge_step = self._start_step + 1 if self._start_step else 0
        self._write(file_version="brain.Event:2")
        self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def describe(self, values: HyperParameters, environment: Mapping[str, Any], step: int) -> None:
        """Show hyper-parameters, in their tab and as text, and the environment as text."""
        if not self._resumed:
            from torch.utils.tensorboard.summary import custom_scalars, hparams

            self._write(summary=custom_scalars(LAYOUT))
            compared = {name: values[name] for name in COMPARED_OPTIONS}
            for summary in hparams(compared, dict.fromkeys(COMPARED_METRICS, 0.0)):
                self._write(summary=summary)
        self.log_text("configuration", "\n".join(f"{name} = {value}" for name, value in values.items()), step)
        self.log_text("environment", json.dumps(environment, indent=2, ensure_ascii=False), step)

    def log(self, values: Mapping[str, int | float], step: int) -> None:
        """Add a point to each curve."""
        from torch.utils.tensorboard.summary import scalar

        for name, value in _named(values, self._grouped).items():
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

    def __init__(
        self, project: str, name: str, folder: Path, run_id: str | None, *, grouped: bool = True
    ) -> None:
        """Store the arguments; nothing is sent.

        Args:
            run_id: id of the WandB run to resume.
            grouped: name metrics by groups, such as `train/loss`; off for runs that have begun without.
        """
        self._grouped = grouped
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

    def log(self, values: Mapping[str, int | float], step: int) -> None:
        """Add a point to each curve."""
        super().log(_named(values, self._grouped), step=step)

    def log_text(self, name: str, text: str, step: int) -> None:
        """Show a text in a panel with one entry per step."""
        import wandb

        self.run.log({name: wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)}, step=step)


class SwanLab(SwanLabTracker):
    """A SwanLab experiment, with its local files in the folder `swanlab` of the run."""

    def __init__(
        self, project: str, name: str, folder: Path, run_id: str | None, *, grouped: bool = True
    ) -> None:
        """Store the arguments, which are those of `WandB`; nothing is sent."""
        self._grouped = grouped
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

    def log(self, values: Mapping[str, int | float], step: int) -> None:
        """Add a point to each curve."""
        super().log(_named(values, self._grouped), step=step)

    def log_text(self, name: str, text: str, step: int) -> None:
        """Show a text in a panel with one entry per step."""
        import swanlab

        self.run.log({name: swanlab.Text(text)}, step=step)


class MLflow(MLflowTracker):
    """An MLflow run; without `MLFLOW_TRACKING_URI`, in the file `mlflow.db` of the run folder."""

    def __init__(
        self, project: str, name: str, folder: Path, run_id: str | None, *, grouped: bool = True
    ) -> None:
        """Store the arguments, which are those of `WandB`; nothing is sent."""
        super().__init__(project, run_id=run_id, run_name=None if run_id else name)
        self._folder, self._grouped = folder.resolve(), grouped

    def start(self) -> None:
        """Open the run."""
        import mlflow

        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{self._folder / 'mlflow.db'}")
            self.logging_dir = (self._folder / "mlflow").as_uri()
        super().start()
        # Other threads have no active run: every call names it.
        self.run = SimpleNamespace(id=self.active_run.info.run_id)

    def describe(self, values: HyperParameters, environment: Mapping[str, Any], step: int) -> None:
        """Set the parameters, which a resumed run keeps; the environment is the artifact environment.json."""
        import mlflow

        if self.run_id is None:
            self.store_init_configuration(dict(values))
        mlflow.log_dict(dict(environment), "environment.json", run_id=self.run.id)

    def log(self, values: Mapping[str, int | float], step: int) -> None:
        """Add a point to each curve."""
        super().log(_named(values, self._grouped), step=step, run_id=self.run.id)

    def log_text(self, name: str, text: str, step: int) -> None:
        """Store a text as an artifact."""
        import mlflow

        mlflow.log_text(text, f"{name}/step-{step:08d}.txt", run_id=self.run.id)


class CSV:
    """The file `metrics.csv`: a row for each report, with the columns `CSV_COLUMNS`."""

    def __init__(self, folder: Path, start_step: int, on_error: Callable[[OSError], None]) -> None:
        """Store the arguments, which are those of `TensorBoard`; the disk is not touched."""
        self._path, self._start_step, self._on_error = folder / "metrics.csv", start_step, on_error

    def start(self) -> None:
        """Open the file and remove rows of later steps, which the resumed run repeats."""
        rows = read_bytes(self._path).decode(errors="replace").splitlines() if self._path.exists() else []
        steps = [row.partition(",")[0] for row in rows]
        kept = [
            row
            for row, step in zip(rows, steps, strict=True)
            if step.isdigit() and 0 < self._start_step >= int(step)
        ]
        write_text(self._path, "\n".join([",".join(CSV_COLUMNS), *kept, ""]))
        self._file = AppendFile(self._path, self._on_error)

    def describe(self, values: HyperParameters, environment: Mapping[str, Any], step: int) -> None:
        """Do nothing: config.toml and environment.json have them."""

    def log(self, values: Mapping[str, int | float], step: int) -> None:
        """Append a row, with empty cells where nothing was measured or a number is not finite."""
        cells = [values.get(name) for name in CSV_COLUMNS[1:]]
        if any(cell is not None for cell in cells):
            texts = (str(cell) if cell is not None and math.isfinite(cell) else "" for cell in cells)
            self._file.append((",".join([str(step), *texts]) + "\n").encode())

    def log_text(self, name: str, text: str, step: int) -> None:
        """Do nothing: samples.jsonl has it."""

    def finish(self) -> None:
        """Write pending rows and close the file."""
        self._file.close()


Client = TensorBoard | WandB | SwanLab | MLflow | CSV | PluggedTracker


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


def _named(values: Mapping[str, int | float], grouped: bool) -> dict[str, int | float]:
    return {grouped_name(name) if grouped else name: value for name, value in values.items()}


def _begins_with_layout(file: Path) -> bool:
    """Return whether an event file has the layout of grouped names, which is written first."""
    with open_regular(file) as stream:
        return _LAYOUT_TAG in stream.read(1 << 16)


def _resumed(run_id: str | None) -> dict[str, str]:
    return {"id": run_id, "resume": "allow"} if run_id is not None else {}
