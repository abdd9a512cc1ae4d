"""Progress counters of a run, which a checkpoint keeps beside model and optimizer state."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..data.loader import StepBatch
from ..errors import CheckpointError

# Keys in checkpoints that differ from the attribute's name.
_STORED_KEYS = {
    "sequence": "row",
    "skipped_in_a_row": "left_out_in_a_row",
    "excluded_sequences": "left_out",
    "decay_window": "ending",
}


@dataclass
class TrainState:
    """Progress of a run. Everything else follows from the configuration and these numbers.

    Attributes:
        step: optimizer steps done.
        epoch: the current epoch, from 0.
        sequence: sequences of this epoch already trained on.
        tokens: input tokens trained on, without padding, over all ranks.
        skipped_steps: updates skipped for a loss or gradient that was not finite, or for a loss spike.
        best_val_loss: lowest validation loss so far.
        digest: hash of the sequences of all steps so far, in order; the same for any world size.
        interval_loss: summed loss of the steps since the last report.
        interval_targets: targets in those steps.
        interval_routing: `ExpertBalance.sums` added over those steps; empty without experts.
        skipped_in_a_row: consecutive updates skipped, up to the last step.
        recent_losses: losses of the latest steps in nats per token, from which spikes are detected.
        excluded_sequences: epoch, first sequence and number of sequences of each step that a rewind excludes.
        rewinds: how often the run has rewound to a checkpoint.
        stopping: all ranks have agreed to stop after this step.
        decay_window: first step of the decay and number of steps of the run, where --max-time or --budget set
            them.
        budget_seconds: seconds of the time budget used over all attempts; 0 without one.
    """

    step: int = 0
    epoch: int = 0
    sequence: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    best_val_loss: float = math.inf
    digest: str = ""
    # A checkpoint may fall between two reports, so what the next one needs is part of the state.
    interval_loss: float = 0.0
    interval_targets: int = 0
    interval_routing: list[float] = field(default_factory=list)
    skipped_in_a_row: int = 0
    recent_losses: list[float] = field(default_factory=list)
    excluded_sequences: list[list[int]] = field(default_factory=list)
    rewinds: int = 0
    stopping: bool = False
    decay_window: tuple[int, int] | None = None
    budget_seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the state as a checkpoint stores it."""
        return {_STORED_KEYS.get(name, name): value for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> TrainState:
        """Return the state of a checkpoint.

        Raises:
            CheckpointError: for an unknown key, or a value of the wrong type.
        """
        names = {key: name for name, key in _STORED_KEYS.items()}
        defaults = dataclasses.asdict(cls())
        values: dict[str, Any] = {}
        for key, value in stored.items():
            name = names.get(key, key)
            default = defaults.get(name, ...)
            if name == "decay_window" and isinstance(value, list) and len(value) == 2:
                value = default = tuple(value)
            if not isinstance(value, int | float if isinstance(default, float) else type(default)):
                raise CheckpointError(f"trainer.json of the checkpoint is damaged: {key} is {value!r:.40}.")
            values[name] = value
        return cls(**values)

    def advance(self, batch: StepBatch, sequences_per_epoch: int) -> None:
        """Count one optimizer step."""
        self.step += 1
        self.tokens += batch.num_tokens
        self.digest = chained_digest(self.digest, batch.digest)
        self.skip(batch, sequences_per_epoch)

    def skip(self, batch: StepBatch, sequences_per_epoch: int) -> None:
        """Move past the sequences of a step."""
        self.epoch, self.sequence = batch.epoch, self.sequence + batch.num_sequences
        if self.sequence >= sequences_per_epoch:
            self.epoch, self.sequence = self.epoch + 1, 0

    def excludes(self, batch: StepBatch) -> bool:
        """Return whether a rewind has excluded sequences of the next step."""
        end = self.sequence + batch.num_sequences
        return any(
            epoch == batch.epoch and first < end and self.sequence < first + count
            for epoch, first, count in self.excluded_sequences
        )


def chained_digest(before: str, step_digest: str) -> str:
    """Return the digest of all steps so far, given that of the steps before and that of the last step."""
    return hashlib.blake2b((before + step_digest).encode(), digest_size=16).hexdigest()
