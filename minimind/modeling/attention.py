"""Grouped-query attention with RMS-normed queries and keys; causal, optionally with a document mask.

Shapes: B batch, T queries, S keys, C hidden, H heads, K kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from . import float8
from .config import MiniMindConfig
from .documents import Documents
from .kernels import dispatch as fused
from .kv_cache import LayerCache
from .rope import Rotary, rotate

# An attention mask: a (B or 1, 1, T, S) boolean tensor, a FlexAttention block mask, or document boundaries
# for the kernels. None is plain causal attention.
Mask = Tensor | BlockMask | Documents

# The smallest head dimension that FlexAttention supports.
SMALLEST_FLEX_HEAD = 16


class RMSNorm(nn.Module):
    """x / rms(x) · weight (Zhang and Sennrich 2019, arXiv 1910.07467).

    Computed in float32 and returned in the dtype of the weight, which the next layer expects: float32 under
    autocast, bf16 in a bf16 model.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed (..., width) input."""
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (x * self.weight.float()).to(self.weight.dtype)

    def add(self, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return x + added (x if None) and its norm, both (..., C)."""
        if fused.supported(x, self.weight):
            return fused.add_norm(x, added, self.weight, self.eps)
        # Not in place: `+=` into a bf16 sublayer output would round the residual stream to bf16.
        x = x if added is None else x + added
        return x, self(x)


def document_mask(document_ids: Tensor) -> Tensor:
    """Return the (B, 1, T, T) boolean mask: a query attends to its own document up to itself.

    Every query attends to itself, so softmax is always finite.
    """
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same.tril_()


def document_block_mask(
    document_ids: Tensor, create: Callable[..., BlockMask] = create_block_mask
) -> BlockMask:
    """Return the mask of `document_mask` as a FlexAttention block mask, which skips fully masked blocks.

    Args:
        document_ids: (B, T).
        create: `create_block_mask`; if compiled, it does not materialize the mask.
    """

    def attends(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document_ids[batch, query] == document_ids[batch, key]) & (query >= key)

    batch_size, length = document_ids.shape
    return create(attends, batch_size, None, length, length, device=document_ids.device)


def cached_mask(start: int, length: int, device: torch.device) -> Tensor | None:
    """Return the (1, 1, T, S) mask of `length` queries after `start` cached tokens, None if not needed."""
    if length == 1 or start == 0:
        return None
    return torch.ones(length, start + length, dtype=torch.bool, device=device).tril(start)[None, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None, dropout: float = 0.0) -> Tensor:
    """Return softmax(q·kᵀ/√D)·v over the keys that `mask` allows.

    FlexAttention must be compiled: in eager mode it computes the full score matrix. It has no dropout.

    Args:
        q: (B, H, T, D) queries.
        k: (B, K, S, D) keys; query head h uses kv head h·K/H.
        v: (B, K, S, D) values.
        mask: None for causal attention with T = S, or for a single query that attends to all keys.
        dropout: probability that an attention weight is zeroed.

    Returns:
        (B, H, T, D).
    """
    if isinstance(mask, BlockMask):
        out = flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        assert isinstance(out, Tensor)
        return out
    grouped = q.shape[1] != k.shape[1]
    # On a GPU only the flash kernel supports grouped heads, and it takes no mask: without repeated keys
    # masked attention would compute the full score matrix.
    if grouped and not (q.device.type == "cpu" or (q.device.type == "cuda" and mask is None)):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    causal = mask is None and q.shape[2] > 1
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=grouped
    )


class Attention(nn.Module):
    """Self-attention layer of a block."""

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        c, d = config.hidden_size, config.head_dim
        self.head_dim = d
        self.dropout = config.dropout
        self.q_proj = nn.Linear(c, config.num_attention_heads * d, bias=False)
        self.k_proj = nn.Linear(c, config.num_key_value_heads * d, bias=False)
        self.v_proj = nn.Linear(c, config.num_key_value_heads * d, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * d, c, bias=False)
        # QK-norm bounds the attention scores (Henry et al. 2020).
        self.q_norm = RMSNorm(d, config.rms_norm_eps)
        self.k_norm = RMSNorm(d, config.rms_norm_eps)
        # Compute the projections in FP8 in training, where the kernels are used.
        self.float8 = False

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Mask | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        batch_size, length, _ = x.shape
        if isinstance(mask, Documents):
            if self.float8 and self.training:
                return float8.linear(self._fused(x, rotary, mask, float8.linear), self.o_proj.weight)
            return self.o_proj(self._fused(x, rotary, mask, F.linear))
        heads = batch_size, length, -1, self.head_dim
        v = self.v_proj(x).view(heads)
        # Norm and rotation run in float32; attention runs in the dtype of the projections.
        q = rotate(self.q_norm(self.q_proj(x).view(heads)), rotary.cos, rotary.sin).to(v.dtype)
        k = rotate(self.k_norm(self.k_proj(x).view(heads)), rotary.cos, rotary.sin).to(v.dtype)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or K, T, D)
        if cache is not None:
            k, v = cache.append(k, v)
        out = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.o_proj(out.transpose(1, 2).reshape(batch_size, length, -1))

    def _fused(
        self,
        x: Tensor,
        rotary: Rotary,
        documents: Documents,
        linear: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Return the input of `o_proj`, by one fused projection, `linear`, and our Triton kernels."""
        assert rotary.positions is not None
        weights = self.q_proj.weight, self.k_proj.weight, self.v_proj.weight
        return fused.attend(
            linear(x, torch.cat(weights)),
            self.q_norm.weight,
            self.k_norm.weight,
            rotary.cos,
            rotary.sin,
            rotary.positions,
            documents,
            heads=weights[0].shape[0] // self.head_dim,
            eps=self.q_norm.eps,
        )
