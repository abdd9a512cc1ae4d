"""Where the fused kernels are used: for training in bf16 on a CUDA GPU.

`fused_ops.py` has the functions themselves, under the names that are found here too. Each has a plain twin in
`attention.py`, `feed_forward.py` or `loss.py` and gives the same numbers up to the rounding of bf16.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

# A build of PyTorch for CPUs does without what takes a second to load.
_BUILDABLE = torch.backends.cuda.is_built() and find_spec("triton") is not None
# The heads that the attention kernels are built for; wider ones need more memory than a multiprocessor has.
_HEAD_DIMS = range(16, 129)

if TYPE_CHECKING or _BUILDABLE:
    from .autograd import add_norm, attend, cross_entropy_, swiglu, swiglu_down

    __all__ = ["add_norm", "attend", "cross_entropy_", "swiglu", "swiglu_down"]


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype that products of `x` with `weight` are computed in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def wanted(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of `x` with `weight` is computed in bf16 by a GPU that the kernels can be built for.

    Not in fp16: the kernels divide by small weights of norms, for which it has no range.
    """
    return _served(x.device, compute_dtype(x, weight))


def _served(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype == torch.bfloat16 and _BUILDABLE


def unsupported_reason(precision: str, head_dim: int, dropout: float) -> str | None:
    """Return why a run on a CUDA GPU computes attention by plain PyTorch, None where it uses the kernels.

    Args:
        precision: of its matrix products: `no`, `bf16` or `fp16`.
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


def attention_wanted(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `attend` serves heads of this width where products are computed in `dtype`."""
    return _served(device, dtype) and head_dim in _HEAD_DIMS
