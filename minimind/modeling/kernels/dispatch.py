"""Decide where the fused kernels are used: for training in bf16 on CUDA GPUs.

Re-exports the functions of `autograd.py`. Each has a plain PyTorch equivalent in `attention.py`,
`feed_forward.py` or `loss.py`, with the same results up to bf16 rounding.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

# With a CPU build of PyTorch Triton, which takes a second to import, is not loaded.
_BUILDABLE = torch.backends.cuda.is_built() and find_spec("triton") is not None
# Head dimensions of the attention kernels; larger ones need more shared memory than a multiprocessor has.
_HEAD_DIMS = range(16, 129)

if TYPE_CHECKING or _BUILDABLE:
    from .autograd import add_norm, attend, cross_entropy_, swiglu, swiglu_down

    __all__ = ["add_norm", "attend", "cross_entropy_", "swiglu", "swiglu_down"]


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of a product of `x` and `weight`, with regard to autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def supported(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels support a product of `x` and `weight`: in bf16 on a CUDA GPU.

    fp16 is not supported: the kernels divide by small norm weights, which exceeds its range.
    """
    return _device_supported(x.device, compute_dtype(x, weight))


def _device_supported(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype == torch.bfloat16 and _BUILDABLE


def unsupported_reason(precision: str, head_dim: int, dropout: float) -> str | None:
    """Return why a run on a CUDA GPU does not use the attention kernels, None if it does.

    Args:
        precision: `no`, `bf16` or `fp16`.
        head_dim: D.
        dropout: probability.
    """
    if not _BUILDABLE:
        return "the package triton is missing"
    if precision != "bf16":
        return "they need bf16"
    if head_dim not in _HEAD_DIMS:
        return f"they need heads of {_HEAD_DIMS[0]} to {_HEAD_DIMS[-1]}"
    return "they have no dropout" if dropout else None


def attention_supported(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `attend` supports this head dimension, with products in `dtype`."""
    return _device_supported(device, dtype) and head_dim in _HEAD_DIMS
