"""Loss-spike detection, and reports of the documents of a spike.

T tokens of a sequence, V vocabulary entries.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.nn import functional as F

from ..data.loader import Loader
from ..data.packing import IGNORED
from ..io.atomic import write_text
from ..tokenizer import Tokenizer
from .async_metrics import DELAY_STEPS

# Losses that a threshold is computed from, and how many must be known before there is one.
WINDOW = 128
MIN_STEPS = 100
# Nats per token. Lower bound of the deviation: a loss that has all but converged still fluctuates.
LEAST_DEVIATION = 0.01
# The standard deviation of normal noise as a multiple of its median absolute deviation.
_MAD_TO_SIGMA = 1.4826

# Reports of one process; later spikes only print a warning.
MAX_REPORTS = 100
# A run that rewinds more often has another problem than a few bad documents.
MAX_REWINDS = 5
MAX_TEXT_CHARACTERS = 2000


@dataclass(frozen=True)
class Spike:
    """A step with a loss spike, or whose loss or gradient is not finite.

    Attributes:
        step: its number, from 1.
        loss: nats per token, over all ranks.
        limit: the threshold.
        grad_norm: before clipping.
        learning_rate: of that step.
        update_skipped: whether weights and optimizer state were left unchanged.
        epoch: from 0.
        sequence: index in the epoch of the step's first sequence.
        num_sequences: sequences of the step.
        rewinds: how often the run had rewound before.
        weights_of_step: the step whose weights the documents are evaluated with. On a GPU the host learns of
            a loss two steps later, and an update that was not skipped has been applied: losses may be lower.
    """

    step: int
    loss: float
    limit: float
    grad_norm: float
    learning_rate: float
    update_skipped: bool
    epoch: int
    sequence: int
    num_sequences: int
    rewinds: int
    weights_of_step: int

    @property
    def jumped(self) -> bool:
        """Whether everything is finite and the loss above the threshold."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def what(self) -> str:
        """What is wrong, as the beginning of a sentence."""
        if self.jumped:
            return f"the loss jumped to {self.loss:.4g} (limit {self.limit:.4g})"
        return f"the {'gradient' if math.isfinite(self.loss) else 'loss'} is not finite"

    @property
    def file_name(self) -> str:
        """Name of the report. The same step with the same sequences overwrites it, as after a resume."""
        return f"step-{self.step:08d}" + (f"-rewind-{self.rewinds}" if self.rewinds else "") + ".json"

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes under the keys of the report."""
        keys = {"sequence": "row", "num_sequences": "rows"}
        return {keys.get(name, name): value for name, value in vars(self).items()}


class SpikeError(Exception):
    """Leaves the training loop to rewind; the trainer catches it.

    Attributes:
        spike: the step with the loss spike.
    """

    def __init__(self, spike: Spike) -> None:
        super().__init__(spike.what)
        self.spike = spike


def append_loss(recent: list[float], loss: float) -> None:
    """Append the loss of a step (nats per token), and drop those too old for any threshold."""
    # Infinity exceeds no later threshold and is ignored by all, so it stands for NaN too.
    recent.append(loss if math.isfinite(loss) else math.inf)
    del recent[: -(WINDOW + DELAY_STEPS)]


def spike_threshold(recent: Sequence[float], unread: int, sigma: float, batch_fraction: float = 1.0) -> float:
    """Return the loss in nats per token above which the next step is a spike; infinite at first.

    The threshold is the median plus `sigma` robust deviations, 1.4826 times the median absolute deviation
    (Leys et al. 2013, "Detecting outliers"): mean and standard deviation would be moved by the spikes
    themselves and by the falling loss at the start. The last two losses are never used, because on a GPU they
    are not known yet: so the threshold of a step is the same on any device, on any rank, and after a resume.

    Args:
        recent: losses of the steps before, oldest first, as `append_loss` keeps them.
        unread: steps before this one whose losses are not in `recent` yet.
        sigma: robust deviations.
        batch_fraction: sequences of this step as a share of a full one; fewer sequences scatter more.
    """
    known = recent[: len(recent) - (DELAY_STEPS - unread)]
    finite = [loss for loss in known[-WINDOW:] if math.isfinite(loss)]
    if len(finite) < MIN_STEPS:
        return math.inf
    centre = median(finite)
    deviation = _MAD_TO_SIGMA * median(abs(loss - centre) for loss in finite)
    return centre + sigma * max(deviation, LEAST_DEVIATION) / math.sqrt(batch_fraction)


class SpikeReporter:
    """Writes the documents of a step with their losses, the worst first."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, loader: Loader, tokenizer: Tokenizer, folder: Path
    ) -> None:
        """Write nothing yet.

        Args:
            loader: reads the sequences again.
            tokenizer: decodes them.
            folder: of all reports.
        """
        self._accelerator, self._model, self._loader = accelerator, model, loader
        self._tokenizer, self._folder = tokenizer, folder
        self._last_step = -1
        self._reports = 0

    def report(self, spike: Spike) -> str:
        """Evaluate each document of a step and write the report; every rank must call this.

        The second and later ones of consecutive spikes get none.

        Returns:
            A clause with the path of the report, or why it could not be written; empty without a report.
        """
        consecutive, self._last_step = spike.step == self._last_step + 1, spike.step
        if consecutive or self._reports >= MAX_REPORTS:
            return ""
        self._reports += 1
        documents = gather_object(
            document_losses(self._model, self._loader, self._tokenizer, spike.epoch, spike.sequence)
        )
        file = self._folder / spike.file_name
        if self._accelerator.is_main_process:
            documents.sort(key=lambda one: (math.isfinite(one["loss"]), -one["loss"]))
            report = {**spike.to_dict(), "documents": documents}
            # JSON has no NaN and no infinity.
            finite = json.loads(json.dumps(report), parse_constant=lambda _: None)
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_text(file, json.dumps(finite, ensure_ascii=False, indent=1) + "\n")
            except OSError as error:
                return f"its documents could not be written to {file} ({error.strerror})"
        return f"its documents are in {file}"

    def rewind(self) -> None:
        """Report the next spike, whatever its step."""
        self._last_step = -1


@torch.no_grad()
def document_losses(
    model: nn.Module, loader: Loader, tokenizer: Tokenizer, epoch: int, sequence: int
) -> list[dict[str, Any]]:
    """Return the loss of each piece of a document in this rank's sequences of a step.

    Returns:
        For each piece that has targets: `document` (index in the training split), `row` (index of the
        sequence in the epoch), `start` (the piece's first token within the document), `tokens` (targets),
        `loss` (nats per token, with the current weights and without dropout) and `text`, cut to 2,000
        characters.
    """
    found: list[dict[str, Any]] = []
    batch = loader.step(epoch, sequence)
    sequences = [(part, i) for part in batch.micro_batches for i in range(len(part.input_ids))]
    was_training = model.training
    model.eval()
    try:
        # One sequence at a time, so that the logits fit into memory; and not compiled for that shape.
        with torch.compiler.set_stance("force_eager"):
            for (number, pieces), (part, i) in zip(loader.pieces(epoch, sequence), sequences, strict=True):
                inputs = part.input_ids, part.document_ids, part.position_ids
                one, ids, positions = (None if t is None else t[i : i + 1] for t in inputs)
                logits = model(input_ids=one, document_ids=ids, position_ids=positions).logits
                labels = part.shift_labels[i]
                # (T, V) against (T,) to (T,)
                losses = F.cross_entropy(logits[0].float(), labels, ignore_index=IGNORED, reduction="none")
                of_piece = torch.zeros_like(labels) if ids is None else ids[0]
                table = torch.stack((losses.double(), labels, of_piece)).cpu()
                for k, piece in enumerate(pieces):
                    real = (table[1] != IGNORED) & (table[2] == k)
                    if real.any():
                        found.append(
                            {
                                "document": piece.document,
                                "row": number,
                                "start": piece.start,
                                "tokens": int(real.sum()),
                                "loss": table[0, real].mean().item(),
                                "text": tokenizer.decode(loader.tokens(piece))[:MAX_TEXT_CHARACTERS],
                            }
                        )
    finally:
        model.train(was_training)
    return found
