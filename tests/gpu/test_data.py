"""Micro-batches on a CUDA GPU equal those on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from data import test_loader

from support.made_text import write_shards

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_cuda_steps_equal_those_of_the_cpu(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(2, 60, 200).tolist()
    shards = write_shards(tmp_path, lengths)
    for ours, theirs in zip(
        test_loader.loader_for(shards, device="cuda").steps(0),
        test_loader.loader_for(shards).steps(0),
        strict=True,
    ):
        for a, b in zip(ours.micro_batches, theirs.micro_batches, strict=True):
            torch.testing.assert_close(a.input_ids.cpu(), b.input_ids)
            torch.testing.assert_close(a.shift_labels.cpu(), b.shift_labels)
            torch.testing.assert_close(a.document_ids.cpu(), b.document_ids)
            torch.testing.assert_close(a.position_ids.cpu(), b.position_ids)
