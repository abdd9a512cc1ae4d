"""Saves, resumes and rewinds the state of a run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from ..distributed.collectives import run_on_main_and_broadcast
from ..errors import CheckpointError
from ..run_folder import RunFolder
from ..tracking.console import Progress
from ..tracking.trackers import Trackers
from .compatibility import changed_group_values, changes_evaluation, compare_settings
from .files import StoredCheckpoint, stored_checkpoints
from .resume import AUTO, all_damaged, finished_run
from .state_dict import gather_state_dict, load_state_dict, reserve_host_memory
from .store import CheckpointStore
from .train_state import TrainState


def check_settings(checkpoint: StoredCheckpoint, settings: dict[str, Any]) -> list[str]:
    """Return one sentence per changed setting that may change; see `compare_settings`.

    Raises:
        CheckpointError: naming the settings that must not change.
    """
    refused, changed = compare_settings(checkpoint.trainer["settings"], settings)
    if refused:
        lines = "\n  ".join(refused)
        raise CheckpointError(f"cannot resume from {checkpoint.path}:\n  {lines}")
    return changed


class CallbackStates(Protocol):
    """States of callbacks, which a checkpoint keeps too."""

    def state_dict(self) -> dict[str, Any]:
        """Return all states as values that JSON can hold."""

    def load_state_dict(self, saved: Mapping[str, Any], note: Callable[[str], object]) -> None:
        """Load the states of a checkpoint."""


def finished_state(folder: RunFolder, total_steps: int, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the training state of a finished run, else None; see `finished_run`.

    Raises:
        CheckpointError: for settings that cannot be those of the run.
    """
    state = finished_run(folder, total_steps)
    if state is not None:
        check_settings(stored_checkpoints(folder.checkpoints)[-1], settings)
    return state


@dataclass
class RunCheckpoints:
    """Connects model, optimizer and trackers of a run with its checkpoint store. Every rank calls every
    method.

    Attributes:
        store: the checkpoint store.
        settings: compared with those of a checkpoint; see `compare_settings`.
        progress: shows warnings and notes.
        callbacks: of the run, whose states are saved and loaded.
        trackers: set before the first save, after `resume` has returned the step to open them at.
        saved_settings: of the checkpoint that `resume` has loaded; None without one.
        best_restarted: whether `resume` has started the best validation loss again.
    """

    store: CheckpointStore
    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    settings: dict[str, Any]
    progress: Progress
    callbacks: CallbackStates
    trackers: Trackers = field(init=False)
    saved_settings: dict[str, Any] | None = field(init=False, default=None)
    best_restarted: bool = field(init=False, default=False)
    _reserved: list[torch.Tensor] = field(init=False, default_factory=list)

    def reserve_host_memory(self) -> None:
        """Pin the memory of the first save, which would take part of a second during training."""
        self._reserved = reserve_host_memory(self.accelerator, self.model, self.optimizer)

    def resume(self, source: str | None, *, branch: bool = False) -> tuple[TrainState, int, dict[str, str]]:
        """Load a checkpoint, if one is asked for, and return the state to start from.

        Args:
            source: None, "auto" for the newest valid checkpoint, or a path.
            branch: start a new run from a checkpoint of another one: without warnings about changed settings,
                and with new charts in the trackers.

        Returns:
            The state, its step if the checkpoint is in the run's folder (else -1), and the run ids of the
            trackers.

        Raises:
            CheckpointError: when the checkpoint is damaged or belongs to another run.
        """

        def find() -> tuple[StoredCheckpoint | None, bool]:
            self.store.wait_until_written()
            self.store.clean()
            if source is None:
                return None, False
            if source == AUTO:
                latest = self.store.latest(self.progress.warn)
                if latest is None and (damaged := self.store.entries()):
                    raise all_damaged(damaged)
                return latest, True
            checkpoint = self.store.open(Path(source))
            return checkpoint, checkpoint.path.parent.resolve() == self.store.folder.resolve()

        checkpoint, is_own = run_on_main_and_broadcast(self.accelerator, find)
        if checkpoint is None:
            if source is not None:
                self.progress.note(f"--resume: no checkpoint in {self.store.folder}, starting at step 0.")
            return TrainState(), -1, {}

        def compare() -> frozenset[str]:
            changed = check_settings(checkpoint, self.settings)
            for change in changed if not branch else ():
                self.progress.warn(change)
            return changed_group_values(checkpoint.trainer["settings"], self.settings)

        changed = run_on_main_and_broadcast(self.accelerator, compare)
        trainer = load_state_dict(
            self.accelerator, self.model, self.optimizer, checkpoint, keep_group_values=changed
        )
        self.saved_settings = trainer["settings"]
        restarts_best = changes_evaluation(self.saved_settings, self.settings)
        if restarts_best:
            self.progress.warn(
                "--eval-batches or the batch size has changed: evaluations use another sample of the "
                "validation data than before, so the best validation loss starts again."
            )
        state = self._load_train_state(trainer, restart_best=restarts_best)
        self.callbacks.load_state_dict(trainer.get("callbacks", {}), self.progress.note)
        self.progress.note(f"resuming from step {state.step:,} ({checkpoint.path}).")
        charts = {} if branch and not is_own else trainer["trackers"]
        return state, state.step if is_own else -1, charts

    def save(self, state: TrainState) -> None:
        """Copy the state to the host and write it in the background."""
        self.store.wait_until_written()
        extra = {
            "step": state.step,
            "tokens": state.tokens,
            "state": dataclasses.replace(state, stopping=False).to_dict(),
            "settings": self.settings,
            "trackers": self.trackers.state(),
            "callbacks": self.callbacks.state_dict(),
        }
        self._reserved.clear()
        snapshot = gather_state_dict(self.accelerator, self.model, self.optimizer, extra)
        if snapshot is not None:
            # A resumed run does not repeat the reports up to this step: they must be on the disk first.
            self.store.save(snapshot, first=self.trackers.flush)

    def mark_best(self, state: TrainState) -> None:
        """Protect the checkpoint of this step from rotation: its validation loss is the lowest so far."""
        if self.accelerator.is_main_process:
            self.store.mark_best(state.step, state.best_val_loss)

    def _load_train_state(self, trainer: dict[str, Any], *, restart_best: bool) -> TrainState:
        """Return the state of a loaded checkpoint, and abandon later checkpoints."""
        state = TrainState.from_dict(trainer["state"])
        if restart_best:
            state.best_val_loss, self.best_restarted = math.inf, True
            if self.accelerator.is_main_process:
                self.store.forget_best()
            self.accelerator.wait_for_everyone()
        best = self.store.best()
        if best is not None and best[0] <= state.step:
            state.best_val_loss = min(state.best_val_loss, best[1])
        if self.accelerator.is_main_process:
            self.store.rewind(state.step)
        return state
