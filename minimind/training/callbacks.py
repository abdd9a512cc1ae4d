"""Callbacks: objects of the caller that a run calls at its events."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from torch import nn

from ..checkpoint.files import folder_name
from ..checkpoint.store import CheckpointStore
from ..checkpoint.train_state import TrainState
from ..config.options import PretrainConfig
from ..distributed.shutdown import StopRequest
from ..errors import ConfigError
from .loss_spikes import Spike
from .result import PretrainResult

HOOKS = ("on_start", "on_report", "on_evaluation", "on_save", "on_spike", "on_end")


@dataclass(eq=False, repr=False)
class Run:
    """What a callback sees of its run. Reading it changes nothing.

    Attributes:
        config: options of the run, with every size and the learning rate filled in.
        model: prepared by Accelerate; changing its weights changes the run.
        accelerator: of the run, for collective operations of all ranks.
    """

    config: PretrainConfig
    model: nn.Module
    accelerator: Accelerator
    _state: Callable[[], TrainState]
    _last_step: Callable[[], int]
    _stop: StopRequest
    _store: CheckpointStore

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.config.output_dir)

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, the rank that writes files."""
        return self.accelerator.is_main_process

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._state().step

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self._last_step()

    @property
    def tokens(self) -> int:
        """Input tokens trained on, over all ranks."""
        return self._state().tokens

    def request_stop(self, reason: str) -> None:
        """End the run after the next step, with a checkpoint; `reason` becomes `PretrainResult.stopped`."""
        self._stop.request(reason)

    def checkpoint_path(self, step: int) -> Path:
        """Return the folder of the checkpoint of a step."""
        return self._store.folder / folder_name(step)

    def wait_until_saved(self) -> None:
        """Wait until the checkpoints of all earlier saves are on the disk."""
        self._store.wait_until_written()


class Callback(Protocol):
    """Follows a run. Subclass it and override what is needed, or pass any object with some of these methods.

    Every rank calls every hook at the same step, without gradients. Random numbers drawn in a hook do not
    change the run, and neither does the mode (`train`, `eval`) in which it leaves the model. An exception in
    a hook ends the run as a signal does, with a checkpoint, and `pretrain` raises it at the end; the callback
    is not called again.

    A callback with the methods `state_dict()`, which returns values that JSON can hold, and
    `load_state_dict(state)` keeps its state in checkpoints: after a resume or a rewind it continues with what
    it had at that step.
    """

    def on_start(self, run: Run) -> None:
        """Begin or resume, before the first step; `run.step` steps are done."""

    def on_report(self, run: Run, step: int, metrics: Mapping[str, Any]) -> None:
        """Handle the training metrics reported every `log_interval` steps, named as in metrics.jsonl."""

    def on_evaluation(self, run: Run, step: int, metrics: Mapping[str, Any]) -> None:
        """Handle a validation: `val_loss`, `val_perplexity`, `val_bits_per_byte`, `val_tokens`."""

    def on_save(self, run: Run, step: int, path: Path) -> None:
        """Handle a checkpoint, which a background thread writes to `path`; see `Run.wait_until_saved`.

        The checkpoint holds the state that the callback had before this call.
        """

    def on_spike(self, run: Run, spike: Spike) -> None:
        """Handle a loss spike, or a loss or gradient that is not finite."""

    def on_end(self, run: Run, result: PretrainResult) -> None:
        """Handle the end, also of a run that stops early."""


@runtime_checkable
class Stateful(Protocol):
    """What a callback needs for a state in checkpoints."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return the state as values that JSON can hold."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, which JSON has converted: tuples are lists, keys are strings."""


class Callbacks:
    """The callbacks of a run, in the order in which they were given."""

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        """Name the callbacks by their classes, a second one of a class with its number.

        Raises:
            ConfigError: for an object without any hook.
        """
        self._callbacks: dict[str, Callback] = {}
        for callback in callbacks:
            kind = type(callback).__name__
            if isinstance(callback, type) or not any(hasattr(callback, hook) for hook in HOOKS):
                raise ConfigError(f"callbacks={callback!r} has none of the methods {', '.join(HOOKS)}.")
            number = sum(name.partition("#")[0] == kind for name in self._callbacks)
            self._callbacks[f"{kind}#{number + 1}" if number else kind] = callback
        self._run: Run | None = None
        self._error: Exception | None = None
        self._failed: set[str] = set()
        # The step of the last evaluation that the callbacks have seen.
        self._evaluated: int | None = None

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def start(self, run: Run) -> None:
        """Call `on_start`.

        Raises:
            Exception: what a callback raises.
        """
        self._run = run
        self._call("on_start")
        self.raise_error()

    def report(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Call `on_report`."""
        self._call("on_report", step, metrics)

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Call `on_evaluation`, once for each step."""
        if self._evaluated != step:
            self._evaluated = step
            self._call("on_evaluation", step, metrics)

    def save(self, step: int) -> None:
        """Call `on_save`."""
        if self._run is not None:
            self._call("on_save", step, self._run.checkpoint_path(step))

    def spike(self, spike: Spike) -> None:
        """Call `on_spike`."""
        self._call("on_spike", spike)

    def end(self, result: PretrainResult) -> None:
        """Call `on_end`.

        Raises:
            Exception: the first one that a callback has raised during the run.
        """
        self._call("on_end", result)
        self.raise_error()

    def raise_error(self) -> None:
        """Raise the first exception of a callback, if there was one."""
        if self._error is not None:
            raise self._error

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the callbacks that have one, by name, for a checkpoint."""
        states = {}
        for name, callback in self._callbacks.items():
            if name not in self._failed and isinstance(callback, Stateful):
                with self._guard(name, "state_dict"):
                    # A copy: the checkpoint is written while the callback goes on.
                    states[name] = json.loads(json.dumps(callback.state_dict()))
        return {"evaluated": self._evaluated, "states": states}

    def load_state_dict(self, saved: Mapping[str, Any], note: Callable[[str], object]) -> None:
        """Load the states of a checkpoint; `note` gets a sentence for each that has no counterpart."""
        self._evaluated = saved.get("evaluated")
        states = saved.get("states", {})
        for name, state in states.items():
            callback = self._callbacks.get(name)
            if isinstance(callback, Stateful):
                callback.load_state_dict(state)
            else:
                note(
                    f"the checkpoint holds a state of the callback {name}, which this run does not have; "
                    "pass it to pretrain(callbacks=...) to continue it."
                )
        for name, callback in self._callbacks.items():
            if isinstance(callback, Stateful) and name not in states:
                note(f"the checkpoint holds no state of the callback {name}; it starts without one.")

    def _call(self, hook: str, *args: Any) -> None:
        for name, callback in self._callbacks.items():
            method = getattr(callback, hook, None)
            if method is not None and name not in self._failed:
                with self._guard(name, hook):
                    method(self._run, *args)

    @contextmanager
    def _guard(self, name: str, method: str) -> Iterator[None]:
        """Keep an exception for `raise_error` and ask the run to stop; restore random state and mode."""
        run = self._run
        device = None if run is None else run.accelerator.device
        devices = [device] if device is not None and device.type == "cuda" else []
        training = run is not None and run.model.training
        try:
            with torch.random.fork_rng(devices), torch.no_grad():
                yield
        except Exception as error:
            error.add_note(f"raised by {name}.{method}, a callback of pretrain()")
            self._error = self._error or error
            self._failed.add(name)
            if run is not None:
                run.request_stop(f"an exception in {name}.{method}")
        finally:
            if run is not None and run.model.training != training:
                run.model.train(training)
