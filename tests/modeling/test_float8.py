"""FP8 products against float64 and bf16, and the switch of a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minimind import MiniMindConfig, MiniMindForCausalLM
from minimind.modeling import float8
from minimind.modeling.kernels import dispatch as fused

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def product(x: Tensor, weight: Tensor, grad: Tensor, linear: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result, and the gradients of both operands."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear(x, weight)
    out.backward(grad)
    assert x.grad is not None
    assert weight.grad is not None
    return out.detach(), x.grad, weight.grad


def operands(*leading: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, weight, grad = torch.randn(*leading, 64), torch.randn(48, 64) / 8, torch.randn(*leading, 48) * 1e-6
    return x.bfloat16(), weight.bfloat16(), grad.bfloat16()


@pytest.mark.parametrize(("dtype", "bits", "smallest"), [(E4M3, 3, 2.0**-9), (E5M2, 2, 2.0**-16)])
def test_values_are_rounded_to_the_nearest_after_scaling_by_the_largest(
    dtype: torch.dtype, bits: int, smallest: float
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(1000) * 1e-3).bfloat16()
    rounded, scale = float8._quantize(x, dtype)
    assert rounded.double().abs().max() == torch.finfo(dtype).max
    error = (rounded.double() * scale.double() - x.double()).abs()
    # Half the distance of two neighbours.
    bound = torch.maximum(x.double().abs() * 2.0 ** -(bits + 1), smallest * scale.double() / 2)
    assert (error <= 1.0001 * bound).all()


@pytest.mark.parametrize("leading", [(32,), (2, 16), (3, 7)], ids=str)
def test_the_three_products_are_those_of_the_rounded_operands(leading: tuple[int, ...]) -> None:
    x, weight, grad = operands(*leading)
    x8, weight8, grad8 = (
        rounded.double() * scale.double()
        for rounded, scale in (
            float8._quantize(tensor.flatten(0, -2), dtype)
            for tensor, dtype in ((x, E4M3), (weight, E4M3), (grad, E5M2))
        )
    )
    wanted = x8 @ weight8.T, grad8 @ weight8, grad8.T @ x8
    for found, exact in zip(product(x, weight, grad, float8.linear), wanted, strict=True):
        assert found.dtype == torch.bfloat16
        # bf16 has 8 bits.
        bound = exact.abs() / 256 + exact.abs().max() * 1e-5
        assert ((found.double() - exact.reshape(found.shape)).abs() <= bound.reshape(found.shape)).all()


def test_a_gpu_gets_the_sizes_and_layouts_that_it_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    multiply = float8._product

    def record(a: Tensor, b: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.append((a.shape, b.shape, a.stride(), b.stride()))
        return multiply(a, b, *rest, **options)

    monkeypatch.setattr(float8, "_product", record)
    product(*operands(3, 7), float8.linear)
    # 21 tokens are padded; the first operand is stored by rows, the second by columns.
    assert seen == [
        ((32, 64), (64, 48), (64, 1), (1, 64)),
        ((32, 48), (48, 64), (48, 1), (1, 48)),
        ((48, 32), (32, 64), (32, 1), (1, 32)),
    ]


def test_the_products_are_close_to_those_in_bf16() -> None:
    case = operands(2, 64)
    ours, theirs = product(*case, float8.linear), product(*case, F.linear)
    errors = [relative(found, wanted) for found, wanted in zip(ours, theirs, strict=True)]
    assert max(errors) < 0.08
    assert min(errors) > 0.01  # in FP8


def test_zeros_stay_zeros_and_a_nan_is_not_hidden() -> None:
    x, weight, grad = operands(16)
    for tensor in product(torch.zeros_like(x), weight, torch.zeros_like(grad), float8.linear):
        assert (tensor == 0).all()
    for value in (float("nan"), float("inf")):
        x[3, 5] = value
        assert float8.linear(x, weight).isnan().all()


def test_float32_operands_get_float32_gradients() -> None:
    case = [tensor.float() for tensor in operands(16)]
    _, for_x, for_weight = product(case[0], case[1], case[2].bfloat16(), float8.linear)
    assert for_x.dtype == for_weight.dtype == torch.float32


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the path of the kernels on a CPU, with PyTorch in their place and no attention."""

    def add_norm(x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x = x.bfloat16() if added is None else x + added
        return x, F.rms_norm(x.float(), weight.shape, weight, eps).bfloat16()

    def swiglu(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    replaced = {
        "supported": lambda x, weight: True,
        "attention_supported": lambda device, dtype, head_dim: True,
        "add_norm": add_norm,
        "attend": lambda qkv, *rest, heads, eps: qkv[..., : heads * rest[0].shape[0]],
        "swiglu": swiglu,
        "swiglu_down": lambda gate_up, weight: F.linear(swiglu(gate_up), weight),
    }
    for name, function in replaced.items():
        monkeypatch.setattr(fused, name, function, raising=False)


@pytest.mark.usefixtures("kernels")
def test_a_model_multiplies_in_fp8_in_training_mode_alone() -> None:
    torch.manual_seed(0)
    config = MiniMindConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model, ids = MiniMindForCausalLM(config), torch.arange(32)[None]

    def logits() -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(ids).logits
        assert out is not None
        out.float().square().sum().backward()
        return out.detach()

    def gradients() -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    bf16, expected, names = logits(), gradients(), model.state_dict().keys()
    model.train_in_float8()
    assert model.state_dict().keys() == names
    model.eval()
    assert torch.equal(logits(), bf16)
    assert all(torch.equal(grad, expected[name]) for name, grad in gradients().items())
    model.train()
    assert 0.001 < relative(logits(), bf16) < 0.05
    found = gradients()
    assert found.keys() == expected.keys()
    for name in (name for name in found if "proj" in name):
        assert found[name].dtype == torch.float32
        # k and v are not used by the attention of this test.
        if expected[name].any():
            assert 0.01 < relative(found[name], expected[name]) < 0.15, name
    model.model.recompute = True
    logits()
    assert all(torch.equal(grad, found[name]) for name, grad in gradients().items())
