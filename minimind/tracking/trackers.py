"""Logs the metrics of a run to metrics.jsonl and its trackers."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from accelerate import Accelerator

from ..config.options import PretrainConfig
from ..errors import ConfigError, needs_package
from ..io.atomic import cannot_write
from ..run_folder import RunFolder
from .backends import CSV, BackgroundThread, MLflow, SwanLab, TensorBoard, WandB
from .metrics_file import MetricsFile
from .plugins import TrackedRun, Tracker, check_tracker, load_tracker

# Longest wait for slow trackers at the end of a run, in seconds.
CLOSE_SECONDS = 60.0
# SwanLab restores signal handlers when it closes, which Python allows in the main thread only. MLflow's run
# is active in the thread that started it.
CLOSED_BY_MAIN_THREAD = {"swanlab", "mlflow"}
# Ends the key in the state of a checkpoint that marks grouped names, which earlier versions did not use.
GROUPED = ":grouped"

Values = Mapping[str, Any]

# Built-in trackers that write files, and those of services.
_FILES = {"tensorboard": TensorBoard, "csv": CSV}
_SERVICES = {"wandb": WandB, "swanlab": SwanLab, "mlflow": MLflow}

_log = logging.getLogger(__name__)


def check_trackers(config: PretrainConfig, trackers: Sequence[Tracker] = ()) -> None:
    """Refuse trackers whose packages are missing, which Accelerate would silently skip.

    Args:
        config: names trackers.
        trackers: of the caller.

    Raises:
        ConfigError: naming each missing package and the command that installs it, or what is no tracker.
    """
    for tracker in trackers:
        check_tracker(tracker)
    problems = [
        needs_package(f"--tracker {name}", name)
        for name in config.tracker
        if name in ("tensorboard", *_SERVICES) and not _installed(name)
    ]
    for name in config.tracker:
        if name not in (*_FILES, *_SERVICES, "none"):
            check_tracker(load_tracker(name))
    local = "swanlab" in config.tracker and os.environ.get("SWANLAB_MODE") == "local"
    if local and not _installed("swanboard"):
        problems.append(
            "SWANLAB_MODE=local needs a package that is not installed; pip install 'swanlab[dashboard]', or "
            "set SWANLAB_MODE=offline"
        )
    if problems:
        raise ConfigError(problems)


class Trackers:
    """Sends metrics to metrics.jsonl and the trackers of a run, from background threads.

    metrics.jsonl has a separate thread, which a hanging tracker does not delay. Only the main process writes;
    on other ranks every method does nothing. A tracker that fails is reported once and dropped: training
        continues.
    """

    def __init__(
        self,
        config: PretrainConfig,
        run_folder: RunFolder,
        accelerator: Accelerator,
        resume_state: Mapping[str, str] | None = None,
        *,
        start_step: int = 0,
        environment: Mapping[str, Any] | None = None,
        trackers: Sequence[Tracker] = (),
        warn: Callable[[str], None] = _log.warning,
    ) -> None:
        """Open the trackers.

        Args:
            config: trackers and their names; logged as hyper-parameters.
            run_folder: holds metrics.jsonl, TensorBoard events and local files of other trackers.
            accelerator: identifies the main process.
            resume_state: `state` of the run that is resumed.
            start_step: step to resume from; later lines of metrics.jsonl are removed and later TensorBoard
                events are invalidated, so that no step appears twice.
            environment: description of the machine, shown beside the hyper-parameters.
            trackers: of the caller.
            warn: shows a sentence to the user.

        Raises:
            UserError: when metrics.jsonl cannot be rewritten.
        """
        self._warn = warn
        self._ids: dict[str, str] = dict(resume_state or {})
        self._clients: dict[str, Any] = {}
        self._threads: tuple[BackgroundThread, ...] = ()
        if not accelerator.is_main_process:
            return
        try:
            self._file = MetricsFile(run_folder.metrics, keep_to_step=start_step, warn=warn)
        except OSError as error:
            raise cannot_write("--output-dir", run_folder.path, error) from error
        chosen: dict[str, Tracker | None] = {name: None for name in config.tracker if name != "none"}
        for tracker in trackers:
            kind = type(tracker).__name__
            number = sum(name.partition("#")[0] == kind for name in chosen)
            chosen[f"{kind}#{number + 1}" if number else kind] = tracker
        for name, custom in chosen.items():
            run = TrackedRun(
                folder=run_folder.path,
                project=config.project,
                name=config.run_name or run_folder.path.resolve().name,
                start_step=start_step,
                options=hyper_parameters(config),
                environment=environment or {},
                run_id=self._ids.get(name),
            )
            self._start(name, custom, run)
        self._threads = (
            BackgroundThread("metrics", partial(self._drop, "metrics.jsonl", "failed")),
            BackgroundThread("trackers", partial(self._drop, "trackers", "failed")),
        )

    def log(self, values: Values, step: int) -> None:
        """Log metrics of a step; returns at once.

        Args:
            values: numbers by name; strings go to metrics.jsonl only.
            step: optimizer steps done when they were measured.
        """
        if self._threads:
            to_file, to_trackers = self._threads
            to_file.submit(partial(self._file.write, dict(values), step))
            to_trackers.submit(partial(self._log_to_clients, dict(values), step))

    def log_text(self, name: str, text: str, step: int) -> None:
        """Log a text, such as a generated sample; returns at once.

        Args:
            name: as for a metric.
            text: shown by trackers with its line breaks.
            step: optimizer steps done.
        """
        self.log({name: _Text(text)}, step)

    def flush(self, timeout: float = CLOSE_SECONDS) -> None:
        """Wait until metrics.jsonl is on the disk with everything logged before.

        Raises:
            OSError: when the disk refuses.
        """
        if self._threads:
            self._threads[0].call(self._file.sync, timeout)

    def state(self) -> dict[str, str]:
        """Return the run ids of trackers, which a resumed run needs to continue the same charts."""
        return dict(self._ids)

    def close(self, timeout: float = CLOSE_SECONDS) -> None:
        """Write what is queued and close all trackers, waiting at most `timeout` seconds; safe to repeat."""
        if not self._threads:
            return
        to_file, to_trackers = self._threads
        self._threads = ()
        to_file.submit(self._file.close)
        to_trackers.submit(lambda: self._finish(set(self._clients) - CLOSED_BY_MAIN_THREAD))
        closed = [thread.close(timeout) for thread in (to_file, to_trackers)]
        if not all(closed):
            self._warn(f"the trackers were still busy after {timeout:g} s; their last values may be missing.")
        if closed[1]:
            self._finish(set(self._clients) & CLOSED_BY_MAIN_THREAD)

    def _start(self, name: str, custom: Tracker | None, run: TrackedRun) -> None:
        # A run of an earlier version goes on with the names that its charts have.
        grouped = name not in self._ids or name + GROUPED in self._ids
        try:
            client = self._make(name, grouped) if custom is None else custom
            client.start(run)
        except Exception as error:
            self._drop(name, "could not be started", error)
            return
        self._clients[name] = client
        if (run_id := getattr(client, "run_id", None)) is not None:
            self._ids |= {name: str(run_id), **({name + GROUPED: "yes"} if grouped else {})}

    def _make(self, name: str, grouped: bool) -> Any:
        """Return the tracker of a value of --tracker."""
        if name in _FILES:
            return _FILES[name](partial(self._refused, name))
        return _SERVICES[name](grouped=grouped) if name in _SERVICES else load_tracker(name)

    def _log_to_clients(self, values: Values, step: int) -> None:
        numbers = {name: value for name, value in values.items() if not isinstance(value, str)}
        texts = {name: value for name, value in values.items() if isinstance(value, _Text)}

        for name, client in list(self._clients.items()):
            try:
                if numbers:
                    client.log(numbers, step)
                for title, text in texts.items() if hasattr(client, "log_text") else ():
                    client.log_text(title, text, step)
            except Exception as error:
                del self._clients[name]
                self._drop(name, "failed and gets no more values", error)

    def _finish(self, names: Iterable[str]) -> None:
        for name in names:
            try:
                if hasattr(client := self._clients[name], "finish"):
                    client.finish()
            except Exception as error:
                self._drop(name, "could not be closed", error)

    def _refused(self, name: str, error: OSError) -> None:
        self._warn(
            f"tracker {name} cannot write ({error.strerror}); new values stay in memory until the "
            "disk of --output-dir accepts them."
        )

    def _drop(self, name: str, what: str, error: Exception) -> None:
        reason = (str(error).strip().splitlines() or [""])[0]
        self._warn(
            f"tracker {name} {what} ({type(error).__name__}: {reason}); training continues without it."
        )


class _Text(str):
    """A text that trackers show too; other strings go to metrics.jsonl only."""


def hyper_parameters(config: PretrainConfig) -> dict[str, bool | int | float | str]:
    """Return the options as types that every tracker accepts; TensorBoard refuses None and lists."""
    values = dataclasses.asdict(config)
    for name, value in values.items():
        if isinstance(value, (tuple, list)):
            values[name] = ", ".join(map(str, value)) or "none"
        elif value is None:
            values[name] = "none"
    return values


def _installed(package: str) -> bool:
    # find_spec raises for a loaded module without a spec.
    return sys.modules.get(package) is not None or importlib.util.find_spec(package) is not None
