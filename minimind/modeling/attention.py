"""Grouped-query attention with normed queries and keys, causal, within documents where they are told apart.

Shapes: B batch, T queries, S keys, C hidden, H heads, K kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from .config import MiniMindConfig
from .documents import Documents
from .kernels import dispatch as fused
from .kv_cache import LayerCache
from .rope import Rotary, rotate

# What a query may see besides "itself and what came before", which needs no mask and is None:
# a (B or 1, 1, T, S) boolean tensor, the same as blocks for FlexAttention, or where documents begin and end.
Mask = Tensor | BlockMask | Documents

# FlexAttention knows no narrower heads.
SMALLEST_FLEX_HEAD = 16


class RMSNorm(nn.Module):
    """x / rms(x) · weight (Zhang and Sennrich 2019, arXiv 1910.07467).

    Computed in float32 for any input and returned in the dtype of the weight: float32 under autocast, bf16
    in a bf16 model, which is what the layer behind it expects in either case.
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
        """Return x + added, where None is nothing, and the norm of that, both (..., C)."""
        if fused.wanted(x, self.weight):
            return fused.add_norm(x, added, self.weight, self.eps)
        # In the wider dtype. Not in place: `+=` into what a sublayer returns would round the stream.
        x = x if added is None else x + added
        return x, self(x)


def document_mask(document_ids: Tensor) -> Tensor:
    """Return the (B, 1, T, T) boolean mask: a query sees its own document up to itself.

    Every query sees itself, so no row is empty and softmax stays finite.
    """
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same.tril_()


def document_block_mask(
    document_ids: Tensor, create: Callable[..., BlockMask] = create_block_mask
) -> BlockMask:
    """Return the mask of `document_mask` for FlexAttention, which skips blocks that no query may see.

    Args:
        document_ids: (B, T).
        create: `create_block_mask`; compiled, it never holds the mask element by element.
    """

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document_ids[batch, query] == document_ids[batch, key]) & (query >= key)

    rows, length = document_ids.shape
    return create(sees, rows, None, length, length, device=document_ids.device)


def cached_mask(start: int, length: int, device: torch.device) -> Tensor | None:
    """Return what `length` new queries see that follow `start` cached tokens, (1, 1, T, S), None for all."""
    if length == 1 or start == 0:
        return None
    return torch.ones(length, start + length, dtype=torch.bool, device=device).tril(start)[None, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None, dropout: float = 0.0) -> Tensor:
    """Return softmax(q·kᵀ/√D)·v over the keys that `mask` allows.

    FlexAttention is for compiled code: run eagerly it computes the whole score matrix. It has no dropout.

    Args:
        q: (B, H, T, D) queries.
        k: (B, K, S, D) keys; query heads h·K/H share one.
        v: (B, K, S, D) values.
        mask: None for causal attention, where T is S or a single query sees all keys.
        dropout: probability that an attention weight is zeroed.

    Returns:
        (B, H, T, D).
    """
    if isinstance(mask, BlockMask):
        out = flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        assert isinstance(out, Tensor)
        return out
    grouped = q.shape[1] != k.shape[1]
    # On a GPU only the flash kernel knows groups, and it takes no mask: without this copy of the keys the
    # masked case would compute the whole score matrix.
    if grouped and not (q.device.type == "cpu" or (q.device.type == "cuda" and mask is None)):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and q.shape[2] > 1,
        enable_gqa=grouped,
    )


class Attention(nn.Module):
    """Self-attention of one block."""

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        c, d = config.hidden_size, config.head_dim
        self.head_dim = d
        self.dropout = config.dropout
        self.q_proj = nn.Linear(c, config.num_attention_heads * d, bias=False)
        self.k_proj = nn.Linear(c, config.num_key_value_heads * d, bias=False)
        self.v_proj = nn.Linear(c, config.num_key_value_heads * d, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * d, c, bias=False)
        # Norms over each head bound the scores whatever the weights grow to (Henry et al. 2020).
        self.q_norm = RMSNorm(d, config.rms_norm_eps)
        self.k_norm = RMSNorm(d, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        mask: Mask | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Return what the tokens of x, (B, T, C), gather from those they see, (B, T, C)."""
        rows, length, _ = x.shape
        if isinstance(mask, Documents):
            return self.o_proj(self._fused(x, rotary, mask))
        heads = rows, length, -1, self.head_dim
        v = self.v_proj(x).view(heads)
        # Norm and rotation are float32; the products with them are in whatever the projections came out in.
        q = rotate(self.q_norm(self.q_proj(x).view(heads)), rotary.cos, rotary.sin).to(v.dtype)
        k = rotate(self.k_norm(self.k_proj(x).view(heads)), rotary.cos, rotary.sin).to(v.dtype)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or K, T, D)
        if cache is not None:
            k, v = cache.append(k, v)
        out = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.o_proj(out.transpose(1, 2).reshape(rows, length, -1))

    def _fused(self, x: Tensor, rotary: Rotary, seen: Documents) -> Tensor:
        """Return what `forward` gives to the last projection, by one product and kernels of our own."""
        assert rotary.positions is not None
        weights = self.q_proj.weight, self.k_proj.weight, self.v_proj.weight
        return fused.attend(
            F.linear(x, torch.cat(weights)),
            self.q_norm.weight,
            self.k_norm.weight,
            rotary.cos,
            rotary.sin,
            rotary.positions,
            seen,
            heads=weights[0].shape[0] // self.head_dim,
            eps=self.q_norm.eps,
        )
