"""Progress of a run: the values that a checkpoint keeps beside weights and optimizer state."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field

from ..data.loader import StepBatch


@dataclass
class TrainState:
    """Where a run stands; everything else follows from the configuration and these few numbers.

    Attributes:
        step: optimizer steps done.
        epoch: the pass under way, from 0.
        row: rows of this pass trained.
        tokens: real input tokens trained, over all processes.
        skipped_steps: updates left out, for a loss or gradient that was not finite or a loss that jumped.
        best_val_loss: lowest validation loss so far.
        digest: tells the rows of all steps so far, in their order, from any others; the same on any number
            of processes.
        interval_loss: summed loss of the steps since the last report.
        interval_targets: targets in those steps.
        interval_routing: what `ExpertBalance.sums` gave in those steps, added up; nothing without experts.
        left_out_in_a_row: updates left out one after the other, up to the last step.
        recent_losses: losses of the latest steps in nats per token, from which a jump is told.
        left_out: pass, first row and number of rows of each step that a rewind has taken out for good.
        rewinds: how often the run has gone back to a checkpoint by itself.
        stopping: all processes have agreed to stop after this step.
        ending: where a time limit has set the end: the first step of the decay and the number of steps.
    """

    step: int = 0
    epoch: int = 0
    row: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    best_val_loss: float = math.inf
    digest: str = ""
    # A checkpoint may fall between two reports, so what the next one needs is part of the state.
    interval_loss: float = 0.0
    interval_targets: int = 0
    interval_routing: list[float] = field(default_factory=list)
    left_out_in_a_row: int = 0
    recent_losses: list[float] = field(default_factory=list)
    left_out: list[list[int]] = field(default_factory=list)
    rewinds: int = 0
    stopping: bool = False
    ending: tuple[int, int] | None = None

    def advance(self, batch: StepBatch, sequences_per_epoch: int) -> None:
        """Count one optimizer step."""
        self.step += 1
        self.tokens += batch.num_tokens
        self.digest = chained_digest(self.digest, batch.digest)
        self.pass_over(batch, sequences_per_epoch)

    def pass_over(self, batch: StepBatch, sequences_per_epoch: int) -> None:
        """Move past the rows of a step."""
        self.epoch, self.row = batch.epoch, self.row + batch.num_sequences
        if self.row >= sequences_per_epoch:
            self.epoch, self.row = self.epoch + 1, 0

    def leaves_out(self, batch: StepBatch) -> bool:
        """Whether the step at the cursor has rows that a rewind has taken out."""
        end = self.row + batch.num_sequences
        return any(
            epoch == batch.epoch and row < end and self.row < row + count
            for epoch, row, count in self.left_out
        )


def chained_digest(before: str, step_digest: str) -> str:
    """Return the digest of all steps up to one from that of the steps before it and its own."""
    return hashlib.blake2b((before + step_digest).encode(), digest_size=16).hexdigest()
