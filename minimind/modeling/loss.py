"""Cross-entropy straight from hidden states, without ever holding all logits.

Shapes: N tokens, C hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import dispatch as fused

IGNORED = -100

# Logits held at once: 2^26 are 8192 tokens of a vocabulary of 6400 and 128 MB in bf16, enough to fill a GPU.
# Elsewhere logits are float32 and nothing is gained by large pieces.
_LOGITS_ON_CUDA = 1 << 26
_LOGITS_ELSEWHERE = 1 << 24


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of `hidden @ weight.T` against `targets`, summed over real targets.

    The products run in the autocast dtype where autocast is on, else in the dtype of the weight; softmax and
    sums are float32. Where a gradient is wanted it is computed with the loss, piece by piece, and only
    scaled in the backward pass (as in Liger Kernel, Hsu et al. 2024, arXiv 2410.10989): logits are computed
    once and dropped, at the cost of no second product.

    Args:
        hidden: (N, C) hidden states.
        weight: (V, C) output matrix.
        targets: (N,) int64 token ids, -100 where there is nothing to predict.

    Returns:
        float32 scalar.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, targets, dtype)
    low_weight = weight.to(dtype)
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for h, t in _pieces(hidden, weight, targets):
        logits = (h.to(dtype) @ low_weight.T).float()
        loss = loss + F.cross_entropy(logits, t, ignore_index=IGNORED, reduction="sum")
    return loss


def _pieces(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Cut the tokens into pieces of a power of two, so that the common case has no odd last piece."""
    limit = _LOGITS_ON_CUDA if hidden.is_cuda else _LOGITS_ELSEWHERE
    tokens = 1 << max((limit // weight.shape[0]).bit_length() - 1, 0)
    return list(zip(hidden.split(tokens), targets.split(tokens), strict=True))


class _LinearCrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy` with both gradients computed on the way forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        low_weight = weight.to(dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        grad_hidden = []
        for h, t in _pieces(hidden, weight, targets):
            h = h.to(dtype)
            logits = h @ low_weight.T
            if fused.wanted(h, low_weight):
                loss = loss + fused.cross_entropy_(logits, t, IGNORED).sum()
                grad_hidden.append((logits @ low_weight).to(hidden.dtype))
                grad_weight += logits.T @ h
                continue
            logits = logits.float()
            ids, ignored = t.clamp(min=0)[:, None], (t == IGNORED)[:, None]
            chosen, top = logits.gather(1, ids), logits.amax(-1, keepdim=True)
            exps = logits.sub_(top).exp_()  # in place: eagerly, each pass over the logits counts
            total = exps.sum(-1, keepdim=True)
            log_probability = chosen - top - total.log()
            loss = loss - torch.where(ignored, 0.0, log_probability).sum()
            # d loss / d logits = softmax - onehot; an infinite total zeroes an ignored row.
            grad = exps.div_(torch.where(ignored, float("inf"), total)).to(dtype)
            at_target = torch.where(ignored, 0.0, torch.expm1(log_probability)).to(dtype)
            if torch.compiler.is_compiling():
                # Joins the passes over the logits, where a scatter would be a pass of its own.
                columns = torch.arange(weight.shape[0], device=weight.device)
                grad = torch.where(ids == columns, at_target, grad)
            else:
                grad.scatter_(1, ids, at_target)
            grad_hidden.append((grad @ low_weight).to(hidden.dtype))
            grad_weight += grad.T @ h
        ctx.save_for_backward(torch.cat(grad_hidden), grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # A scalar tensor does not promote: half-precision gradients stay so, multiplied in float32.
        return grad_hidden * grad_loss, grad_weight * grad_loss, None, None
