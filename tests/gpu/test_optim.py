"""Optimizers on a CUDA GPU: no synchronization with the host, and Muon's kernels."""

from __future__ import annotations

import math

import pytest
import torch
from optim import test_build, test_muon
from torch import nn

from minimind.optim.build import build_optimizer, skip_if_nonfinite
from support import muon_cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_skipping_does_not_synchronize():
    model = nn.Linear(8, 8, device="cuda")
    optimizer = build_optimizer(model, test_build.CONFIG, "cuda")
    for value in (1.0, math.nan):
        model.weight.grad = torch.full_like(model.weight, value)
        model.bias.grad = torch.full_like(model.bias, value)
        norm = nn.utils.get_total_norm([model.weight.grad, model.bias.grad])
        before = test_build.snapshot(model, optimizer)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            skip_if_nonfinite(optimizer, norm)
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(before, test_build.snapshot(model, optimizer), strict=True))


def test_steps_do_not_synchronize_and_a_skipped_update_changes_nothing() -> None:
    model = test_muon.tiny().cuda()
    optimizer = build_optimizer(model, test_muon.CONFIG, "cuda", kernels=True)

    def gradients(value: float) -> torch.Tensor:
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        return nn.utils.get_total_norm([p.grad for p in model.parameters()])

    for value in (1.0, math.nan):
        norm = gradients(value)
        skip_if_nonfinite(optimizer, norm)
        before = test_muon.snapshot(model, optimizer)
        optimizer.step()  # compiles, which may wait
        gradients(value)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(before, test_muon.snapshot(model, optimizer), strict=True))


def test_kernels_on_a_gpu_agree_with_plain_pytorch() -> None:
    test_muon.check_kernels(muon_cases.all_cases("cuda"))
