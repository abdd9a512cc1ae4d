"""Triton kernels of causal attention within documents, forward and backward, for CUDA GPUs.

FlashAttention-2 (Dao 2023, arXiv 2307.08691), for documents that lie end to end in a row: a query sees the
keys from the first token of its document to itself, so a block of queries walks over a range of keys.

Shapes: B rows, T tokens, H query heads, K kv heads, D head dim. Queries are (B, T, H, D) and keys
(B, T, K, D), both contiguous. Values stay where the projection left them, last in (B, T, (H + 2K)·D). D is
cut into a power of two, WIDE, and what is left over, padded to a power of two, REST, so that a head of 96
costs 96 and not 128.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(base, stride, tokens, length, COLUMNS: tl.constexpr, START: tl.constexpr, DIM: tl.constexpr):
    """Load columns START to START + COLUMNS of the rows `tokens`; what is not there is zero."""
    at = START + tl.arange(0, COLUMNS)
    inside = (tokens < length)[:, None]
    if START + COLUMNS > DIM:
        inside = inside & (at < DIM)[None, :]
    return tl.load(base + tokens[:, None] * stride + at[None, :], mask=inside, other=0.0)


@triton.jit
def _put(base, stride, tokens, length, tile, COLUMNS: tl.constexpr, START: tl.constexpr, DIM: tl.constexpr):
    """Store what `_tile` would load."""
    at = START + tl.arange(0, COLUMNS)
    inside = (tokens < length)[:, None] & (at < DIM)[None, :]
    tl.store(base + tokens[:, None] * stride + at[None, :], tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def attention_forward(
    query, key, qkv, starts, out, log_sums, length,
    SCALE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    WIDE: tl.constexpr, REST: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Write softmax(q·kᵀ·scale)·v, (B, T, H, D), and the binary logarithm of each softmax's sum, (B, H, T).

    SCALE is that of the scores times log2(e). `starts`, (B, T), is the first token of each token's document.
    """
    # The last queries see the most keys, and begin first.
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
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    low = tl.load(starts + block * QUERIES) // KEYS * KEYS
    for column in range(low, tl.minimum((block + 1) * QUERIES, length), KEYS):
        keys = column + tl.arange(0, KEYS)
        k = _tile(key, KV_HEADS * DIM, keys, length, WIDE, 0, DIM)
        scores = tl.dot(q, tl.trans(k))
        if REST > 0:
            k_rest = _tile(key, KV_HEADS * DIM, keys, length, REST, WIDE, DIM)
            scores = tl.dot(q_rest, tl.trans(k_rest), scores)
        seen = (keys[None, :] <= tokens[:, None]) & (keys[None, :] >= first[:, None])
        scores = tl.where(seen, scores * SCALE, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # A query may see no key of an early block; -inf - -inf is no number.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(weights, 1)
        top = higher
        weights = weights.to(key.dtype.element_ty)
        v = _tile(value, WIDTH * DIM, keys, length, WIDE, 0, DIM)
        result = tl.dot(weights, v, result * shrink[:, None])
        if REST > 0:
            v_rest = _tile(value, WIDTH * DIM, keys, length, REST, WIDE, DIM)
            result_rest = tl.dot(weights, v_rest, result_rest * shrink[:, None])
    _put(out, HEADS * DIM, tokens, length, result / total[:, None], WIDE, 0, DIM)
    if REST > 0:
        _put(out, HEADS * DIM, tokens, length, result_rest / total[:, None], REST, WIDE, DIM)
    tl.store(log_sums + tl.program_id(1) * length + tokens, top + tl.log2(total), mask=tokens < length)


@triton.jit
def attention_backward_queries(
    query, key, qkv, starts, out, log_sums, grad_out, grad_query, deltas, length,
    SCALE: tl.constexpr, FACTOR: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    WIDE: tl.constexpr, REST: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the queries, and Σ out·grad_out of each query, (B, H, T), for the keys' kernel.

    FACTOR is the scale of the scores alone.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    WIDTH: tl.constexpr = HEADS + 2 * KV_HEADS
    batch = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    tokens = block * QUERIES + tl.arange(0, QUERIES)
    place = (batch * length * HEADS + head) * DIM
    query += place
    out += place
    grad_out += place
    grad_query += place
    key += (batch * length * KV_HEADS + head // (HEADS // KV_HEADS)) * DIM
    value = qkv + (batch * length * WIDTH + HEADS + KV_HEADS + head // (HEADS // KV_HEADS)) * DIM
    starts += batch * length
    log_sums += tl.program_id(1) * length
    deltas += tl.program_id(1) * length
    known = tokens < length
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
    tl.store(deltas + tokens, delta, mask=known)
    log_sum = tl.load(log_sums + tokens, mask=known, other=0.0)
    first = tl.load(starts + tokens, mask=known, other=0)
    low = tl.load(starts + block * QUERIES) // KEYS * KEYS
    for column in range(low, tl.minimum((block + 1) * QUERIES, length), KEYS):
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
        seen = (keys[None, :] <= tokens[:, None]) & (keys[None, :] >= first[:, None])
        weights = tl.where(seen, tl.exp2(scores * SCALE - log_sum[:, None]), 0.0)
        grads = (weights * (grads - delta[:, None])).to(key.dtype.element_ty)
        result = tl.dot(grads, k, result)
        if REST > 0:
            result_rest = tl.dot(grads, k_rest, result_rest)
    _put(grad_query, HEADS * DIM, tokens, length, result * FACTOR, WIDE, 0, DIM)
    if REST > 0:
        _put(grad_query, HEADS * DIM, tokens, length, result_rest * FACTOR, REST, WIDE, DIM)


@triton.jit
def attention_backward_keys(
    query, key, qkv, starts, ends, log_sums, deltas, grad_out, grad_key, grad_qkv, length,
    SCALE: tl.constexpr, FACTOR: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    WIDE: tl.constexpr, REST: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of keys, and of values in their place of `grad_qkv`.

    Both are summed over the query heads that they serve. `ends`, (B, T), is one past the last query that
    sees each key.
    """
    block = tl.program_id(0)
    WIDTH: tl.constexpr = HEADS + 2 * KV_HEADS
    batch = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    kv_head = tl.program_id(1) % KV_HEADS
    keys = block * KEYS + tl.arange(0, KEYS)
    place = (batch * length * KV_HEADS + kv_head) * DIM
    value_place = (batch * length * WIDTH + HEADS + KV_HEADS + kv_head) * DIM
    k = _tile(key + place, KV_HEADS * DIM, keys, length, WIDE, 0, DIM)
    v = _tile(qkv + value_place, WIDTH * DIM, keys, length, WIDE, 0, DIM)
    result_key = tl.zeros((KEYS, WIDE), tl.float32)
    result_value = tl.zeros((KEYS, WIDE), tl.float32)
    if REST > 0:
        k_rest = _tile(key + place, KV_HEADS * DIM, keys, length, REST, WIDE, DIM)
        v_rest = _tile(qkv + value_place, WIDTH * DIM, keys, length, REST, WIDE, DIM)
        result_key_rest = tl.zeros((KEYS, REST), tl.float32)
        result_value_rest = tl.zeros((KEYS, REST), tl.float32)
    starts += batch * length
    high = tl.load(ends + batch * length + tl.minimum((block + 1) * KEYS, length) - 1)
    for member in range(HEADS // KV_HEADS):
        head = kv_head * (HEADS // KV_HEADS) + member
        queries = query + (batch * length * HEADS + head) * DIM
        grads_out = grad_out + (batch * length * HEADS + head) * DIM
        row = (batch * HEADS + head) * length
        for column in range(block * KEYS // QUERIES * QUERIES, high, QUERIES):
            tokens = column + tl.arange(0, QUERIES)
            known = tokens < length
            q = _tile(queries, HEADS * DIM, tokens, length, WIDE, 0, DIM)
            g = _tile(grads_out, HEADS * DIM, tokens, length, WIDE, 0, DIM)
            log_sum = tl.load(log_sums + row + tokens, mask=known, other=0.0)
            delta = tl.load(deltas + row + tokens, mask=known, other=0.0)
            first = tl.load(starts + tokens, mask=known, other=length)
            scores = tl.dot(k, tl.trans(q))
            if REST > 0:
                q_rest = _tile(queries, HEADS * DIM, tokens, length, REST, WIDE, DIM)
                g_rest = _tile(grads_out, HEADS * DIM, tokens, length, REST, WIDE, DIM)
                scores = tl.dot(k_rest, tl.trans(q_rest), scores)
            seen = (keys[:, None] <= tokens[None, :]) & (keys[:, None] >= first[None, :])
            weights = tl.where(seen, tl.exp2(scores * SCALE - log_sum[None, :]), 0.0)
            half = weights.to(key.dtype.element_ty)
            result_value = tl.dot(half, g, result_value)
            grads = tl.dot(v, tl.trans(g))
            if REST > 0:
                result_value_rest = tl.dot(half, g_rest, result_value_rest)
                grads = tl.dot(v_rest, tl.trans(g_rest), grads)
            grads = (weights * (grads - delta[None, :])).to(key.dtype.element_ty)
            result_key = tl.dot(grads, q, result_key)
            if REST > 0:
                result_key_rest = tl.dot(grads, q_rest, result_key_rest)
    _put(grad_key + place, KV_HEADS * DIM, keys, length, result_key * FACTOR, WIDE, 0, DIM)
    _put(grad_qkv + value_place, WIDTH * DIM, keys, length, result_value, WIDE, 0, DIM)
    if REST > 0:
        _put(grad_key + place, KV_HEADS * DIM, keys, length, result_key_rest * FACTOR, REST, WIDE, DIM)
        _put(grad_qkv + value_place, WIDTH * DIM, keys, length, result_value_rest, REST, WIDE, DIM)
