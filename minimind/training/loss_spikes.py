"""A loss that jumps or is not finite: from where on it counts as a jump, and whose text it was.

B rows of a micro-batch, T inputs in a row, V entries of the vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
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
from .async_metrics import DELAY_STEPS

# Losses that are looked back on, and how many of them must be known before one can be said to jump.
WINDOW = 128
MIN_STEPS = 100
# Nats per token. A deviation is never taken for less: a loss that has all but come to rest may still stir.
LEAST_DEVIATION = 0.01
# So much of the median absolute deviation is the standard deviation of normal noise.
_MAD_TO_SIGMA = 1.4826

# Reports of one process's life; beyond them only the line on the screen.
MAX_REPORTS = 100
# A run that must go back more often has another trouble than a few bad rows.
MAX_REWINDS = 5
MAX_TEXT_CHARACTERS = 2000


@dataclass(frozen=True)
class Spike:
    """A step whose loss jumped, or whose loss or gradient is not finite.

    Attributes:
        step: its number, from 1.
        loss: nats per token, over all processes.
        limit: what it would not have been above.
        grad_norm: before clipping.
        learning_rate: in that step.
        update_skipped: weights and moments were left as they were.
        epoch: the pass.
        row: number in the pass of the step's first row.
        rows: how many it has.
        rewinds: how often the run had gone back before.
        weights_of_step: the step whose weights measure the documents. On a GPU the host learns of a loss two
            steps later, and a jump that was not skipped has been learnt from: so these losses may be lower.
    """

    step: int
    loss: float
    limit: float
    grad_norm: float
    learning_rate: float
    update_skipped: bool
    epoch: int
    row: int
    rows: int
    rewinds: int
    weights_of_step: int

    @property
    def jumped(self) -> bool:
        """Whether everything is finite, and the loss only too high."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def what(self) -> str:
        """What is wrong, as the beginning of a sentence."""
        if self.jumped:
            return f"the loss jumped to {self.loss:.4g} (limit {self.limit:.4g})"
        return f"the {'gradient' if math.isfinite(self.loss) else 'loss'} is not finite"

    @property
    def file_name(self) -> str:
        """Names the report. The same step with the same rows writes over it, as after a resumption."""
        return f"step-{self.step:08d}" + (f"-rewind-{self.rewinds}" if self.rewinds else "") + ".json"


def remember(recent: list[float], loss: float) -> None:
    """Append a step's loss (nats per token), and forget those too old to matter for any limit."""
    # Nothing above infinity, and infinity is left out of every limit: so a NaN stands too.
    recent.append(loss if math.isfinite(loss) else math.inf)
    del recent[: -(WINDOW + DELAY_STEPS)]


def spike_threshold(recent: Sequence[float], unread: int, sigma: float, share: float = 1.0) -> float:
    """Return the loss in nats per token above which the coming step jumps; infinite while too few are known.

    The limit is the median plus `sigma` robust deviations, 1.4826 times the median absolute deviation
    (Leys et al. 2013, "Detecting outliers"): a mean and standard deviation would be moved by the very jumps
    that are looked for, and by the fall of the loss at the start. What came in the last two steps is never
    looked at, because on a GPU it is not known yet: so the limit of a step is the same on any device, in any
    process, and in a resumed run.

    Args:
        recent: losses of the steps before, oldest first, as `remember` keeps them.
        unread: steps before this one whose losses are still on their way and so not in `recent`.
        sigma: deviations.
        share: rows of this step as a share of a full one; fewer rows scatter more.
    """
    known = recent[: len(recent) - (DELAY_STEPS - unread)]
    finite = [loss for loss in known[-WINDOW:] if math.isfinite(loss)]
    if len(finite) < MIN_STEPS:
        return math.inf
    centre = median(finite)
    deviation = _MAD_TO_SIGMA * median(abs(loss - centre) for loss in finite)
    return centre + sigma * max(deviation, LEAST_DEVIATION) / math.sqrt(share)


def report_spike(
    accelerator: Accelerator,
    model: nn.Module,
    loader: Loader,
    decode: Callable[[list[int]], str],
    folder: Path,
    spike: Spike,
) -> str:
    """Measure the loss of each document of a step anew and write it down, the worst first.

    Every process must call this; the main one writes.

    Args:
        accelerator: gathers what the processes found.
        model: prepared.
        loader: reads the rows again.
        decode: from tokens to text.
        folder: of all reports.
        spike: the step.

    Returns:
        Words that tell where the report is, or why it could not be written.
    """
    documents = gather_object(document_losses(model, loader, decode, spike.epoch, spike.row))
    file = folder / spike.file_name
    if accelerator.is_main_process:
        documents.sort(key=lambda one: (math.isfinite(one["loss"]), -one["loss"]))
        report = {**asdict(spike), "documents": documents}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(_finite_or_null(report), ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            return f"its texts could not be written to {file} ({error.strerror})"
    return f"its texts are in {file}"


@torch.no_grad()
def document_losses(
    model: nn.Module, loader: Loader, decode: Callable[[list[int]], str], epoch: int, row: int
) -> list[dict[str, Any]]:
    """Return the loss of each piece of a document in this process's rows of a step.

    Returns:
        For each piece that has targets: `document` (its index in the training split), `row` (in the pass),
        `start` (the piece's first token within the document), `tokens` (targets), `loss` (nats per token,
        with the weights as they are now and without dropout) and `text`, cut to 2,000 characters.
    """
    found: list[dict[str, Any]] = []
    batch = loader.step(epoch, row)
    rows = [(part, i) for part in batch.micro_batches for i in range(len(part.input_ids))]
    was_training = model.training
    model.eval()
    try:
        # Row by row, so that the logits fit beside the state of training; and not compiled for that shape.
        with torch.compiler.set_stance("force_eager"):
            for (number, pieces), (part, i) in zip(loader.pieces(epoch, row), rows, strict=True):
                own = slice(i, i + 1)
                ids, places = part.document_ids, part.position_ids
                logits = model(
                    input_ids=part.input_ids[own],
                    document_ids=None if ids is None else ids[own],
                    position_ids=None if places is None else places[own],
                ).logits
                labels = part.shift_labels[i]
                # (T, V) against (T,) to (T,)
                losses = F.cross_entropy(logits[0].float(), labels, ignore_index=IGNORED, reduction="none")
                of_piece = torch.zeros_like(labels) if ids is None else ids[i]
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
                                "text": decode(loader.tokens(piece))[:MAX_TEXT_CHARACTERS],
                            }
                        )
    finally:
        model.train(was_training)
    return found


def _finite_or_null(value: Any) -> Any:
    """Return a value that JSON has words for."""
    if isinstance(value, dict):
        return {key: _finite_or_null(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite_or_null(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
