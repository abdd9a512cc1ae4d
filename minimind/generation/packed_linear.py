"""Products with fixed weights, laid out for a few rows at a time.

To write one token every weight is read once and used once, so what counts is how many bytes that is.

Shapes: N outputs, C inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# Largest finite float16.
_LARGEST_HALF = 65504.0


def pack(linears: Sequence[nn.Linear]) -> Callable[[Tensor], Tensor]:
    """Return the function from (..., C) to the outputs of some layers without bias, one after the other.

    On the CPU, for float32 weights, they are copied into one matrix. Its numbers are kept in float16 where
    that holds every one of them exactly, perhaps after a multiplication by a power of two, as it does for the
    weights of a folder that was saved in half precision. They are made float32 again in registers, all
    arithmetic is float32, and half as many bytes are read. Anything else is left where it is.
    """
    first = linears[0].weight
    if first.device.type != "cpu" or first.dtype != torch.float32:
        return concat_weights(linears)
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


def concat_weights(linears: Sequence[nn.Linear]) -> Callable[[Tensor], Tensor]:
    """Return the same function as `pack`, of the layers as they are; compiled code needs no packing."""
    return linears[0] if len(linears) == 1 else lambda x: torch.cat([f(x) for f in linears], dim=-1)


def exact_half_scale(weight: Tensor) -> float | None:
    """Return a power of two by which the weights become float16 numbers without any rounding, else None.

    float16 has three bits more than bfloat16 but far fewer exponents: as large a factor as fits brings small
    weights into its range. 1 is preferred.
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
    """Whether FBGEMM is there, which multiplies float32 rows by float16 matrices; x86 only."""
    quantized = torch.backends.quantized
    return "fbgemm" in quantized.supported_engines and quantized.engine in ("fbgemm", "x86")
