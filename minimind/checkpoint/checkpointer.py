"""The checkpoints of a run: how it is saved, taken up again, and put back."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..distributed.collectives import run_on_main_and_broadcast
from ..errors import CheckpointError
from ..tracking.console import Progress
from ..tracking.trackers import Trackers
from .compatibility import changed_group_values, differences
from .files import StoredCheckpoint
from .state_dict import gather_state_dict, load_state_dict
from .store import CheckpointStore
from .train_state import TrainState


def refuse_other_settings(checkpoint: StoredCheckpoint, settings: dict[str, Any]) -> list[str]:
    """Return a sentence for each setting that has changed and may; see `resume.differences`.

    Raises:
        CheckpointError: naming what may not change.
    """
    refused, changed = differences(checkpoint.trainer["settings"], settings)
    if refused:
        lines = "\n  ".join(refused)
        raise CheckpointError(f"{checkpoint.path} belongs to a run with other settings:\n  {lines}")
    return changed


@dataclass
class RunCheckpoints:
    """Connects the parts of a run with the store of its checkpoints. Every process calls every method.

    Attributes:
        store: the folder.
        accelerator: tells and joins the processes.
        model: prepared.
        optimizer: prepared.
        settings: what decides whether a checkpoint belongs to this run; see `resume.differences`.
        progress: where warnings and notes go.
        trackers: set before the first save; they are opened at the step that `resume` returns.
    """

    store: CheckpointStore
    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    settings: dict[str, Any]
    progress: Progress
    trackers: Trackers = field(init=False)

    def resume(self, wanted: str | None, *, branch: bool = False) -> tuple[TrainState, int, dict[str, str]]:
        """Return the state to start from, from a checkpoint if one is wanted.

        Args:
            wanted: None, "auto" for the newest valid one, or a path.
            branch: the run leaves the one of the checkpoint on purpose: changes need no warning, and the
                trackers begin new charts.

        Returns:
            The state, its step if its checkpoint lies in the run's folder (else -1), and the run ids of the
            trackers.

        Raises:
            CheckpointError: when the checkpoint is damaged or belongs to another run.
        """

        def find() -> tuple[StoredCheckpoint | None, bool]:
            self.store.settle()
            self.store.clean()
            if wanted is None:
                return None, False
            if wanted == "auto":
                return self.store.latest(self.progress.warn), True
            checkpoint = self.store.open(Path(wanted))
            return checkpoint, checkpoint.path.parent.resolve() == self.store.folder.resolve()

        checkpoint, is_own = run_on_main_and_broadcast(self.accelerator, find)
        if checkpoint is None:
            if wanted is not None:
                self.progress.note(
                    f"--resume: no checkpoint in {self.store.folder}, so the run starts from the beginning."
                )
            return TrainState(), -1, {}

        def compare() -> frozenset[str]:
            changed = refuse_other_settings(checkpoint, self.settings)
            for change in changed if not branch else ():
                self.progress.warn(change)
            return changed_group_values(checkpoint.trainer["settings"], self.settings)

        changed = run_on_main_and_broadcast(self.accelerator, compare)
        trainer = load_state_dict(
            self.accelerator, self.model, self.optimizer, checkpoint, keep_group_values=changed
        )
        state = self._take_up(trainer)
        self.progress.note(f"going on from step {state.step:,} ({checkpoint.path}).")
        charts = {} if branch and not is_own else trainer["trackers"]
        return state, state.step if is_own else -1, charts

    def save(self, state: TrainState) -> None:
        """Copy the state to the host and let the store write it in the background."""
        self.store.settle()
        extra = {
            "step": state.step,
            "tokens": state.tokens,
            "state": dataclasses.replace(state, stopping=False).to_dict(),
            "settings": self.settings,
            "trackers": self.trackers.state(),
        }
        snapshot = gather_state_dict(self.accelerator, self.model, self.optimizer, extra)
        if snapshot is not None:
            # A run that goes on from here does not repeat the reports up to here: they must survive too.
            self.store.save(snapshot, first=self.trackers.settle)

    def mark_best(self, state: TrainState) -> None:
        """Keep the checkpoint of this step from rotation: its validation loss is the lowest so far."""
        if self.accelerator.is_main_process:
            self.store.mark_best(state.step, state.best_val_loss)

    def _take_up(self, trainer: dict[str, Any]) -> TrainState:
        """Return the state of a checkpoint that was restored, and give the later checkpoints up."""
        state = TrainState.from_dict(trainer["state"])
        best = self.store.best()
        if best is not None and best[0] <= state.step:
            state.best_val_loss = min(state.best_val_loss, best[1])
        if self.accelerator.is_main_process:
            self.store.rewind(state.step)
        return state
