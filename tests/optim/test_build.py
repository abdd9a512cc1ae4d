"""AdamW as the training loop uses it."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from minimind.config.options import PretrainConfig
from minimind.optim.build import build_optimizer, set_schedule, skip_if_nonfinite

CONFIG = PretrainConfig(optimizer="adamw", learning_rate=1e-2, weight_decay=0.3, beta1=0.8, beta2=0.9)


class Small(nn.Module):
    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(7, 4)
        self.proj = nn.Linear(4, 4)
        self.norm = nn.RMSNorm(4)
        self.lm_head = nn.Linear(4, 7, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.norm(self.proj(self.embed_tokens(ids))))


def small(*, tied: bool = True) -> Small:
    torch.manual_seed(0)
    return Small(tied=tied)


def backward(model: nn.Module) -> torch.Tensor:
    """Put a gradient on the parameters and return its norm."""
    model(torch.tensor([[1, 2, 3], [4, 5, 6]])).square().sum().backward()
    return nn.utils.get_total_norm([p.grad for p in model.parameters()])


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Copy the weights and all that the optimizer keeps, its step counts included."""
    kept = [p.detach().clone() for p in model.parameters()]
    for state in optimizer.state.values():
        kept += [state[key].clone() for key in ("step", "exp_avg", "exp_avg_sq")]
    return kept


def group_names(optimizer: torch.optim.Optimizer) -> dict[float, list[str]]:
    return {group["weight_decay"]: group["param_names"] for group in optimizer.param_groups}


def test_decay_acts_on_matrices_only_and_tied_weights_count_once():
    optimizer = build_optimizer(small(), CONFIG, "cpu")
    assert group_names(optimizer) == {
        0.3: ["proj.weight"],
        0.0: ["embed_tokens.weight", "proj.bias", "norm.weight"],
    }


def test_separate_output_matrix_decays():
    optimizer = build_optimizer(small(tied=False), CONFIG, "cpu")
    assert group_names(optimizer)[0.3] == ["proj.weight", "lm_head.weight"]


def test_frozen_parameters_are_excluded():
    model = small()
    model.proj.requires_grad_(False)
    optimizer = build_optimizer(model, CONFIG, "cpu")
    assert group_names(optimizer) == {0.0: ["embed_tokens.weight", "norm.weight"]}


@pytest.mark.parametrize(("device", "fused"), [("cuda:0", True), ("cpu", True), ("mps", False)])
def test_fused_kernel_where_it_exists(device, fused):
    optimizer = build_optimizer(small(), CONFIG, device)
    assert all(bool(group["fused"]) is fused for group in optimizer.param_groups)


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_updates_equal_adamw_written_out_in_float64(device):
    """Against the update of Loshchilov and Hutter (arXiv:1711.05101), algorithm 2, on every parameter."""
    model = small().double()
    # The optimizer for MPS is the kernel without fusion; it runs on the CPU as well.
    optimizer = build_optimizer(model, CONFIG, device)
    set_schedule(optimizer, 3e-3)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in expected.items()}
    for step in range(1, 6):
        norm = backward(model)
        for name, p in model.named_parameters():
            m, v = moments[name]
            m.mul_(0.8).add_(0.2 * p.grad)
            v.mul_(0.9).add_(0.1 * p.grad**2)
            decay = 0.3 if name == "proj.weight" else 0.0
            expected[name] *= 1 - 3e-3 * decay
            expected[name] -= 3e-3 * (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-8)
        skip_if_nonfinite(optimizer, norm)
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("device", ["cpu", "mps"])
@pytest.mark.parametrize("prepared", [False, True])
def test_nonfinite_gradient_changes_neither_weights_nor_optimizer_state(bad, device, prepared):
    model = small()
    optimizer = build_optimizer(model, CONFIG, device)
    if prepared:
        optimizer = Accelerator(cpu=True).prepare(optimizer)
    skip_if_nonfinite(optimizer, backward(model))
    optimizer.step()
    optimizer.zero_grad()
    before = snapshot(model, optimizer)

    backward(model)
    model.proj.weight.grad[0, 0] = bad
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    skip_if_nonfinite(optimizer, norm)
    optimizer.step()
    optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(model, optimizer), strict=True))

    skip_if_nonfinite(optimizer, backward(model))
    optimizer.step()
    after = snapshot(model, optimizer)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.isfinite(value).all() for value in after)


def test_first_update_may_be_the_one_skipped():
    model = small()
    optimizer = build_optimizer(model, CONFIG, "cpu")
    weights = [p.detach().clone() for p in model.parameters()]
    backward(model)
    skip_if_nonfinite(optimizer, torch.tensor(math.nan))
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert all(state["step"] == 0 for state in optimizer.state.values())


def test_fp16_scaler_skips_by_itself():
    class Scaled:
        scaler = object()

        def __getattr__(self, name: str):
            raise AssertionError(f"touched {name}")

    skip_if_nonfinite(Scaled(), torch.tensor(math.nan))


def test_learning_rate_reaches_prepared_groups_and_respects_their_scale():
    optimizer = build_optimizer(small(), CONFIG, "cpu")
    optimizer.param_groups[1]["lr_scale"] = 0.5
    prepared = Accelerator(cpu=True).prepare(optimizer)
    set_schedule(prepared, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1]
