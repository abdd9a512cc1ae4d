"""Triton kernels of causal attention with a document mask, forward and backward, for CUDA GPUs.

FlashAttention-2 (Dao 2023, arXiv 2307.08691) for packed sequences: a query attends to the keys from the first
token of its document to itself, so a block of queries loops over a contiguous range of keys.

Shapes: B sequences, T tokens, H query heads, K kv heads, D head dim. Queries are (B, T, H, D) and keys
(B, T, K, D), both contiguous. Values are read from the output of the projection, last in
(B, T, (H + 2K)·D). D is split into a power of two, WIDE, and a remainder padded to a power of two, REST, so
that a head of 96 costs 96 instead of 128.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(base, stride, tokens, length, COLUMNS: tl.constexpr, START: tl.constexpr, DIM: tl.constexpr):
    """Load columns START to START + COLUMNS of the rows `tokens`; zero outside of the tensor."""
    at = START + tl.arange(0, COLUMNS)
    inside = (tokens < length)[:, None]
    if START + COLUMNS > DIM:
        inside = inside & (at < DIM)[None, :]
    return tl.load(base + tokens[:, None] * stride + at[None, :], mask=inside, other=0.0)


@triton.jit
def _store(base, stride, tokens, length, tile, COLUMNS: tl.constexpr, START: tl.constexpr, DIM: tl.constexpr):
    """Store a tile where `_tile` loads it."""
    at = START + tl.arange(0, COLUMNS)
    inside = (tokens < length)[:, None] & (at < DIM)[None, :]
    tl.store(base + tokens[:, None] * stride + at[None, :], tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def attention_forward(
    query, key, qkv, starts, out, log_sums, length,
    SCALE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    WIDE: tl.constexpr, REST: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Write softmax(q·kᵀ·scale)·v, (B, T, H, D), and the base-2 logarithm of each softmax sum, (B, H, T).

    SCALE is the scale of the scores times log2(e). `starts`, (B, T), is where each token's document begins.
    """
    # The last queries attend to the most keys, so they start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    WIDTH: tl.constexpr = HEADS + 2 * KV_HEADS
    batch = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    tokens = block * QUERIES + tl.arange(0, QUERIES)
    query += (batch * length * HEADS + head) * DIM
    out += (batch * length * HEADS + head) * DIM
    key += (batch * length * KV_HEADS + head // (HEADS // KV_HEADS)) * DIM
    value = qkv + (batch * length * WIDTH + HEADS + KV_HEADS + head // (HEADS // KV_HEADS)) * DIM
    starts += batch * length
    q = _tile(query, HEADS * DIM, tokens, length, WIDE, 0, DIM)
    result = tl.zeros((QUERIES, WIDE), tl.float32)
    if REST > 0:
        q_rest = _tile(query, HEADS * DIM, tokens, length, REST, WIDE, DIM)
        result_rest = tl.zeros((QUERIES, REST), tl.float32)
    first = tl.load(starts + tokens, mask=tokens < length, other=0)
    running_max = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    first_key = tl.load(starts + block * QUERIES) // KEYS * KEYS
    for column in range(first_key, tl.minimum((block + 1) * QUERIES, length), KEYS):
        keys = column + tl.arange(0, KEYS)
        k = _tile(key, KV_HEADS * DIM, keys, length, WIDE, 0, DIM)
        scores = tl.dot(q, tl.trans(k))
        if REST > 0:
            k_rest = _tile(key, KV_HEADS * DIM, keys, length, REST, WIDE, DIM)
            scores = tl.dot(q_rest, tl.trans(k_rest), scores)
        visible = (keys[None, :] <= tokens[:, None]) & (keys[None, :] >= first[:, None])
        scores = tl.where(visible, scores * SCALE, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        # All keys of a block may be masked for a query; -inf - -inf would be NaN.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - shift[:, None])
        rescale = tl.exp2(running_max - shift)
        total = total * rescale + tl.sum(weights, 1)
        running_max = new_max
        weights = weights.to(key.dtype.element_ty)
        v = _tile(value, WIDTH * DIM, keys, length, WIDE, 0, DIM)
        result = tl.dot(weights, v, result * rescale[:, None])
        if REST > 0:
            v_rest = _tile(value, WIDTH * DIM, keys, length, REST, WIDE, DIM)
            result_rest = tl.dot(weights, v_rest, result_rest * rescale[:, None])
    _store(out, HEADS * DIM, tokens, length, result / total[:, None], WIDE, 0, DIM)
    if REST > 0:
        _store(out, HEADS * DIM, tokens, length, result_rest / total[:, None], REST, WIDE, DIM)
    tl.store(
        log_sums + tl.program_id(1) * length + tokens, running_max + tl.log2(total), mask=tokens < length
    )


@triton.jit
def attention_backward_queries(
    query, key, qkv, starts, out, log_sums, grad_out, grad_query, deltas, length,
    SCALE: tl.constexpr, FACTOR: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    WIDE: tl.constexpr, REST: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the queries, and Σ out·grad_out of each query, (B, H, T), for the next kernel.

    FACTOR is the scale of the scores.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    WIDTH: tl.constexpr = HEADS + 2 * KV_HEADS
    batch = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    tokens = block * QUERIES + tl.arange(0, QUERIES)
    offset = (batch * length * HEADS + head) * DIM
    query += offset
    out += offset
    grad_out += offset
    grad_query += offset
    key += (batch * length * KV_HEADS + head // (HEADS // KV_HEADS)) * DIM
    value = qkv + (batch * length * WIDTH + HEADS + KV_HEADS + head // (HEADS // KV_HEADS)) * DIM
    starts += batch * length
    log_sums += tl.program_id(1) * length
    deltas += tl.program_id(1) * length
    valid = tokens < length
    q = _tile(query, HEADS * DIM, tokens, length, WIDE, 0, DIM)
    g = _tile(grad_out, HEADS * DIM, tokens, length, WIDE, 0, DIM)
    o = _tile(out, HEADS * DIM, tokens, length, WIDE, 0, DIM)
    delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    result = tl.zeros((QUERIES, WIDE), tl.float32)
    if REST > 0:
        q_rest = _tile(query, HEADS * DIM, tokens, length, REST, WIDE, DIM)
        g_rest = _tile(grad_out, HEADS * DIM, tokens, length, REST, WIDE, DIM)
        o_rest = _tile(out, HEADS * DIM, tokens, length, REST, WIDE, DIM)
        delta += tl.sum(o_rest.to(tl.float32) * g_rest.to(tl.float32), 1)
        result_rest = tl.zeros((QUERIES, REST), tl.float32)
    tl.store(deltas + tokens, delta, mask=valid)
    log_sum = tl.load(log_sums + tokens, mask=valid, other=0.0)
    first = tl.load(starts + tokens, mask=valid, other=0)
    first_key = tl.load(starts + block * QUERIES) // KEYS * KEYS
    for column in range(first_key, tl.minimum((block + 1) * QUERIES, length), KEYS):
        keys = column + tl.arange(0, KEYS)
        k = _tile(key, KV_HEADS * DIM, keys, length, WIDE, 0, DIM)
        v = _tile(value, WIDTH * DIM, keys, length, WIDE, 0, DIM)
        scores = tl.dot(q, tl.trans(k))
        grads = tl.dot(g, tl.trans(v))
        if REST > 0:
            k_rest = _tile(key, KV_HEADS * DIM, keys, length, REST, WIDE, DIM)
            v_rest = _tile(value, WIDTH * DIM, keys, length, REST, WIDE, DIM)
            scores = tl.dot(q_rest, tl.trans(k_rest), scores)
            grads = tl.dot(g_rest, tl.trans(v_rest), grads)
        visible = (keys[None, :] <= tokens[:, None]) & (keys[None, :] >= first[:, None])
        weights = tl.where(visible, tl.exp2(scores * SCALE - log_sum[:, None]), 0.0)
        grads = (weights * (grads - delta[:, None])).to(key.dtype.element_ty)
        result = tl.dot(grads, k, result)
        if REST > 0:
            result_rest = tl.dot(grads, k_rest, result_rest)
    _store(grad_query, HEADS * DIM, tokens, length, result * FACTOR, WIDE, 0, DIM)
    if REST > 0:
        _store(grad_query, HEADS * DIM, tokens, length, result_rest * FACTOR, REST, WIDE, DIM)


@triton.jit
def attention_backward_keys(
    query, key, qkv, starts, ends, log_sums, deltas, grad_out, grad_key, grad_qkv, length,
    SCALE: tl.constexpr, FACTOR: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    WIDE: tl.constexpr, REST: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of keys, and of values into their columns of `grad_qkv`.

    Both are summed over the query heads of their group. `ends`, (B, T), is one past the last query that
    attends to each key.
    """
    block = tl.program_id(0)
    WIDTH: tl.constexpr = HEADS + 2 * KV_HEADS
    batch = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    kv_head = tl.program_id(1) % KV_HEADS
    keys = block * KEYS + tl.arange(0, KEYS)
    offset = (batch * length * KV_HEADS + kv_head) * DIM
    value_offset = (batch * length * WIDTH + HEADS + KV_HEADS + kv_head) * DIM
    k = _tile(key + offset, KV_HEADS * DIM, keys, length, WIDE, 0, DIM)
    v = _tile(qkv + value_offset, WIDTH * DIM, keys, length, WIDE, 0, DIM)
    result_key = tl.zeros((KEYS, WIDE), tl.float32)
    result_value = tl.zeros((KEYS, WIDE), tl.float32)
    if REST > 0:
        k_rest = _tile(key + offset, KV_HEADS * DIM, keys, length, REST, WIDE, DIM)
        v_rest = _tile(qkv + value_offset, WIDTH * DIM, keys, length, REST, WIDE, DIM)
        result_key_rest = tl.zeros((KEYS, REST), tl.float32)
        result_value_rest = tl.zeros((KEYS, REST), tl.float32)
    starts += batch * length
    last_query = tl.load(ends + batch * length + tl.minimum((block + 1) * KEYS, length) - 1)
    for group_member in range(HEADS // KV_HEADS):
        head = kv_head * (HEADS // KV_HEADS) + group_member
        queries = query + (batch * length * HEADS + head) * DIM
        grads_out = grad_out + (batch * length * HEADS + head) * DIM
        row = (batch * HEADS + head) * length
        for column in range(block * KEYS // QUERIES * QUERIES, last_query, QUERIES):
            tokens = column + tl.arange(0, QUERIES)
            valid = tokens < length
            q = _tile(queries, HEADS * DIM, tokens, length, WIDE, 0, DIM)
            g = _tile(grads_out, HEADS * DIM, tokens, length, WIDE, 0, DIM)
            log_sum = tl.load(log_sums + row + tokens, mask=valid, other=0.0)
            delta = tl.load(deltas + row + tokens, mask=valid, other=0.0)
            first = tl.load(starts + tokens, mask=valid, other=length)
            scores = tl.dot(k, tl.trans(q))
            if REST > 0:
                q_rest = _tile(queries, HEADS * DIM, tokens, length, REST, WIDE, DIM)
                g_rest = _tile(grads_out, HEADS * DIM, tokens, length, REST, WIDE, DIM)
                scores = tl.dot(k_rest, tl.trans(q_rest), scores)
            visible = (keys[:, None] <= tokens[None, :]) & (keys[:, None] >= first[None, :])
            weights = tl.where(visible, tl.exp2(scores * SCALE - log_sum[None, :]), 0.0)
            low_precision = weights.to(key.dtype.element_ty)
            result_value = tl.dot(low_precision, g, result_value)
            grads = tl.dot(v, tl.trans(g))
            if REST > 0:
                result_value_rest = tl.dot(low_precision, g_rest, result_value_rest)
                grads = tl.dot(v_rest, tl.trans(g_rest), grads)
            grads = (weights * (grads - delta[None, :])).to(key.dtype.element_ty)
            result_key = tl.dot(grads, q, result_key)
            if REST > 0:
                result_key_rest = tl.dot(grads, q_rest, result_key_rest)
    _store(grad_key + offset, KV_HEADS * DIM, keys, length, result_key * FACTOR, WIDE, 0, DIM)
    _store(grad_qkv + value_offset, WIDTH * DIM, keys, length, result_value, WIDE, 0, DIM)
    if REST > 0:
        _store(grad_key + offset, KV_HEADS * DIM, keys, length, result_key_rest * FACTOR, REST, WIDE, DIM)
        _store(grad_qkv + value_offset, WIDTH * DIM, keys, length, result_value_rest, REST, WIDE, DIM)
