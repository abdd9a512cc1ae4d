"""Matrix products with fixed weights, for small batches.

Decoding a token reads every weight once, so its speed is bound by the bytes of the weights.

Shapes: N outputs, C inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Largest finite float16.
_LARGEST_HALF = 65504.0


def pack_weights(linears: Sequence[nn.Linear]) -> Callable[[Tensor], Tensor]:
    """Return a function from (..., C) to the concatenated outputs of layers without bias.

    On the CPU, float32 weights are copied into one matrix. It is stored in float16 where that is exact,
    possibly after scaling by a power of two, as for a model saved in half precision. The kernel converts to
    float32 in registers, so all arithmetic is float32 and half as many bytes are read.
    """
    first = linears[0].weight
    if first.device.type != "cpu" or first.dtype != torch.float32:
        return linears[0] if len(linears) == 1 else lambda x: torch.cat([f(x) for f in linears], dim=-1)
    weight = torch.cat([linear.weight.detach() for linear in linears])
    scale = exact_half_scale(weight) if _has_half_kernel() else None
    if scale is None:
        # MKL streams a matrix with its inputs outermost faster than one with its outputs outermost.
        transposed = weight.t().contiguous()
        return lambda x: x @ transposed
    packed = torch.ops.quantized.linear_prepack_fp16(weight * scale, None)
    multiply = torch.ops.quantized.linear_dynamic_fp16.default
    if scale == 1:
        return lambda x: multiply(x, packed)
    return lambda x: multiply(x, packed).mul_(1 / scale)


class ConcatLinear:
    """The function of `pack_weights` as one product, for captured and compiled code.

    Attributes:
        weight: (N, C), a copy where there are several layers.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        weights = [linear.weight.detach() for linear in linears]
        self.weight = weights[0] if len(weights) == 1 else torch.cat(weights)

    def __call__(self, x: Tensor) -> Tensor:
        """Return (..., N) for (..., C)."""
        return F.linear(x, self.weight)


def exact_half_scale(weight: Tensor) -> float | None:
    """Return a power of two that makes the weights exact in float16, else None; 1 is preferred.

    float16 has three bits more than bfloat16 but far fewer exponents: the largest possible factor brings
    small weights into its range.
    """
    largest = float(weight.abs().max())
    if not 0 < largest < math.inf:
        return None
    for scale in (1.0, 2.0 ** math.floor(math.log2(_LARGEST_HALF / largest))):
        scaled = weight * scale
        if torch.equal(scaled.half().float(), scaled):
            return scale
    return None


def _has_half_kernel() -> bool:
    """Whether FBGEMM is available, which multiplies float32 by float16 matrices; x86 only."""
    quantized = torch.backends.quantized
    return "fbgemm" in quantized.supported_engines and quantized.engine in ("fbgemm", "x86")
