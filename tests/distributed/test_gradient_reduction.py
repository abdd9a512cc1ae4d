"""Gradients are summed bucket by bucket while the backward pass runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from minimind.distributed import gradient_reduction
from minimind.distributed.gradient_reduction import GradientReduction

RANKS = 3


class Group:
    """Stands for ranks that have the same gradients; a sum is there once it was waited for."""

    def __init__(self) -> None:
        self.calls: list[list[torch.Size]] = []
        self.unfinished = 0
        self.dtypes: set[torch.dtype] = set()

    def allreduce_coalesced(self, tensors: list[torch.Tensor]) -> Group:
        self.calls.append([tensor.shape for tensor in tensors])
        self.unfinished += 1
        self.dtypes |= {tensor.dtype for tensor in tensors}
        for tensor in tensors:
            tensor.mul_(RANKS)
        return self

    def wait(self) -> None:
        self.unfinished -= 1


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> nn.Sequential:
    monkeypatch.setattr(gradient_reduction, "BUCKET_BYTES", 4 * 7)
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def gradients(model: nn.Module) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def test_each_gradient_is_summed_once_and_the_first_ones_before_the_backward_pass_ends(
    model: nn.Sequential,
) -> None:
    inputs = torch.randn(5, 2)
    model(inputs).sum().backward()
    wanted = gradients(model)
    group = Group()
    begun_at_the_first_layer = []
    reduction = GradientReduction(list(model.parameters()), group)  # type: ignore[arg-type]
    model[0].weight.register_hook(lambda gradient: begun_at_the_first_layer.append(len(group.calls)))
    for _ in range(2):
        group.calls.clear()
        with reduction:
            model(inputs).sum().backward()
        assert group.unfinished == 0
        assert sorted(shape for call in group.calls for shape in call) == sorted(
            p.shape for p in model.parameters()
        )
        for ours, expected in zip(gradients(model), wanted, strict=True):
            torch.testing.assert_close(ours, RANKS * expected)
    assert begun_at_the_first_layer[0] >= 1
    # Outside of the context nothing is summed.
    model(inputs).sum().backward()
    for ours, expected in zip(gradients(model), wanted, strict=True):
        torch.testing.assert_close(ours, expected)


def test_the_bucket_of_a_parameter_without_a_gradient_is_summed_too(model: nn.Sequential) -> None:
    unused = nn.Parameter(torch.ones(1))
    group = Group()
    with GradientReduction([*model.parameters(), unused], group):  # type: ignore[arg-type]
        model(torch.randn(5, 2)).sum().backward()
    assert unused.grad is None
    assert sorted(shape for call in group.calls for shape in call) == sorted(
        p.shape for p in model.parameters()
    )


def test_accumulated_gradients_are_summed_at_once(model: nn.Sequential) -> None:
    inputs = torch.randn(5, 2)
    for _ in range(2):
        model(inputs).sum().backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    group = Group()
    GradientReduction(list(model.parameters()), group).reduce()  # type: ignore[arg-type]
    assert group.unfinished == 0
    for ours, expected in zip(gradients(model), before, strict=True):
        torch.testing.assert_close(ours, RANKS * expected)


def test_gradients_may_be_summed_in_bf16(model: nn.Sequential) -> None:
    inputs = torch.randn(5, 2)
    model(inputs).sum().backward()
    exact = gradients(model)
    group = Group()
    with GradientReduction(list(model.parameters()), group, torch.bfloat16):  # type: ignore[arg-type]
        model(inputs).sum().backward()
    assert group.dtypes == {torch.bfloat16}
    for ours, expected in zip(gradients(model), exact, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, (expected.bfloat16() * RANKS).float(), rtol=0, atol=0)


def test_an_error_of_the_backward_pass_leaves_no_hook(model: nn.Sequential) -> None:
    group = Group()
    reduction = GradientReduction(list(model.parameters()), group)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="scalar"), reduction:
        model(torch.randn(5, 2)).backward()
    model(torch.randn(5, 2)).sum().backward()
    assert group.calls == []
