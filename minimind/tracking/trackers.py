"""Where the numbers of a run go: metrics.jsonl always, TensorBoard, WandB and SwanLab as asked for."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..config.options import PretrainConfig
from ..errors import ConfigError
from ..run_folder import RunFolder
from .backends import Client, HyperParameters, SwanLab, TensorBoard, WandB
from .metrics_file import MetricsFile

_INSTALL = {
    "tensorboard": "tensorboard",
    "wandb": "'minimind[wandb]'",
    "swanlab": "'minimind[swanlab]'",
}
# Seconds that the end of a run waits for trackers that are slow or gone.
CLOSE_SECONDS = 60.0
# SwanLab puts back signal handlers when it closes, which Python allows to the main thread alone.
CLOSED_BY_MAIN_THREAD = ("swanlab",)

Values = Mapping[str, Any]

_log = logging.getLogger(__name__)


def check_trackers(config: PretrainConfig) -> None:
    """Refuse trackers whose packages are missing; Accelerate would leave them out without a word.

    Raises:
        ConfigError: naming each missing package and the command that installs it.
    """
    problems = [
        f"--tracker {name} needs a package that is not installed; pip install {_INSTALL[name]}"
        for name in config.tracker
        if name != "none" and not _installed(name)
    ]
    local = "swanlab" in config.tracker and os.environ.get("SWANLAB_MODE") == "local"
    if local and not _installed("swanboard"):
        problems.append(
            "SWANLAB_MODE=local needs a package that is not installed; pip install 'swanlab[dashboard]', or "
            "set SWANLAB_MODE=offline"
        )
    if problems:
        raise ConfigError(problems)


class Trackers:
    """The trackers of a run, fed in the background so that no step waits for a disk or a network.

    metrics.jsonl has a thread of its own, which a tracker that hangs does not hold up. Only the main process
    writes; on the others everything here does nothing. A tracker that fails is reported once and left out
    from then on: the run and the other trackers go on.
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
        warn: Callable[[str], None] = _log.warning,
    ) -> None:
        """Open the trackers.

        Args:
            config: which trackers, under which names; sent as hyper-parameters.
            run_folder: where metrics.jsonl, the TensorBoard events and local files of the others lie.
            accelerator: tells the main process.
            resume_state: what `state` returned in the run that this one goes on from.
            start_step: the step it goes on from; what was logged beyond it goes out of metrics.jsonl and
                out of TensorBoard's view, so that no step appears twice.
            environment: what the run runs on, shown beside the hyper-parameters.
            warn: shows a sentence to the user.
        """
        self._warn = warn
        self._ids: dict[str, str] = dict(resume_state or {})
        self._clients: dict[str, Client] = {}
        self._feeds: tuple[_Feed, ...] = ()
        if not accelerator.is_main_process:
            return
        self._file: MetricsFile | None = MetricsFile(run_folder.metrics, keep_to_step=start_step)
        for name in config.tracker:
            if name != "none":
                self._start(name, config, run_folder.path, start_step, environment or {})
        self._feeds = (_Feed("metrics", self._write_file), _Feed("trackers", self._tell_clients))

    def log(self, values: Values, step: int) -> None:
        """Take the numbers of a step; returns at once.

        Args:
            values: numbers by name; text among them goes to metrics.jsonl alone.
            step: optimizer steps done when they were measured.
        """
        for feed in self._feeds:
            feed.put(dict(values), step)

    def log_text(self, name: str, text: str, step: int) -> None:
        """Take a text, such as a sample of what the model writes; returns at once.

        Args:
            name: as for a number.
            text: of any length and number of lines; the trackers show it as it is.
            step: optimizer steps done.
        """
        self.log({name: _Text(text)}, step)

    def settle(self, timeout: float = CLOSE_SECONDS) -> None:
        """Wait until metrics.jsonl holds, on the disk, all that was logged before; never raises."""
        if self._feeds and self._feeds[0].settle(timeout) and self._file is not None:
            # A file that cannot be written is reported where it is written.
            with suppress(OSError, ValueError):
                self._file.sync()

    def state(self) -> dict[str, str]:
        """Return the run ids that a resumed run hands back to go on in the same charts."""
        return dict(self._ids)

    def close(self, timeout: float = CLOSE_SECONDS) -> None:
        """Write what is queued and close all trackers, waiting at most `timeout` seconds; safe to repeat."""
        if not self._feeds:
            return
        to_file, to_trackers = self._feeds
        self._feeds = ()
        ended = [to_file.end(timeout, self._close_file), to_trackers.end(timeout, self._finish_in_thread)]
        if not all(ended):
            self._warn(f"the trackers were still busy after {timeout:g} s; their last values may be missing.")
        if ended[1]:
            self._finish(name for name in self._clients if name in CLOSED_BY_MAIN_THREAD)

    def _start(
        self, name: str, config: PretrainConfig, folder: Path, start_step: int, environment: Values
    ) -> None:
        try:
            client = _make(name, config, folder, self._ids.get(name), start_step)
            client.start()
            client.describe(hyper_parameters(config), environment, start_step)
        except Exception as error:
            self._give_up(name, "could not be started", error)
            return
        self._clients[name] = client
        run_id = getattr(getattr(client, "run", None), "id", None)
        if run_id is not None:
            self._ids[name] = str(run_id)

    def _tell_clients(self, values: Values, step: int) -> None:
        numbers = {name: value for name, value in values.items() if not isinstance(value, str)}
        texts = {name: value for name, value in values.items() if isinstance(value, _Text)}
        for name, client in list(self._clients.items()):
            try:
                if numbers:
                    client.log(numbers, step)
                for title, text in texts.items():
                    client.log_text(title, text, step)
            except Exception as error:
                del self._clients[name]
                self._give_up(name, "failed and gets no more values", error)

    def _finish_in_thread(self) -> None:
        self._finish(name for name in self._clients if name not in CLOSED_BY_MAIN_THREAD)

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()

    def _finish(self, names: Iterable[str]) -> None:
        for name in names:
            try:
                self._clients[name].finish()
            except Exception as error:
                self._give_up(name, "could not be closed", error)

    def _write_file(self, values: Values, step: int) -> None:
        try:
            if self._file is not None:
                self._file.write(values, step)
        except OSError as error:
            self._file = None
            self._give_up("metrics.jsonl", "cannot be written any more", error)

    def _give_up(self, name: str, what: str, error: Exception) -> None:
        reason = (str(error).strip().splitlines() or [""])[0]
        self._warn(f"tracker {name} {what} ({type(error).__name__}: {reason}); training goes on without it.")


class _Feed:
    """A queue of values, and the daemon thread that works it off."""

    def __init__(self, name: str, work: Callable[[Values, int], None]) -> None:
        self._work = work
        self._queue: queue.Queue[tuple[Values, int] | Callable[[], None]] = queue.Queue()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, values: Values, step: int) -> None:
        self._queue.put((values, step))

    def settle(self, timeout: float) -> bool:
        """Wait until the work asked for so far is done; return whether it was within `timeout` seconds."""
        done = threading.Event()
        self._queue.put(done.set)
        return done.wait(timeout)

    def end(self, timeout: float, last: Callable[[], None]) -> bool:
        """Do the work asked for so far and `last`, then end the thread; return as `settle` does."""

        def finish() -> None:
            self._ended = True
            last()

        self._queue.put(finish)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._ended:
            item = self._queue.get()
            if callable(item):
                item()
            else:
                self._work(*item)


class _Text(str):
    """A text for people, which trackers show too; other text among the values is for metrics.jsonl alone."""


def hyper_parameters(config: PretrainConfig) -> HyperParameters:
    """Return the options in the types that every tracker takes; TensorBoard refuses None and lists."""
    values = dataclasses.asdict(config)
    for name, value in values.items():
        if isinstance(value, (tuple, list)):
            values[name] = ", ".join(map(str, value)) or "none"
        elif value is None:
            values[name] = "none"
    return values


def _make(name: str, config: PretrainConfig, folder: Path, run_id: str | None, start_step: int) -> Client:
    if name == "tensorboard":
        return TensorBoard(folder, start_step)
    kind = WandB if name == "wandb" else SwanLab
    return kind(config.project, config.run_name or folder.resolve().name, folder, run_id)


def _installed(package: str) -> bool:
    # A module that is loaded may lack the spec that find_spec wants.
    return sys.modules.get(package) is not None or importlib.util.find_spec(package) is not None
