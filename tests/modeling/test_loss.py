"""The fused output layer and cross-entropy against float64 autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.modeling import loss as loss_module
from minimind.modeling.loss import linear_cross_entropy


def case(tokens: int, width: int = 12, vocab: int = 20, *, seed: int = 0, ignored: float = 0.3):
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=rng).requires_grad_()
    weight = (torch.randn(vocab, width, generator=rng) * 0.5).requires_grad_()
    targets = torch.randint(vocab, (tokens,), generator=rng)
    targets[torch.rand(tokens, generator=rng) < ignored] = -100
    return hidden, weight, targets


def reference(hidden, weight, targets, scale: float = 1.0):
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss * scale, (hidden, weight))


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(loss_module, "_LOGITS_ELSEWHERE", 100)  # pieces of 4 tokens at a vocabulary of 20


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 30), st.floats(0, 1), st.integers(0, 99), st.floats(-8, 8))
def test_loss_and_gradients_are_those_of_float64(tokens, vocab, ignored, seed, scale):
    hidden, weight, targets = case(tokens, vocab=vocab, seed=seed, ignored=ignored)
    expected = reference(hidden, weight, targets, scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "_LOGITS_ELSEWHERE", 64)
        loss = linear_cross_entropy(hidden, weight, targets)
        grads = torch.autograd.grad(loss * scale, (hidden, weight))
        with torch.no_grad():
            torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets), loss)
    assert loss.dtype == torch.float32
    for ours, exact in zip((loss, *grads), expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=2e-5, rtol=2e-5)


def test_gradients_equal_finite_differences(small_pieces):
    # Along a direction: d loss = <gradient, direction>, checked on the loss itself and not on autograd.
    hidden, weight, targets = case(10)
    grads = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), (hidden, weight))
    for index, grad in enumerate(grads):
        step = 1e-2 * grad / grad.norm()
        ends = []
        for sign in (1, -1):
            moved = [hidden.detach(), weight.detach()]
            moved[index] = moved[index] + sign * step
            ends.append(linear_cross_entropy(*moved, targets).item())
        assert (ends[0] - ends[1]) / 2 == pytest.approx((grad * step).sum().item(), rel=2e-2)


def test_without_targets_loss_and_gradient_are_zero():
    hidden, weight, targets = case(5, ignored=1.1)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_large_logits_stay_finite():
    hidden, weight, targets = case(6)
    loss = linear_cross_entropy(hidden * 1e4, weight, targets)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, (hidden, weight)))
    torch.testing.assert_close(loss.double(), reference(hidden * 1e4, weight, targets)[0])


def test_the_products_run_in_the_autocast_dtype_and_the_gradients_come_back_in_float32(small_pieces):
    hidden, weight, targets = case(64, width=32, vocab=20)
    exact = reference(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
        plain = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")
    ours = torch.autograd.grad(loss, (hidden, weight))
    plains = torch.autograd.grad(plain, (hidden, weight))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain)
    for grad, plain_grad, exact_grad in zip(ours, plains, exact[1:], strict=True):
        assert grad.dtype == torch.float32
        # As far from the truth as plain autograd in bf16 is, and not further.
        error = (grad - exact_grad).norm() / exact_grad.norm()
        assert 0 < error < 1.2 * (plain_grad - exact_grad).norm() / exact_grad.norm() < 0.02


def test_the_gradient_of_the_output_matrix_does_not_overflow_in_fp16() -> None:
    # As with a small vocabulary, of which one token is frequent: a sum of 2^16 hidden states of 2.
    tokens = 1 << 16
    rng = torch.Generator().manual_seed(0)
    hidden = (torch.full((tokens, 4), 2.0) + 0.1 * torch.randn(tokens, 4, generator=rng)).requires_grad_()
    weight = torch.randn(8, 4, generator=rng).requires_grad_()
    targets = torch.zeros(tokens, dtype=torch.int64)
    exact = reference(hidden, weight, targets)
    assert exact[2].abs().max() > torch.finfo(torch.float16).max
    with torch.autocast("cpu", dtype=torch.float16):
        loss = linear_cross_entropy(hidden, weight, targets)
    for ours, expected in zip(torch.autograd.grad(loss, (hidden, weight)), exact[1:], strict=True):
        assert (ours - expected).norm() < 2e-3 * expected.norm()


def test_a_half_precision_model_scales_its_gradient_in_float32():
    hidden, weight, targets = case(16, ignored=0)
    hidden, weight = (x.detach().bfloat16().requires_grad_() for x in (hidden, weight))
    scale = 1.001  # not a bf16 number: rounding it to one would lose it
    once = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), weight)[0]
    scaled = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets) * scale, weight)[0]
    assert scaled.dtype == torch.bfloat16
    torch.testing.assert_close(scaled, (once.float() * scale).bfloat16(), atol=0, rtol=0)


def test_chunks_do_not_change_the_loss(monkeypatch):
    hidden, weight, targets = case(37)
    whole = linear_cross_entropy(hidden, weight, targets)
    for logits in (1, 20, 100, 740):
        monkeypatch.setattr(loss_module, "_LOGITS_ELSEWHERE", logits)
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets), whole)


def test_it_compiles_into_one_graph():
    hidden, weight, targets = case(12)
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True, dynamic=False)
    loss = compiled(hidden, weight, targets)
    expected = reference(hidden, weight, targets)
    torch.testing.assert_close(loss.double(), expected[0])
    for ours, exact in zip(torch.autograd.grad(loss, (hidden, weight)), expected[1:], strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=1e-5)
