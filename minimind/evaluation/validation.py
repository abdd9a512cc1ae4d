"""Validation loss, exact over all processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from ..data.loader import MicroBatch
from ..distributed.collectives import any_process, sum_over_processes

# Batches between stop checks: with several processes each check is a collective operation.
STOP_CHECK_INTERVAL = 8


@dataclass(frozen=True)
class Evaluation:
    """Loss over a set of target tokens.

    Attributes:
        loss: mean cross-entropy in nats per target token, NaN without targets.
        bits_per_byte: cross-entropy in bits per byte of text, comparable between tokenizers; NaN where all
            targets are end tokens, which have no bytes.
        tokens: number of target tokens, over all processes.
    """

    loss: float
    bits_per_byte: float
    tokens: int

    @classmethod
    def of_sums(cls, nats: float, num_tokens: float, num_bytes: float) -> Evaluation:
        """Return the means from sums over targets: cross-entropy, number of targets, and their bytes."""
        return cls(
            loss=nats / num_tokens if num_tokens else math.nan,
            bits_per_byte=nats / math.log(2) / num_bytes if num_bytes else math.nan,
            tokens=round(num_tokens),
        )

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite on overflow."""
        return math.inf if self.loss >= 700 else math.exp(self.loss)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[MicroBatch],
    bytes_per_token: torch.Tensor,
    accelerator: Accelerator,
    *,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Evaluate `model` on `batches`; every rank must pass the same number of batches.

    Args:
        model: the prepared model; its training mode is restored.
        bytes_per_token: (V,) bytes of each token id, on the model's device.

    Returns:
        The result, or None when any rank requested to stop.
    """
    was_training = model.training
    model.eval()
    sums: list[torch.Tensor] = []
    try:
        for number, batch in enumerate(batches):
            if number % STOP_CHECK_INTERVAL == 0 and any_process(asked_to_stop(), accelerator):
                return None
            loss_sum = model(
                input_ids=batch.input_ids,
                shift_labels=batch.shift_labels,
                document_ids=batch.document_ids,
                position_ids=batch.position_ids,
                num_items_in_batch=1,
            ).loss
            real = batch.shift_labels >= 0
            text_bytes = torch.where(real, bytes_per_token[batch.shift_labels.clamp(min=0)], 0).sum()
            sums.append(torch.stack((loss_sum.float(), real.sum().float(), text_bytes.float())))
    finally:
        model.train(was_training)
    # Sum in float64: float32 counts are inexact beyond 2^24.
    local = torch.stack(sums).cpu().double().sum(0) if sums else torch.zeros(3, dtype=torch.float64)
    nats, num_tokens, num_bytes = sum_over_processes(local, accelerator)
    return Evaluation.of_sums(nats, num_tokens, num_bytes)
