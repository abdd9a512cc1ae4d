"""Matrix products in FP8 for training, with one dynamic scale per tensor.

Activations and weights are rounded to e4m3 (4 exponent, 3 mantissa bits), gradients to e5m2, whose range is
larger (Micikevicius et al. 2022, arXiv 2209.05433). Before, a tensor is scaled by the factor that maps its
largest magnitude to the largest number of the format. Results are bf16.

Compile the callers: Inductor fuses the scaling with the kernels before a product, and eager mode adds several
kernels for each operand.

Shapes: N tokens, C input, F output.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# C, F and the padded N are multiples of it, as `torch._scaled_mm` requires.
ALIGNMENT = 16
# Of activations and weights, and of gradients.
_FORWARD, _BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
# Of the magnitudes that a scale is computed from: a tensor of zeros needs a finite one.
_SMALLEST = 1e-12


def available() -> bool:
    """Whether the current GPU multiplies FP8: NVIDIA's of compute capability 8.9 or more."""
    nvidia = torch.cuda.is_available() and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability() >= (8, 9)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T, (..., F) bf16, with the three products of forward and backward pass in FP8.

    Both gradients are bf16, as those of a bf16 product are, and have the dtype of their input. A NaN or
    infinity makes the whole result NaN.

    Args:
        x: (..., C), C a multiple of `ALIGNMENT`.
        weight: (F, C), F a multiple of `ALIGNMENT`.
    """
    flat = x.flatten(0, -2).to(torch.bfloat16)
    # The gradient of the weight is a sum over N, to which zeros add nothing.
    padding = -flat.shape[0] % ALIGNMENT
    if padding:
        flat = F.pad(flat, (0, 0, 0, padding))
    out: Tensor = _Linear.apply(flat, weight.to(torch.bfloat16))
    if padding:
        out = out[:-padding]
    return out.unflatten(0, x.shape[:-1])


def _quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return scaled `x` in `dtype`, and the float32 scalar that the result is multiplied by."""
    largest = torch.finfo(dtype).max
    scale = largest / x.abs().amax().float().clamp(min=_SMALLEST)
    # The product may exceed the range by rounding alone, and then rounds back to the largest number.
    return (x.float() * scale).to(dtype), scale.reciprocal()


def _product(a: Tensor, b: Tensor, scales: tuple[Tensor, Tensor], *, fast: bool = True) -> Tensor:
    """Return a @ b in bf16 of (M, K) by rows and (K, N) by columns; `fast` sums with fewer bits on Hopper."""
    return torch._scaled_mm(
        a, b, *scales, out_dtype=torch.bfloat16, use_fast_accum=fast and a.device.type == "cuda"
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x8, x_scale = _quantize(x, _FORWARD)
        weight8, weight_scale = _quantize(weight, _FORWARD)
        ctx.save_for_backward(x8, x_scale, weight8, weight_scale)
        return _product(x8, weight8.t(), (x_scale, weight_scale))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x8, x_scale, weight8, weight_scale = ctx.saved_tensors
        grad8, grad_scale = _quantize(grad, _BACKWARD)
        # `torch._scaled_mm` takes one layout only, so operands are transposed by copies.
        for_x = _product(grad8, weight8.t().contiguous().t(), (grad_scale, weight_scale))
        # N is the longest sum, so it is accumulated in full float32.
        for_weight = _product(
            grad8.t().contiguous(), x8.t().contiguous().t(), (grad_scale, x_scale), fast=False
        )
        return for_x, for_weight
