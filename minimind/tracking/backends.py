"""TensorBoard, WandB, SwanLab, MLflow and CSV as a `Tracker`, and the thread that feeds them.

WandB, SwanLab and MLflow use Accelerate's tracker classes, extended by run descriptions, text, resuming, and
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
from typing import Any

from accelerate.tracking import MLflowTracker, SwanLabTracker, WandBTracker

from ..io.append import AppendFile
from ..io.atomic import write_text
from ..io.reading import open_regular, read_bytes
from .environment import hide_secrets
from .plugins import TrackedRun

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

# Groups of metrics, in which trackers show their charts; `train/` has every other metric.
_PERFORMANCE = ("tokens_per_second", "mfu", "memory_gb", "elapsed", "eta_seconds")
_EXPERTS = ("expert_load", "balance_loss", "dropped_share")


class _LocalFile:
    """A tracker that appends to a file; `start` opens it."""

    _file: AppendFile

    def __init__(self, on_error: Callable[[OSError], None]) -> None:
        """Store `on_error`, which is called when the disk refuses records, as `AppendFile` does."""
        self._on_error = on_error

    def finish(self) -> None:
        """Write pending records and close the file."""
        self._file.close()


class TensorBoard(_LocalFile):
    """Event files in the folder `tensorboard` of a run: one curve, however often the run is resumed."""

    def start(self, run: TrackedRun) -> None:
        """Begin an event file that invalidates older events of later steps, and describe the run in it.

        Hyper-parameters have a tab, and are shown as text like the environment.
        """
        folder = run.folder / "tensorboard"
        files = sorted(folder.glob(f"{_EVENTS}*"))
        old = [path.name.removeprefix(_EVENTS).partition(".")[0] for path in files]
        # TensorBoard reads event files in the order of their names: also after the clock was set back.
        latest = max((int(seconds) for seconds in old if seconds.isdigit()), default=0)
        name = f"{_EVENTS}{max(int(time.time()), latest + 1):010d}.{socket.gethostname()}.{os.getpid()}.0"
        resumed = run.start_step > 0 and bool(old)
        # A run of an earlier version goes on with the names that its charts have.
        self._grouped = not resumed or _begins_with_layout(files[0])
        self._file = AppendFile(folder / name, self._on_error)
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from torch.utils.tensorboard.summary import custom_scalars, hparams

        self._write(file_version="brain.Event:2")
        purge_step = run.start_step + 1 if run.start_step else 0
        self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))
        if not resumed:
            compared = {name: run.options[name] for name in COMPARED_OPTIONS}
            shown = hparams(compared, dict.fromkeys(COMPARED_METRICS, 0.0))
            for summary in (custom_scalars(LAYOUT), *shown):
                self._write(summary=summary)
        options = "\n".join(f"{name} = {value}" for name, value in run.options.items())
        self.log_text("configuration", options, run.start_step)
        self.log_text(
            "environment", json.dumps(run.environment, indent=2, ensure_ascii=False), run.start_step
        )

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

    def _write(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        buffer = io.BytesIO()
        RecordWriter(buffer).write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._file.append(buffer.getvalue())


class _Service:
    """What WandB, SwanLab and MLflow have in common; `start` of each makes the tracker of Accelerate."""

    _tracker: Any

    def __init__(self, *, grouped: bool = True) -> None:
        """Send nothing yet.

        Args:
            grouped: name metrics by groups, such as `train/loss`; off for runs that have begun without.
        """
        self._grouped = grouped

    @property
    def run_id(self) -> str:
        """Id of the run, to resume it."""
        return self._tracker.run.id

    def log(self, values: Mapping[str, int | float], step: int) -> None:
        """Add a point to each curve."""
        self._tracker.log(_named(values, self._grouped), step=step)

    def finish(self) -> None:
        """Close the run."""
        self._tracker.finish()


class WandB(_Service):
    """A WandB run, with its local files in the folder `wandb` of the run."""

    def start(self, run: TrackedRun) -> None:
        """Open the run and set `wandb.config`, where the environment has the key `environment`."""
        # The URL of a git remote may hold a token; the commit is part of the environment.
        settings = {"disable_git": True}
        place = {"name": run.name, "dir": str(run.folder), "settings": settings}
        self._tracker = WandBTracker(run.project, **place, **_resumed(run))
        with secrets_hidden():
            self._tracker.start()
        self._tracker.store_init_configuration({**run.options, "environment": dict(run.environment)})

    def log_text(self, name: str, text: str, step: int) -> None:
        """Show a text in a panel with one entry per step."""
        import wandb

        panel = wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)
        self._tracker.run.log({name: panel}, step=step)


class SwanLab(_Service):
    """A SwanLab experiment, with its local files in the folder `swanlab` of the run."""

    def start(self, run: TrackedRun) -> None:
        """Open the experiment and set `swanlab.config` like `wandb.config`."""
        import swanlab

        # Its probes record the command line and the URL of the git remote with any tokens in them. Their
        # other findings are part of the environment.
        settings = swanlab.Settings(probe={"git": False, "runtime": False})
        place = {"experiment_name": run.name, "logdir": str(run.folder / "swanlab"), "settings": settings}
        self._tracker = SwanLabTracker(run.project, **place, **_resumed(run))
        self._tracker.start()
        # Accelerate's method would add one of its arguments to the hyper-parameters.
        swanlab.config.update({**run.options, "environment": dict(run.environment)})

    def log_text(self, name: str, text: str, step: int) -> None:
        """Show a text in a panel with one entry per step."""
        import swanlab

        self._tracker.run.log({name: swanlab.Text(text)}, step=step)


class MLflow(_Service):
    """An MLflow run; without `MLFLOW_TRACKING_URI`, in the file `mlflow.db` of the run folder."""

    @property
    def run_id(self) -> str:
        """Id of the run. Other threads have no active run, so every call names it."""
        return self._tracker.active_run.info.run_id

    def start(self, run: TrackedRun) -> None:
        """Open the run with its parameters, which a resumed one keeps, and the artifact environment.json."""
        import mlflow

        self._tracker = MLflowTracker(
            run.project, run_id=run.run_id, run_name=None if run.run_id else run.name
        )
        if "MLFLOW_TRACKING_URI" not in os.environ:
            folder = run.folder.resolve()
            mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
            self._tracker.logging_dir = (folder / "mlflow").as_uri()
        self._tracker.start()
        if self._tracker.run_id is None:
            self._tracker.store_init_configuration(dict(run.options))
        mlflow.log_dict(dict(run.environment), "environment.json", run_id=self.run_id)

    def log(self, values: Mapping[str, int | float], step: int) -> None:
        """Add a point to each curve."""
        self._tracker.log(_named(values, self._grouped), step=step, run_id=self.run_id)

    def log_text(self, name: str, text: str, step: int) -> None:
        """Store a text as an artifact."""
        import mlflow

        mlflow.log_text(text, f"{name}/step-{step:08d}.txt", run_id=self.run_id)


class CSV(_LocalFile):
    """The file `metrics.csv`: a row for each report, with the columns `CSV_COLUMNS`."""

    def start(self, run: TrackedRun) -> None:
        """Open the file and remove rows of later steps, which the resumed run repeats."""
        path = run.folder / "metrics.csv"
        kept = []
        for row in read_bytes(path).decode(errors="replace").splitlines() if path.exists() else ():
            step = row.partition(",")[0]
            if step.isdigit() and 0 < run.start_step >= int(step):
                kept.append(row)
        write_text(path, "\n".join([",".join(CSV_COLUMNS), *kept, ""]))
        self._file = AppendFile(path, self._on_error)

    def log(self, values: Mapping[str, int | float], step: int) -> None:
        """Append a row, with empty cells where nothing was measured or a number is not finite."""
        cells = [values.get(name) for name in CSV_COLUMNS[1:]]
        if any(cell is not None for cell in cells):
            texts = (str(cell) if cell is not None and math.isfinite(cell) else "" for cell in cells)
            self._file.append((",".join([str(step), *texts]) + "\n").encode())


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

    def call(self, function: Callable[[], object], timeout: float) -> None:
        """Run a function after all earlier ones, and wait for it at most `timeout` seconds.

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
        done.wait(timeout)
        if errors:
            raise errors[0]

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


def grouped_name(metric: str) -> str:
    """Return the name of a metric in trackers, such as `val/loss` for `val_loss`."""
    if "/" in metric:
        return metric
    if metric.startswith("val_"):
        return f"val/{metric.removeprefix('val_')}"
    if metric.startswith("cloze_"):
        return f"score/{metric}"
    if metric in _PERFORMANCE or metric.startswith(("data_wait", "total_")):
        return f"perf/{metric}"
    return f"experts/{metric}" if metric in _EXPERTS else f"train/{metric}"


def _named(values: Mapping[str, int | float], grouped: bool) -> dict[str, int | float]:
    return {grouped_name(name) if grouped else name: value for name, value in values.items()}


def _begins_with_layout(file: Path) -> bool:
    """Return whether an event file has the layout of grouped names, which is written first."""
    with open_regular(file) as stream:
        return _LAYOUT_TAG in stream.read(1 << 16)


def _resumed(run: TrackedRun) -> dict[str, str]:
    return {"id": run.run_id, "resume": "allow"} if run.run_id is not None else {}
