"""Autograd functions around the Triton kernels, for training in bf16 on CUDA GPUs.

Saved for the backward pass are the results of matrix products; kernels recompute everything else from them.

Shapes: N tokens, B batch, T sequence length, C hidden, H query heads, K kv heads, D head dim, F inner,
V vocabulary, P positions.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from ..documents import Documents

# Programs of a kernel that sums a gradient over tokens: several on every multiprocessor.
_PROGRAMS = 1024
# Shared memory per multiprocessor from which two pipeline stages of large tiles fit; consumer GPUs have less.
_LARGE_SHARED_MEMORY = 160 * 1024


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


@triton_op("minimind::add_norm", mutates_args={})
def _add_norm(x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from . import block as kernels

    columns = x.shape[-1]
    rows = x.numel() // columns
    total = torch.empty_like(x) if added is not None else x.new_empty(0)
    normed = torch.empty_like(x)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    wrap_triton(kernels.add_norm_forward)[(rows,)](
        x, added if added is not None else x, weight, total, normed, rstd, columns,
        EPS=eps, ADD=added is not None, BLOCK=_power_of_two(columns), num_warps=4,
    )  # fmt: skip
    return total, normed, rstd


@triton_op("minimind::add_norm_backward", mutates_args={})
def _add_norm_backward(
    grad_normed: Tensor, grad_total: Tensor | None, normed: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    from . import block as kernels

    columns = normed.shape[-1]
    rows = normed.numel() // columns
    programs = min(_PROGRAMS, rows)
    grad = torch.empty_like(normed)
    grad_weight = torch.empty(programs, columns, dtype=torch.float32, device=normed.device)
    wrap_triton(kernels.add_norm_backward)[(programs,)](
        grad_normed, grad_total if grad_total is not None else grad_normed, normed, weight, rstd, grad,
        grad_weight, rows, columns,
        ROWS_EACH=-(-rows // programs), ADD=grad_total is not None, BLOCK=_power_of_two(columns), num_warps=4,
    )  # fmt: skip
    return grad, grad_weight


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total, normed, rstd = _add_norm(x, added, weight, eps)
        ctx.save_for_backward(normed, weight, rstd)
        return total, normed

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, grad_normed: Tensor) -> tuple[Tensor | None, ...]:
        normed, weight, rstd = ctx.saved_tensors
        grad, grad_weight = _add_norm_backward(
            grad_normed.contiguous(), grad_total.contiguous(), normed, weight, rstd
        )
        return grad, grad, grad_weight.sum(0).to(weight.dtype), None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        _, normed, rstd = _add_norm(x, None, weight, eps)
        ctx.save_for_backward(normed, weight, rstd)
        return normed

    @staticmethod
    def backward(ctx: Any, grad_normed: Tensor) -> tuple[Tensor | None, ...]:
        normed, weight, rstd = ctx.saved_tensors
        grad, grad_weight = _add_norm_backward(grad_normed.contiguous(), None, normed, weight, rstd)
        return grad, grad_weight.sum(0).to(weight.dtype), None


def add_norm(x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + added and its RMS norm, both (..., C) bf16.

    The backward pass uses the normed output, which the next product saves anyway, instead of the sum.

    Args:
        x: (..., C) residual stream.
        added: (..., C) output of the previous sublayer, None for nothing.
        weight: (C,) of the norm.
        eps: added to the mean square.
    """
    x = x.to(torch.bfloat16).contiguous()
    if added is None:
        return x, _Norm.apply(x, weight, eps)
    return _AddNorm.apply(x, added.to(torch.bfloat16).contiguous(), weight, eps)


@cache
def _attention_tiles(
    head_dim: int, device_index: int
) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Return tile sizes, warps and pipeline stages of the three attention kernels.

    The fastest of those tried on an H100, and smaller tiles for GPUs with less shared memory.
    """
    wide = 1 << (head_dim.bit_length() - 1)
    rest = 0 if wide == head_dim else max(_power_of_two(head_dim - wide), 16)
    common = {"DIM": head_dim, "WIDE": wide, "REST": rest, "num_warps": 4}
    memory = torch.cuda.get_device_properties(device_index).shared_memory_per_block_optin  # type: ignore[attr-defined]
    if memory < _LARGE_SHARED_MEMORY:
        small = {**common, "QUERIES": 64, "KEYS": 32, "num_stages": 2}
        return small, small, {**common, "QUERIES": 32, "KEYS": 64, "num_stages": 2}
    large = {**common, "QUERIES": 64, "KEYS": 64, "num_stages": 2}
    forward = {**large, "KEYS": 32, "num_stages": 3} if rest else large
    return forward, {**large, "num_stages": 3 if head_dim <= 96 else 2}, large


def _normed_heads(
    qkv: Tensor, weights: tuple[Tensor, Tensor], rotary: tuple[Tensor, Tensor, Tensor], heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Return queries (B, T, H, D) and keys (B, T, K, D), normalized and rotated; part of an op."""
    from . import block as kernels

    batch_size, length, width = qkv.shape
    head_dim = weights[0].shape[0]
    kv_heads = (width // head_dim - heads) // 2
    query = qkv.new_empty(batch_size, length, heads, head_dim)
    key = qkv.new_empty(batch_size, length, kv_heads, head_dim)
    wrap_triton(kernels.head_norm_rotate_forward)[(-(-batch_size * length // 16),)](
        qkv, *weights, *rotary, query, key, batch_size * length,
        EPS=eps, HEADS=heads, KV_HEADS=kv_heads, HALF=head_dim // 2, TOKENS=16,
        BLOCK=_power_of_two(head_dim // 2), num_warps=4,
    )  # fmt: skip
    return query, key


@triton_op("minimind::attend", mutates_args={})
def _attend(
    qkv: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    starts: Tensor,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    from . import attention as attention_kernels

    batch_size, length, _ = qkv.shape
    query, key = _normed_heads(qkv, (query_weight, key_weight), (cos, sin, positions), heads, eps)
    head_dim, kv_heads = key.shape[3], key.shape[2]
    out = torch.empty_like(query)
    log_sums = torch.empty(batch_size, heads, length, dtype=torch.float32, device=qkv.device)
    tiles, _, _ = _attention_tiles(head_dim, qkv.device.index)
    wrap_triton(attention_kernels.attention_forward)[(-(-length // tiles["QUERIES"]), batch_size * heads)](
        query, key, qkv, starts, out, log_sums, length,
        SCALE=head_dim**-0.5 * math.log2(math.e), HEADS=heads, KV_HEADS=kv_heads, **tiles,
    )  # fmt: skip
    return out, log_sums


@triton_op("minimind::attend_backward", mutates_args={})
def _attend_backward(
    grad_out: Tensor,
    qkv: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    starts: Tensor,
    ends: Tensor,
    out: Tensor,
    log_sums: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    from . import attention as attention_kernels
    from . import block as kernels

    batch_size, length, heads, head_dim = out.shape
    weights, rotary = (query_weight, key_weight), (cos, sin, positions)
    query, key = _normed_heads(qkv, weights, rotary, heads, eps)
    kv_heads = key.shape[2]
    grad_query, grad_key, grad_qkv = torch.empty_like(query), torch.empty_like(key), torch.empty_like(qkv)
    deltas = torch.empty_like(log_sums)
    factor = head_dim**-0.5
    scale = factor * math.log2(math.e)
    _, for_queries, for_keys = _attention_tiles(head_dim, qkv.device.index)
    blocks = -(-length // for_queries["QUERIES"])
    wrap_triton(attention_kernels.attention_backward_queries)[(blocks, batch_size * heads)](
        query, key, qkv, starts, out, log_sums, grad_out, grad_query, deltas, length,
        SCALE=scale, FACTOR=factor, HEADS=heads, KV_HEADS=kv_heads, **for_queries,
    )  # fmt: skip
    blocks = -(-length // for_keys["KEYS"])
    wrap_triton(attention_kernels.attention_backward_keys)[(blocks, batch_size * kv_heads)](
        query, key, qkv, starts, ends, log_sums, deltas, grad_out, grad_key, grad_qkv, length,
        SCALE=scale, FACTOR=factor, HEADS=heads, KV_HEADS=kv_heads, **for_keys,
    )  # fmt: skip
    tiles = -(-batch_size * length // 32)
    programs = min(-(-_PROGRAMS // (heads + kv_heads)), tiles)
    grad_weights = qkv.new_empty(programs, heads + kv_heads, head_dim, dtype=torch.float32)
    wrap_triton(kernels.head_norm_rotate_backward)[(heads + kv_heads, programs)](
        grad_query, grad_key, qkv, *weights, *rotary, grad_qkv, grad_weights, batch_size * length,
        EPS=eps, HEADS=heads, KV_HEADS=kv_heads, HALF=head_dim // 2, TILES_EACH=-(-tiles // programs),
        TOKENS=32, BLOCK=_power_of_two(head_dim // 2), num_warps=4,
    )  # fmt: skip
    return grad_qkv, grad_weights


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        query_weight: Tensor,
        key_weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        starts: Tensor,
        ends: Tensor,
        heads: int,
        eps: float,
    ) -> Tensor:
        common = qkv, query_weight, key_weight, cos, sin, positions, starts
        out, log_sums = _attend(*common, heads, eps)
        ctx.save_for_backward(*common, ends, out, log_sums)
        ctx.heads, ctx.eps = heads, eps
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        # Read once: activation checkpointing recomputes what was saved and gives it once.
        saved = ctx.saved_tensors
        _, query_weight, key_weight, *_ = saved
        grad_qkv, grad_weights = _attend_backward(grad_out.contiguous(), *saved, ctx.eps)
        for_query = grad_weights[:, : ctx.heads].sum((0, 1))
        for_key = grad_weights[:, ctx.heads :].sum((0, 1))
        return grad_qkv, for_query.to(query_weight.dtype), for_key.to(key_weight.dtype), *(None,) * 7


def attend(
    qkv: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    documents: Documents,
    *,
    heads: int,
    eps: float,
) -> Tensor:
    """Return causal attention within documents, (B, T, H·D); normalizes and rotates queries and keys.

    Args:
        qkv: (B, T, (H + 2K)·D) bf16, concatenated queries, keys and values of each token.
        query_weight: (D,) of the norm of queries.
        key_weight: (D,) of the norm of keys.
        cos: (P, D/2) float32, of each position.
        sin: same shape.
        positions: (B, T) integers below P.
        documents: their boundaries.
        heads: H.
        eps: added to the mean square of a head.
    """
    out = _Attend.apply(
        qkv.contiguous(), query_weight, key_weight, cos, sin, positions.contiguous(), *documents, heads, eps
    )
    return out.flatten(2)


@triton_op("minimind::swiglu", mutates_args={})
def _swiglu(gate_up: Tensor) -> Tensor:
    from . import block as kernels

    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    inner = gate_up.new_empty(rows, columns)
    wrap_triton(kernels.swiglu_forward)[(-(-rows // 4), -(-columns // 512))](
        gate_up, inner, rows, columns, ROWS=4, BLOCK=512, num_warps=4
    )
    return inner


@triton_op("minimind::swiglu_backward", mutates_args={})
def _swiglu_backward(grad_inner: Tensor, gate_up: Tensor, recompute: bool) -> tuple[Tensor, Tensor]:
    from . import block as kernels

    rows, columns = grad_inner.shape
    grad_gate_up = torch.empty_like(gate_up)
    inner = torch.empty_like(grad_inner) if recompute else grad_inner.new_empty(0)
    wrap_triton(kernels.swiglu_backward)[(-(-rows // 4), -(-columns // 512))](
        grad_inner, gate_up, grad_gate_up, inner, rows, columns,
        RECOMPUTE=recompute, ROWS=4, BLOCK=512, num_warps=4,
    )  # fmt: skip
    return grad_gate_up, inner


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _swiglu(gate_up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return _swiglu_backward(grad.contiguous(), gate_up, False)[0]


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate)·up, (N, F), of (N, 2F) bf16 with the gate half first."""
    return _SwiGLU.apply(gate_up)


class _SwiGLUDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, weight)
        return _swiglu(gate_up) @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate_up, weight = ctx.saved_tensors
        grad_gate_up, inner = _swiglu_backward(grad @ weight, gate_up, True)
        return grad_gate_up, grad.T @ inner


def swiglu_down(gate_up: Tensor, weight: Tensor) -> Tensor:
    """Return (silu(gate)·up) @ weight.T, (..., C), saving only `gate_up` for the backward pass.

    Args:
        gate_up: (..., 2F) bf16, gate half first.
        weight: (C, F) of the down projection, in any dtype.
    """
    flat = gate_up.flatten(0, -2)
    # The input already has the autocast dtype.
    with torch.autocast(gate_up.device.type, enabled=False):
        return _SwiGLUDown.apply(flat, weight.to(flat.dtype)).unflatten(0, gate_up.shape[:-1])


@triton_op("minimind::cross_entropy_", mutates_args={"logits"})
def cross_entropy_(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """Return the cross-entropy of each row, (N,) float32, and replace the logits by their gradient.

    Args:
        logits: (N, V) bf16.
        targets: (N,) int64.
        ignored: target without loss and gradient.
    """
    from . import block as kernels

    rows, columns = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    # Up to this length a row fits the registers of a program; a longer one is read twice, block by block.
    block = _power_of_two(columns) if columns <= 8192 else 4096
    wrap_triton(kernels.cross_entropy)[(rows,)](
        logits, targets, losses, IGNORED=ignored, COLUMNS=columns, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return losses
