"""The sums of an evaluation: exact over many batches, and of real targets only."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from minimind.data.loader import MicroBatch
from minimind.evaluation.validation import evaluate


class Losses(nn.Module):
    """A model whose batches have the summed losses given, in the dtype given."""

    def __init__(self, *losses: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self._losses, self._dtype = iter(losses), dtype

    def forward(self, **_: object) -> SimpleNamespace:
        assert not self.training
        return SimpleNamespace(loss=torch.tensor(next(self._losses), dtype=self._dtype))


def batch(*labels: int) -> MicroBatch:
    return MicroBatch(torch.zeros(1, len(labels), dtype=torch.int64), torch.tensor([labels]), None, None)


def test_batches_are_added_beyond_the_precision_of_float32() -> None:
    losses = [2.0**24, 1.0, 1.0, 1.0]
    result = evaluate(Losses(*losses), [batch(1)] * 4, torch.ones(3), Accelerator(cpu=True))
    assert result.loss == (2**24 + 3) / 4
    assert result.tokens == 4


def test_a_loss_in_half_precision_is_added_in_full() -> None:
    losses = [256.0, 1.0, 1.0, 1.0]
    model = Losses(*losses, dtype=torch.bfloat16)
    assert evaluate(model, [batch(1)] * 4, torch.ones(3), Accelerator(cpu=True)).loss == 259 / 4


def test_real_targets_are_counted_with_the_bytes_they_stand_for() -> None:
    model = Losses(6.0, 2.0).train()
    sizes = torch.tensor([4.0, 1.0, 2.0])
    result = evaluate(model, [batch(0, -100, 2), batch(-100, 0, 1)], sizes, Accelerator(cpu=True))
    assert (result.loss, result.tokens) == (2.0, 4)
    assert result.bits_per_byte == pytest.approx(8 / math.log(2) / (4 + 2 + 4 + 1))
    assert model.training
