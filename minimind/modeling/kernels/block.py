"""Triton kernels of norm, rotary embedding, SwiGLU and cross-entropy for CUDA GPUs.

Each needs fewer memory accesses than the code that inductor generates.

Shapes: N tokens, C hidden, H query heads, K kv heads, D head dim, F inner, V vocabulary, P programs.

They read and write bf16 and compute in float32; `autograd.py` wraps them for autograd. Importing this file
needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Replaces a norm weight of exactly 0: negligible, but the normed input can still be recovered from the output
# by division.
_TINY: tl.constexpr = tl.constexpr(2.0**-100)


@triton.jit
def _weight_of_norm(weight, at, inside):
    scale = tl.load(weight + at, mask=inside, other=1.0).to(tl.float32)
    return tl.where(scale == 0.0, _TINY, scale)


@triton.jit
def add_norm_forward(
    x, added, weight, total, normed, rstd, columns,
    EPS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write x + added, its RMS norm, and 1/rms; one program per token. Without ADD the sum is x."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    value = tl.load(x + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(added + row * columns + at, mask=inside, other=0.0).to(tl.float32)
        value = value.to(total.dtype.element_ty)
        tl.store(total + row * columns + at, value, mask=inside)
        value = value.to(tl.float32)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(value * value, 0) / columns + EPS)
    scale = _weight_of_norm(weight, at, inside)
    tl.store(normed + row * columns + at, (value * inverse * scale).to(normed.dtype.element_ty), mask=inside)
    tl.store(rstd + row, inverse)


@triton.jit
def add_norm_backward(
    grad_normed, grad_total, normed, weight, rstd, grad, grad_weight, rows, columns,
    ROWS_EACH: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of each summand, and one row of (P, C) for the weight.

    The normed input is recomputed from the output as normed / weight, instead of being stored.
    """
    program = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    scale = _weight_of_norm(weight, at, at < columns)
    unscale = 1.0 / scale
    total = tl.zeros((BLOCK,), tl.float32)
    for index in range(ROWS_EACH):
        row = program * ROWS_EACH + index
        here = row * columns + at
        inside = (at < columns) & (row < rows)
        slope = tl.load(grad_normed + here, mask=inside, other=0.0).to(tl.float32)
        unit = tl.load(normed + here, mask=inside, other=0.0).to(tl.float32) * unscale
        total += slope * unit
        slope *= scale
        slope = tl.load(rstd + row, mask=row < rows, other=0.0) * (
            slope - unit * (tl.sum(slope * unit, 0) / columns)
        )
        if ADD:
            slope += tl.load(grad_total + here, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad + here, slope.to(grad.dtype.element_ty), mask=inside)
    tl.store(grad_weight + program * columns + at, total, mask=at < columns)


@triton.jit
def head_norm_rotate_forward(
    qkv, query_weight, key_weight, cos, sin, positions, query, key, tokens,
    EPS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalize and rotate the queries and keys of (N, (H + 2K)·D) into (N, H, D) and (N, K, D)."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    at = tl.arange(0, BLOCK)
    valid, column = token < tokens, at < HALF
    inside = valid[:, None] & column[None, :]
    offset = tl.load(positions + token, mask=valid, other=0).to(tl.int64)[:, None] * HALF + at[None, :]
    c, s = tl.load(cos + offset, mask=inside, other=0.0), tl.load(sin + offset, mask=inside, other=0.0)
    source = qkv + token[:, None] * ((HEADS + 2 * KV_HEADS) * 2 * HALF) + at[None, :]
    query += token[:, None] * (HEADS * 2 * HALF) + at[None, :]
    key += token[:, None] * (KV_HEADS * 2 * HALF) + at[None, :]
    for head in tl.static_range(HEADS + KV_HEADS):
        weight = query_weight if head < HEADS else key_weight
        target = query + head * 2 * HALF if head < HEADS else key + (head - HEADS) * 2 * HALF
        first = tl.load(source + head * 2 * HALF, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(source + head * 2 * HALF + HALF, mask=inside, other=0.0).to(tl.float32)
        square = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        inverse = (1.0 / tl.sqrt_rn(square / (2 * HALF) + EPS))[:, None]
        first *= inverse * tl.load(weight + at, mask=column, other=0.0).to(tl.float32)[None, :]
        second *= inverse * tl.load(weight + HALF + at, mask=column, other=0.0).to(tl.float32)[None, :]
        tl.store(target, (first * c - second * s).to(query.dtype.element_ty), mask=inside)
        tl.store(target + HALF, (second * c + first * s).to(query.dtype.element_ty), mask=inside)


@triton.jit
def head_norm_rotate_backward(
    grad_query, grad_key, qkv, query_weight, key_weight, cos, sin, positions,
    grad_qkv, grad_weight, tokens,
    EPS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr,
    TILES_EACH: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of queries and keys in (N, (H + 2K)·D), and (P, H + K, D) for the two weights.

    One head per program uses more of the memory bandwidth than all heads per program.
    """
    head = tl.program_id(0)
    program = tl.program_id(1).to(tl.int64)
    at = tl.arange(0, BLOCK)
    column = at < HALF
    if head < HEADS:
        weight = query_weight
        source = grad_query + head * 2 * HALF
        width = HEADS * 2 * HALF
    else:
        weight = key_weight
        source = grad_key + (head - HEADS) * 2 * HALF
        width = KV_HEADS * 2 * HALF
    scale = tl.load(weight + at, mask=column, other=0.0).to(tl.float32)[None, :]
    scale_second = tl.load(weight + HALF + at, mask=column, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    total_second = tl.zeros((TOKENS, BLOCK), tl.float32)
    for index in range(TILES_EACH):
        token = (program * TILES_EACH + index) * TOKENS + tl.arange(0, TOKENS)
        valid = token < tokens
        inside = valid[:, None] & column[None, :]
        offset = tl.load(positions + token, mask=valid, other=0).to(tl.int64)[:, None] * HALF + at[None, :]
        there = source + token[:, None] * width + at[None, :]
        here = (token[:, None] * (HEADS + 2 * KV_HEADS) + head) * 2 * HALF + at[None, :]
        rotated_first = tl.load(there, mask=inside, other=0.0).to(tl.float32)
        rotated_second = tl.load(there + HALF, mask=inside, other=0.0).to(tl.float32)
        first = tl.load(qkv + here, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(qkv + here + HALF, mask=inside, other=0.0).to(tl.float32)
        c, s = tl.load(cos + offset, mask=inside, other=0.0), tl.load(sin + offset, mask=inside, other=0.0)
        # Backward pass of the rotation, then of the norm.
        grad_first = rotated_first * c + rotated_second * s
        grad_second = rotated_second * c - rotated_first * s
        square = tl.sum(first * first + second * second, 1)
        inverse = (1.0 / tl.sqrt_rn(square / (2 * HALF) + EPS))[:, None]
        first *= inverse
        second *= inverse
        total += grad_first * first
        total_second += grad_second * second
        grad_first *= scale
        grad_second *= scale_second
        mean = (tl.sum(grad_first * first + grad_second * second, 1) / (2 * HALF))[:, None]
        grad_first = inverse * (grad_first - first * mean)
        grad_second = inverse * (grad_second - second * mean)
        tl.store(grad_qkv + here, grad_first.to(grad_qkv.dtype.element_ty), mask=inside)
        tl.store(grad_qkv + here + HALF, grad_second.to(grad_qkv.dtype.element_ty), mask=inside)
    sums = grad_weight + (program * (HEADS + KV_HEADS) + head) * 2 * HALF
    tl.store(sums + at, tl.sum(total, 0), mask=column)
    tl.store(sums + HALF + at, tl.sum(total_second, 0), mask=column)


@triton.jit
def swiglu_forward(gate_up, inner, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Write silu(gate)·up, (N, F), of (N, 2F) with the gate half first."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (at < columns)[None, :]
    source = gate_up + row[:, None] * (2 * columns) + at[None, :]
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + columns, mask=inside, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(inner + row[:, None] * columns + at[None, :], value.to(inner.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(
    grad_inner, gate_up, grad_gate_up, inner, rows, columns,
    RECOMPUTE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of (N, 2F), and with RECOMPUTE silu(gate)·up, which was not saved."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (at < columns)[None, :]
    pair = row[:, None] * (2 * columns) + at[None, :]
    single = row[:, None] * columns + at[None, :]
    gate = tl.load(gate_up + pair, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + pair + columns, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_inner + single, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    active = gate * sigmoid
    if RECOMPUTE:
        tl.store(inner + single, (active * up).to(inner.dtype.element_ty), mask=inside)
    slope = sigmoid + active * (1.0 - sigmoid)
    tl.store(grad_gate_up + pair, (grad * up * slope).to(grad_gate_up.dtype.element_ty), mask=inside)
    tl.store(grad_gate_up + pair + columns, (grad * active).to(grad_gate_up.dtype.element_ty), mask=inside)


@triton.jit
def cross_entropy(logits, targets, losses, IGNORED: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Write the cross-entropy of each row of (N, V) logits, and replace the logits by their gradient.

    Rows of at most BLOCK logits are read once.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    base = logits + row * COLUMNS
    if target == IGNORED:
        tl.store(losses + row, 0.0)
        for start in range(0, COLUMNS, BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(base + at, tl.zeros((BLOCK,), logits.dtype.element_ty), mask=at < COLUMNS)
    elif COLUMNS <= BLOCK:
        at = tl.arange(0, BLOCK)
        value = tl.load(base + at, mask=at < COLUMNS, other=float("-inf")).to(tl.float32)
        target_logit = tl.load(base + target).to(tl.float32)
        peak = tl.max(value, 0)
        value = tl.exp(value - peak)
        normalizer = tl.sum(value, 0)
        tl.store(losses + row, tl.log(normalizer) + peak - target_logit)
        grad = value * (1.0 / normalizer) - tl.where(at == target, 1.0, 0.0)
        tl.store(base + at, grad.to(logits.dtype.element_ty), mask=at < COLUMNS)
    else:
        target_logit = tl.load(base + target).to(tl.float32)
        running_max = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, COLUMNS, BLOCK):
            at = start + tl.arange(0, BLOCK)
            value = tl.load(base + at, mask=at < COLUMNS, other=float("-inf")).to(tl.float32)
            # Finite after the first block, which is full.
            new_max = tl.maximum(running_max, value)
            total = total * tl.exp(running_max - new_max) + tl.exp(value - new_max)
            running_max = new_max
        peak = tl.max(running_max, 0)
        normalizer = tl.sum(total * tl.exp(running_max - peak), 0)
        tl.store(losses + row, tl.log(normalizer) + peak - target_logit)
        for start in range(0, COLUMNS, BLOCK):
            at = start + tl.arange(0, BLOCK)
            value = tl.load(base + at, mask=at < COLUMNS, other=float("-inf")).to(tl.float32)
            grad = tl.exp(value - peak) * (1.0 / normalizer) - tl.where(at == target, 1.0, 0.0)
            tl.store(base + at, grad.to(logits.dtype.element_ty), mask=at < COLUMNS)
