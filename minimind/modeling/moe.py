"""A mixture of experts in place of the SwiGLU layer: every token passes the few that its router chooses.

No token is dropped, however many choose the same expert. Tokens are sorted by expert and one grouped matrix
product serves all experts, so that shapes never depend on what the router chose: the device is never asked,
and compiled code stays one graph.

Shapes: B batch, T tokens in a row, N = B·T, K experts of a token, S = N·K, E experts, C hidden, F inner,
L blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MiniMindConfig
from .kernels import dispatch as fused

# Both widths of a matrix must be a multiple of this for torch's kernel (16 bytes of bf16).
_ALIGNMENT = 8


class MixtureOfExperts(nn.Module):
    """Σ pₑ·SwiGLUₑ(x) over the K experts with the largest router probabilities pₑ (Fedus et al. 2021).

    As in transformers' Qwen3-MoE; Switch Transformers (arXiv 2101.03961) have K = 1.
    """

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        self.experts_per_token = config.num_experts_per_tok
        self.normalize = bool(config.norm_topk_prob)
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config)

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map (B, T, C) to (B, T, C).

        Args:
            x: what to map.
            token_mask: (B, T) bool, False for padding: it passes no expert, comes out as zero and is not
                counted. None: there is none.

        Returns:
            The mapped tokens, and (2, E) float32: how many times each expert was chosen, which carries no
            gradient, and the sum of its router probability over tokens, which does; see `balance_loss`.
        """
        num_experts, k = self.gate.out_features, self.experts_per_token
        tokens = x.flatten(0, 1)
        probabilities = self._probabilities(tokens)  # (N, E)
        weights, choices = probabilities.topk(k, dim=-1)  # (N, K)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        if token_mask is not None:
            real = token_mask.reshape(-1, 1)
            choices = torch.where(real, choices, num_experts)  # sorted behind all experts
            probabilities = torch.where(real, probabilities, 0.0)
        choices = choices.flatten()  # (S,)
        counts = (choices[:, None] == torch.arange(num_experts, device=x.device)).sum(0)  # (E,)
        # Stable, so that the order of sums in a gradient is always the same.
        order = choices.argsort(stable=True)
        places = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=x.device))
        rows = tokens.to(fused.compute_dtype(tokens, self.experts.gate_proj))
        rows = _Permute.apply(rows[:, None].expand(-1, k, -1).flatten(0, 1), order, places)  # (S, C)
        ends = counts.cumsum(0).to(torch.int32)
        if token_mask is None:
            rows = self.experts(rows, ends)
        else:
            # Behind the last expert's rows a grouped product leaves whatever was in the memory, in the
            # backward pass too.
            used = (torch.arange(len(rows), device=x.device) < ends[-1])[:, None]
            rows = torch.where(used, self.experts(torch.where(used, rows, 0), ends), 0)
        rows = _Permute.apply(rows, places, order).unflatten(0, (-1, k))  # (N, K, C)
        out = (rows * weights[:, :, None]).sum(1).to(rows.dtype)
        return out.view_as(x), torch.stack((counts.float(), probabilities.sum(0)))

    def _probabilities(self, tokens: Tensor) -> Tensor:
        """Return the (N, E) router probabilities of (N, C).

        In float32 whatever the rest is computed in: rounded logits make training unstable (Fedus et al. 2021,
        section 2.4).
        """
        with torch.autocast(tokens.device.type, enabled=False):
            logits = F.linear(tokens.float(), self.gate.weight.float())
        return logits.softmax(-1)


class Experts(nn.Module):
    """E SwiGLU layers, each kind of matrix stacked in one tensor."""

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        assert config.moe_intermediate_size is not None
        e, c, f = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(e, f, c))
        self.up_proj = nn.Parameter(torch.empty(e, f, c))
        self.down_proj = nn.Parameter(torch.empty(e, c, f))

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Map (S, C) rows sorted by expert to (S, C); `ends`, (E,) int32, tells where each expert's end."""
        if fused.wanted(rows, self.gate_proj):
            both = torch.cat((self.gate_proj, self.up_proj), 1).to(rows.dtype)
            inner = fused.swiglu(grouped_linear(rows, both, ends))
        else:
            gate = grouped_linear(rows, self.gate_proj.to(rows.dtype), ends)
            up = grouped_linear(rows, self.up_proj.to(rows.dtype), ends)
            inner = F.silu(gate) * up
        return grouped_linear(inner, self.down_proj.to(rows.dtype), ends)


def grouped_linear(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Return rows·Wₑᵀ, each group of rows with its own matrix; undefined behind the last group.

    Torch's kernel on CUDA in bf16, to which groups of any size are right where only rows are cut, as here
    (before Hopper torch itself runs a product for each group). Elsewhere `looped_linear`: what torch has for
    other dtypes cannot be compiled.

    Args:
        rows: (S, C) sorted by group.
        weights: (E, F, C) in the dtype of the rows.
        ends: (E,) int32 ascending, where the rows of each group end.

    Returns:
        (S, F).
    """
    aligned = weights.shape[1] % _ALIGNMENT == 0 and weights.shape[2] % _ALIGNMENT == 0
    if rows.is_cuda and rows.dtype == torch.bfloat16 and aligned:
        return F.grouped_mm(rows, weights.mT, offs=ends)
    return looped_linear(rows, weights, ends)


@torch.library.custom_op("minimind::looped_linear", mutates_args=())
def looped_linear(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Do what `grouped_linear` does, one group after the other; zero behind the last group.

    An operator of its own, because the sizes of the groups, which the host has to wait for, would break a
    compiled graph.
    """
    out = rows.new_zeros(len(rows), weights.shape[1])
    start = 0
    for weight, end in zip(weights, ends.tolist(), strict=True):
        torch.mm(rows[start:end], weight.T, out=out[start:end])
        start = end
    return out


@looped_linear.register_fake
def _(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(len(rows), weights.shape[1])


@torch.library.custom_op("minimind::looped_outer", mutates_args=())
def _looped_outer(grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    """Return (E, F, C): of each group the product gradᵀ·rows of (S, F) and (S, C)."""
    out = rows.new_empty(len(ends), grad.shape[1], rows.shape[1])
    start = 0
    for matrix, end in zip(out, ends.tolist(), strict=True):
        torch.mm(grad[start:end].T, rows[start:end], out=matrix)
        start = end
    return out


@_looped_outer.register_fake
def _(grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(len(ends), grad.shape[1], rows.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _looped_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    rows, weights, ends = ctx.saved_tensors
    grad = grad.contiguous()
    return looped_linear(grad, weights.mT, ends), _looped_outer(grad, rows, ends), None


looped_linear.register_autograd(_looped_backward, setup_context=_save)


class _Permute(torch.autograd.Function):
    """Rows in another order. The gradient is put back by the inverse order, so that nothing is summed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None


def balance_loss(counts: Tensor, probability_sums: Tensor, experts_per_token: int) -> Tensor:
    """Return the load-balancing loss of Switch Transformers, summed over blocks and tokens.

    Fedus et al. 2021 (arXiv 2101.03961), equations 4 to 6: E·Σₑ fₑ·Pₑ in each block, with fₑ the times that
    expert e was chosen by a token on average and Pₑ its mean probability; K where all are chosen alike. Times
    the number of tokens it is E·Σₑ fₑ·(sum of e's probability): so the parts of several processes add up.

    Args:
        counts: (L, E) how many times each expert was chosen, over all tokens that are balanced together.
        probability_sums: (L, E) router probabilities, summed over these tokens or some of them.
        experts_per_token: K.

    Returns:
        float32 scalar.
    """
    tokens = counts.sum(-1, keepdim=True) / experts_per_token
    shares = counts / tokens.clamp(min=1)  # f, (L, E)
    return counts.shape[-1] * (shares * probability_sums).sum()
