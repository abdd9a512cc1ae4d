"""Fused linear layer and cross-entropy that never materializes all logits.

Shapes: N tokens, C hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import dispatch as fused

IGNORED = -100

# Logits per chunk: 2^26 are 8192 tokens at a vocabulary of 6400, 128 MB in bf16, enough to occupy a GPU.
# Elsewhere logits are float32, and chunks of 16 MB stay in the cache of a CPU.
_LOGITS_ON_CUDA = 1 << 26
_LOGITS_ELSEWHERE = 1 << 22
# A sum of 2^11 normed hidden states is far below 65504, the largest number of fp16.
_LOG_TOKENS_IN_FP16 = 11


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of `hidden @ weight.T` and `targets`, summed over targets other than -100.

    Products use the autocast dtype, or the weight's dtype without autocast; softmax and sums are float32.
    If a gradient is needed, it is computed in the forward pass, chunk by chunk, and only scaled in the
    backward pass (as in Liger Kernel, Hsu et al. 2024, arXiv 2410.10989), so logits are computed once.
    Loss scaling has no effect on these products, so in fp16 they sum smaller numbers.

    Args:
        hidden: (N, C) hidden states.
        weight: (V, C) of the output layer.
        targets: (N,) int64 token ids, -100 to ignore.

    Returns:
        float32 scalar.
    """
    dtype = fused.compute_dtype(hidden, weight)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, targets, dtype)
    low_weight = weight.to(dtype)
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for h, t in _chunks(hidden, weight, targets):
        logits = (h.to(dtype) @ low_weight.T).float()
        loss = loss + F.cross_entropy(logits, t, ignore_index=IGNORED, reduction="sum")
    return loss


def _chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Split the tokens into chunks of a power of two, so that usual batches divide evenly."""
    limit = _LOGITS_ON_CUDA if hidden.is_cuda else _LOGITS_ELSEWHERE
    tokens = 1 << max((limit // weight.shape[0]).bit_length() - 1, 0)
    return list(zip(hidden.split(tokens), targets.split(tokens), strict=True))


def _summable(hidden: Tensor) -> tuple[Tensor, int]:
    """Return (N, C) normed hidden states divided by a power of two, and that divisor.

    In fp16 it is so large that a sum over the tokens is finite; for other dtypes it is 1. The quotients are
    exact, except for hidden states far below the rounding error of the others.
    """
    if hidden.dtype != torch.float16:
        return hidden, 1
    divisor = 1 << max((len(hidden) - 1).bit_length() - _LOG_TOKENS_IN_FP16, 0)
    return hidden / divisor, divisor


class _LinearCrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy` with both gradients computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        low_weight = weight.to(dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        grad_hidden = []
        for h, t in _chunks(hidden, weight, targets):
            h = h.to(dtype)
            logits = h @ low_weight.T
            small, divisor = _summable(h)
            if fused.supported(h, low_weight):
                loss = loss + fused.cross_entropy_(logits, t, IGNORED).sum()
                grad_hidden.append((logits @ low_weight).to(hidden.dtype))
                grad_weight.add_(logits.T @ small, alpha=divisor)
                continue
            logits = logits.float()
            ids, ignored = t.clamp(min=0)[:, None], (t == IGNORED)[:, None]
            chosen, top = logits.gather(1, ids), logits.amax(-1, keepdim=True)
            exps = logits.sub_(top).exp_()  # in place, to save memory traffic in eager mode
            total = exps.sum(-1, keepdim=True)
            log_probability = chosen - top - total.log()
            loss = loss - torch.where(ignored, 0.0, log_probability).sum()
            # d loss / d logits = softmax - onehot; dividing by infinity zeroes ignored tokens.
            grad = exps.div_(torch.where(ignored, float("inf"), total)).to(dtype)
            at_target = torch.where(ignored, 0.0, torch.expm1(log_probability)).to(dtype)
            if torch.compiler.is_compiling():
                # Fuses with the operations above, which a scatter would not.
                columns = torch.arange(weight.shape[0], device=weight.device)
                grad = torch.where(ids == columns, at_target, grad)
            else:
                grad.scatter_(1, ids, at_target)
            grad_hidden.append((grad @ low_weight).to(hidden.dtype))
            grad_weight.add_(grad.T @ small, alpha=divisor)
        ctx.save_for_backward(torch.cat(grad_hidden), grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # A scalar tensor does not promote: half-precision gradients keep their dtype.
        return grad_hidden * grad_loss, grad_weight * grad_loss, None, None
