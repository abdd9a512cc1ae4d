"""Mixture of experts: each token is routed to its top-k SwiGLU experts.

Dropless: no token is dropped, however unbalanced the routing. Tokens are sorted by expert and multiplied by
one grouped matrix product, so that shapes do not depend on the routing: there is no synchronization with the
device, and compiled code stays one graph.

Shapes: B batch, T sequence length, N = B·T tokens, K experts per token, S = N·K, E experts, C hidden,
F inner, L blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MiniMindConfig
from .kernels import dispatch as fused

# The logits of at most so many experts are computed without a matrix product.
_MOST_SUMMED_EXPERTS = 8
# F.grouped_mm needs both dimensions of a matrix to be multiples of this (16 bytes of bf16).
ALIGNMENT = 8


class MixtureOfExperts(nn.Module):
    """Σ pₑ·SwiGLUₑ(x) over the K experts with the largest router probabilities pₑ (Fedus et al. 2021).

    As in transformers' Qwen3-MoE; K = 1 in Switch Transformers (arXiv 2101.03961).
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
            token_mask: (B, T) bool, False for padding, which is not routed or counted; its output is zero.
                None: no padding.

        Returns:
            The output, and (2, E) float32: the number of tokens routed to each expert, without gradient, and
            the sum of its router probability over tokens, with gradient; see `balance_loss`.
        """
        num_experts, k = self.gate.out_features, self.experts_per_token
        tokens = x.flatten(0, 1)
        probabilities = self._probabilities(tokens)  # (N, E)
        # Compiled code fuses a maximum with the softmax, but not `topk`.
        largest = probabilities.max(-1, keepdim=True) if k == 1 else probabilities.topk(k, dim=-1)
        weights, expert_ids = largest  # (N, K)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        if token_mask is not None:
            real = token_mask.reshape(-1, 1)
            expert_ids = torch.where(real, expert_ids, num_experts)  # sorted after all experts
            probabilities = torch.where(real, probabilities, 0.0)
        expert_ids = expert_ids.flatten()  # (S,)
        counts = (expert_ids[:, None] == torch.arange(num_experts, device=x.device)).sum(0)  # (E,)
        # Stable, so that gradients are summed in a deterministic order.
        order = expert_ids.argsort(stable=True)
        inverse = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=x.device))
        tokens = tokens.to(fused.compute_dtype(tokens, self.experts.gate_proj))
        repeated = tokens[:, None].expand(-1, k, -1).flatten(0, 1)  # (S, C)
        sorted_tokens = _Permute.apply(repeated, order, inverse)
        ends = counts.cumsum(0).to(torch.int32)
        if token_mask is None:
            sorted_tokens = self.experts(sorted_tokens, ends)
        else:
            # After the last expert's tokens a grouped product leaves memory uninitialized, also in the
            # backward pass.
            used = (torch.arange(len(sorted_tokens), device=x.device) < ends[-1])[:, None]
            sorted_tokens = torch.where(used, self.experts(torch.where(used, sorted_tokens, 0), ends), 0)
        outputs = _Permute.apply(sorted_tokens, inverse, order).unflatten(0, (-1, k))  # (N, K, C)
        out = (outputs * weights[:, :, None]).sum(1).to(outputs.dtype)
        return out.view_as(x), torch.stack((counts.float(), probabilities.sum(0)))

    def _probabilities(self, tokens: Tensor) -> Tensor:
        """Return the (N, E) router probabilities of (N, C).

        Always in float32: rounded router logits make training unstable (Fedus et al. 2021, section 2.4).
        """
        weight = self.gate.weight.float()
        if torch.compiler.is_compiling() and tokens.is_cuda and len(weight) <= _MOST_SUMMED_EXPERTS:
            return _RouterLogits.apply(tokens, weight).softmax(-1)
        with torch.autocast(tokens.device.type, enabled=False):
            return F.linear(tokens.float(), weight).softmax(-1)


class _RouterLogits(torch.autograd.Function):
    """x·Wᵀ as one sum per expert, which compiled code fuses with the operations before and after.

    Matrix products of so few columns take twice as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.stack([(x.float() * row).sum(-1) for row in weight.unbind()], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        for_x = (grad[:, :, None] * weight).sum(1).to(x.dtype)
        # A sum over all tokens, in which the rounding of bf16 averages out.
        return for_x, (grad.to(x.dtype).mT @ x).to(weight.dtype)


class Experts(nn.Module):
    """E SwiGLU layers with stacked weights."""

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        assert config.moe_intermediate_size is not None
        e, c, f = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(e, f, c))
        self.up_proj = nn.Parameter(torch.empty(e, f, c))
        self.down_proj = nn.Parameter(torch.empty(e, c, f))

    def forward(self, tokens: Tensor, ends: Tensor) -> Tensor:
        """Map (S, C) tokens sorted by expert to (S, C); expert e has those before `ends[e]`, (E,) int32."""
        if fused.supported(tokens, self.gate_proj):
            gate_up = torch.cat((self.gate_proj, self.up_proj), 1).to(tokens.dtype)
            inner = fused.swiglu(grouped_linear(tokens, gate_up, ends))
        else:
            gate = grouped_linear(tokens, self.gate_proj.to(tokens.dtype), ends)
            up = grouped_linear(tokens, self.up_proj.to(tokens.dtype), ends)
            inner = F.silu(gate) * up
        return grouped_linear(inner, self.down_proj.to(tokens.dtype), ends)


def grouped_linear(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Return x·Wₑᵀ with one matrix per group of rows; undefined after the last group.

    Uses `F.grouped_mm` in bf16 on CUDA (before Hopper torch loops over the groups), elsewhere
    `looped_linear`: torch's grouped products of other dtypes cannot be compiled.

    Args:
        x: (S, C), rows sorted by group.
        weights: (E, F, C), in the dtype of `x`.
        ends: (E,) int32, ascending end of each group.

    Returns:
        (S, F).
    """
    aligned = weights.shape[1] % ALIGNMENT == 0 and weights.shape[2] % ALIGNMENT == 0
    if x.is_cuda and x.dtype == torch.bfloat16 and aligned:
        return F.grouped_mm(x, weights.mT, offs=ends)
    return looped_linear(x, weights, ends)


@torch.library.custom_op("minimind::looped_linear", mutates_args=())
def looped_linear(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Compute `grouped_linear` with a loop over the groups; zero after the last group.

    A custom operator, because reading the group sizes on the host would break a compiled graph.
    """
    out = x.new_zeros(len(x), weights.shape[1])
    start = 0
    for weight, end in zip(weights, ends.tolist(), strict=True):
        torch.mm(x[start:end], weight.T, out=out[start:end])
        start = end
    return out


@looped_linear.register_fake
def _(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(len(x), weights.shape[1])


@torch.library.custom_op("minimind::looped_outer", mutates_args=())
def _looped_outer(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Return the (E, F, C) products gradᵀ·x of each group of (S, F) and (S, C)."""
    out = x.new_empty(len(ends), grad.shape[1], x.shape[1])
    start = 0
    for matrix, end in zip(out, ends.tolist(), strict=True):
        torch.mm(grad[start:end].T, x[start:end], out=matrix)
        start = end
    return out


@_looped_outer.register_fake
def _(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(len(ends), grad.shape[1], x.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _looped_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weights, ends = ctx.saved_tensors
    grad = grad.contiguous()
    return looped_linear(grad, weights.mT, ends), _looped_outer(grad, x, ends), None


looped_linear.register_autograd(_looped_backward, setup_context=_save)


class _Permute(torch.autograd.Function):
    """Permute rows. The backward pass indexes with the inverse permutation instead of scattering sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None


def balance_loss(counts: Tensor, probability_sums: Tensor, experts_per_token: int) -> Tensor:
    """Return the load-balancing loss of Switch Transformers, summed over blocks and tokens.

    Fedus et al. 2021 (arXiv 2101.03961), equations 4 to 6: E·Σₑ fₑ·Pₑ per block, with fₑ the share of tokens
    routed to expert e and Pₑ its mean router probability; K at uniform routing. Multiplied by the
    number of tokens it is E·Σₑ fₑ·(sum of e's probabilities), which is additive over processes.

    Args:
        counts: (L, E) tokens routed to each expert, over all tokens that are balanced together.
        probability_sums: (L, E) router probabilities, summed over these tokens or a part of them.

    Returns:
        float32 scalar.
    """
    tokens = counts.sum(-1, keepdim=True) / experts_per_token
    shares = counts / tokens.clamp(min=1)  # f, (L, E)
    return counts.shape[-1] * (shares * probability_sums).sum()
