"""Momentum and size of Muon's and NorMuon's updates for matrices of one shape, by PyTorch operations.

Shapes: n matrices of one shape, R rows, C columns; a parameter of more dimensions is a stack of matrices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .orthogonalize import MIN_NORM

# Typical root mean square of an AdamW update (Liu et al. 2025, arXiv 2502.16982, section 2.2).
_ADAMW_RMS = 0.2

# Added to the root mean square of a row, for rows that are zero.
_ROW_EPS = 1e-8


def update_scale(shape: torch.Size) -> float:
    """Return the factor of Muon's update for (..., R, C)."""
    return _ADAMW_RMS * max(shape[-2:]) ** 0.5


def row_factors(squares: Tensor, columns: int, mean_squares: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Return NorMuon's factor of each row, and the updated mean squares.

    A row is divided by its running root mean square; one factor for all rows of a matrix then restores the
    Frobenius norm, so that the learning rate keeps its meaning. For a zero matrix, one that is not updated,
    the mean squares do not change.

    Args:
        squares: (..., R) squared norms of the rows of orthogonal factors.
        columns: C.
        mean_squares: (..., R) running mean squares, at first zero: a common factor cancels.
        decay: decay rate of the mean squares.

    Returns:
        (..., R) factors and mean squares.
    """
    updated = torch.lerp(mean_squares, squares / columns, 1 - decay)
    factors = 1 / (updated.sqrt() + _ROW_EPS)
    total = squares.sum(-1, keepdim=True)
    scaled = (squares * factors.square()).sum(-1, keepdim=True)
    factors = factors * (total / scaled.clamp(min=MIN_NORM)).sqrt()
    return factors, torch.where(total > 0, updated, mean_squares)


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, or the tensor if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def any_nonzero(matrices: Tensor) -> Tensor:
    """Return (..., 1, 1) bool: which of the matrices (..., R, C) are not zero."""
    return matrices.ne(0).flatten(-2).any(-1)[..., None, None]


def nesterov_momenta(
    group: dict[str, Any], matrices: list[Tensor], momenta: list[Tensor], apply: Tensor
) -> Tensor:
    """Update momenta of one shape and return those of Nesterov, of this rank's shards.

    Args:
        matrices: parameters with their gradients.
        momenta: one for each.
        apply: (), bool; where false, no momentum changes and the returned ones are zero.
    """
    buffers = [local(momentum) for momentum in momenta]
    gradients = torch.stack([local(p.grad) for p in matrices])  # type: ignore[arg-type]
    before, momentum = torch.stack(buffers), group["momentum"]
    updated = torch.lerp(before, gradients, 1 - momentum)
    nesterov = torch.where(apply, torch.lerp(gradients, updated, momentum), 0.0)
    torch._foreach_copy_(buffers, list(torch.where(apply, updated, before).unbind()))
    if nesterov.ndim > 3:
        # A zero matrix stays zero.
        nesterov = torch.where(any_nonzero(gradients), nesterov, 0.0)
    return nesterov
