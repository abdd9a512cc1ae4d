"""Triton kernels of one decoding step, for CUDA GPUs.

A step of a small batch is bound by the number of kernels and by the bytes of the weights: these kernels do
what follows or precedes a product along with it. They read and write the dtype of the weights and compute in
float32. Importing this file needs Triton.

Shapes: B batch, C inputs, N outputs, H query heads, K kv heads, D head dim, S slots of the cache, P splits.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Below every score; finite, since -∞ - -∞ is NaN.
_LOWEST: tl.constexpr = tl.constexpr(-1e30)


@triton.jit
def linear(
    x, weight, norm_weight, residual, out, outputs,
    EPS: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr,
    COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write f(x)·Wᵀ, (B, N), of (B, C) and (N, C); one program per OUTPUTS outputs of a sequence.

    NORM: f is the RMS norm, else the identity. GATED: W is (2N, C), and silu of the first half of the product
    times the second is written. ADD: `residual`, (B, N), is added.
    """
    row = tl.program_id(1).to(tl.int64)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    valid = output < outputs
    total = tl.zeros((OUTPUTS, BLOCK), tl.float32)
    total_up = tl.zeros((OUTPUTS, BLOCK), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    # Unrolled, so that all loads are issued before the first one has arrived.
    for start in tl.static_range(0, COLUMNS, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < COLUMNS
        tile = valid[:, None] & inside[None, :]
        value = tl.load(x + row * COLUMNS + at, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            squares += value * value
            value *= tl.load(norm_weight + at, mask=inside, other=0.0).to(tl.float32)
        here = weight + output[:, None] * COLUMNS + at[None, :]
        total += tl.load(here, mask=tile, other=0.0).to(tl.float32) * value[None, :]
        if GATED:
            up = tl.load(here + outputs * COLUMNS, mask=tile, other=0.0)
            total_up += up.to(tl.float32) * value[None, :]
    scale = 1.0
    if NORM:
        # The factor of the norm is the same for all inputs, so it is applied to the product.
        scale = 1.0 / tl.sqrt_rn(tl.sum(squares, 0) / COLUMNS + EPS)
    result = tl.sum(total, 1) * scale
    if GATED:
        result = result * tl.sigmoid(result) * (tl.sum(total_up, 1) * scale)
    if ADD:
        result += tl.load(residual + row * outputs + output, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + row * outputs + output, result.to(out.dtype.element_ty), mask=valid)


@triton.jit
def _norm_rotate(head, weight, cos, sin, EPS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Return the head at a pointer, (BLOCK,) float32, normalized and rotated by those at `cos` and `sin`."""
    HALF: tl.constexpr = DIM // 2
    at = tl.arange(0, BLOCK)
    inside = at < DIM
    # Pairs are (i, i + D/2).
    other = (at + HALF) % DIM
    first = tl.load(head + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(head + other, mask=inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(first * first, 0) / DIM + EPS)
    first *= inverse * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    second *= inverse * tl.load(weight + other, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + at % HALF, mask=inside, other=0.0)
    s = tl.load(sin + at % HALF, mask=inside, other=0.0)
    return first * c + second * tl.where(at < HALF, -s, s)


@triton.jit
def attend(
    qkv, query_weight, key_weight, cos, sin, keys, values, slot, padding, out, peaks, sums,
    capacity, positions,
    SCALE: tl.constexpr, EPS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Append a token of each sequence to the cache and write its attention, a program per head and split.

    Queries and keys of (B, (H + 2K)·D) are normalized and rotated. Key and value are stored at `slot`, (1,)
    int64, of (B, K, S, D). Attended are the slots from `padding`, (B,) int64, to `slot`: the number that the
    loop reads is that of the tokens, whatever the capacity.

    SCALE is the scale of the scores times log2(e). With one split `out` is (B, H, D); else it is (B, P, H, D)
    float32 with `peaks` and `sums`, (B, P, H), which `combine` reads.
    """
    head = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kv_head = head // GROUP
    last = tl.load(slot)
    begin = tl.load(padding + batch)
    # Beyond the positions only sequences that have ended continue.
    position = tl.minimum(last - begin, positions - 1) * (DIM // 2)
    qkv += batch * (HEADS + 2 * KV_HEADS) * DIM
    q = _norm_rotate(qkv + head * DIM, query_weight, cos + position, sin + position, EPS, DIM, BLOCK) * SCALE
    new_key = qkv + (HEADS + kv_head) * DIM
    k = _norm_rotate(new_key, key_weight, cos + position, sin + position, EPS, DIM, BLOCK)
    k = k.to(keys.dtype.element_ty)
    at = tl.arange(0, BLOCK)
    column = at < DIM
    v = tl.load(new_key + KV_HEADS * DIM + at, mask=column, other=0.0)
    cached = (batch * KV_HEADS + kv_head) * capacity * DIM
    keys += cached
    values += cached
    first = split == 0
    # The programs of other heads do not read this slot.
    writes = column & first & (head % GROUP == 0)
    tl.store(keys + last * DIM + at, k, mask=writes)
    tl.store(values + last * DIM + at, v, mask=writes)
    # Each lane has a softmax of its keys, so that nothing is summed over lanes in the loop. A lane without
    # keys has weight 0 in the end. The new token is the first key of the first lane.
    lane = tl.arange(0, KEYS)
    fresh = (lane == 0) & first
    running_max = tl.where(fresh, tl.sum(q * k.to(tl.float32), 0), _LOWEST)
    total = tl.where(fresh, 1.0, 0.0)
    result = tl.where(fresh[:, None], v.to(tl.float32)[None, :], 0.0)
    each = (last - begin + SPLITS - 1) // SPLITS
    begin += split * each
    end = tl.minimum(begin + each, last)
    for start in tl.range(begin, end, KEYS, num_stages=3):
        visible = start + lane < end
        tile = visible[:, None] & column[None, :]
        here = (start + lane)[:, None] * DIM + at[None, :]
        cached_keys = tl.load(keys + here, mask=tile, other=0.0).to(tl.float32)
        cached_values = tl.load(values + here, mask=tile, other=0.0).to(tl.float32)
        scores = tl.where(visible, tl.sum(q[None, :] * cached_keys, 1), _LOWEST)
        new_max = tl.maximum(running_max, scores)
        weights = tl.where(visible, tl.exp2(scores - new_max), 0.0)
        rescale = tl.exp2(running_max - new_max)
        total = total * rescale + weights
        result = result * rescale[:, None] + weights[:, None] * cached_values
        running_max = new_max
    peak = tl.max(running_max, 0)
    rescale = tl.exp2(running_max - peak)
    total = tl.sum(total * rescale, 0)
    result = tl.sum(result * rescale[:, None], 0)
    if SPLITS == 1:
        result = (result / total).to(out.dtype.element_ty)
        tl.store(out + (batch * HEADS + head) * DIM + at, result, mask=column)
    else:
        part = (batch * SPLITS + split) * HEADS + head
        tl.store(out + part * DIM + at, result, mask=column)
        tl.store(peaks + part, peak)
        tl.store(sums + part, total)


@triton.jit
def combine(
    parts, peaks, sums, out,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Write the attention over all splits, (B, H, D); see `attend`. One program per head."""
    head = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    at = tl.arange(0, BLOCK)
    part = (batch * SPLITS + tl.arange(0, SPLITS)) * HEADS + head
    peak = tl.load(peaks + part)
    # Finite: the first split holds the new token.
    rescale = tl.exp2(peak - tl.max(peak, 0))
    total = tl.sum(tl.load(sums + part) * rescale, 0)
    here = parts + part[:, None] * DIM + at[None, :]
    value = tl.load(here, mask=(at < DIM)[None, :], other=0.0) * rescale[:, None]
    result = (tl.sum(value, 0) / total).to(out.dtype.element_ty)
    tl.store(out + (batch * HEADS + head) * DIM + at, result, mask=at < DIM)


@triton.jit
def sample(
    logits, seen, uniform, number, slot, tokens, history, temperature, penalty, min_p,
    GREEDY: tl.constexpr, PENALIZE: tl.constexpr, TOP_K: tl.constexpr, VOCABULARY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Choose the next token of (B, V) float32 logits as `sampling.choose` does, and record it.

    One program per sequence. `number`, (B,) int64, counts the steps; the random number is in that row of
    `uniform`, (steps, B), and the token is written to that row of `history` and to `tokens`, (B,) int64.
    `seen` is (B, V) uint8, used where PENALIZE. TOP_K is 0 for all tokens. 1 is added to `slot`, (1,) int64.
    """
    row = tl.program_id(0)
    # Loaded before the reductions, which synchronize the threads, and stored after them.
    count = tl.load(number + row)
    last = tl.load(slot)
    step = count * tl.num_programs(0) + row
    at = tl.arange(0, BLOCK)
    inside = at < VOCABULARY
    value = tl.load(logits + row * VOCABULARY + at, mask=inside, other=float("-inf"))
    if PENALIZE:
        known = tl.load(seen + row * VOCABULARY + at, mask=inside, other=0) != 0
        value = tl.where(known, tl.where(value < 0, value * penalty, value / penalty), value)
    likeliest = tl.argmax(value, 0)
    token = likeliest
    if not GREEDY:
        value = value / temperature
        if TOP_K > 0:
            # Integers in the order of the numbers. The K-th largest is found bit by bit: the largest integer
            # that K integers reach.
            bits = value.to(tl.int32, bitcast=True)
            key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
            smallest = tl.full((), -(2**31), tl.int64)
            for bit in tl.static_range(31, -1, -1):
                larger = smallest + (1 << bit)
                reached = tl.sum((key >= larger.to(tl.int32)).to(tl.int32), 0)
                smallest = tl.where(reached >= TOP_K, larger, smallest)
            kept = key >= smallest.to(tl.int32)
            value = tl.where(value < tl.min(tl.where(kept, value, float("inf")), 0), float("-inf"), value)
        share = tl.exp(value - tl.max(value, 0))
        share = tl.where(share < min_p, 0.0, share)
        sums = tl.cumsum(share, 0)
        target = tl.load(uniform + step) * tl.max(sums, 0)
        token = tl.min(tl.where((sums > target) & (share > 0), at, BLOCK), 0)
        # None, where rounding made the sums too small.
        token = tl.where(token == BLOCK, likeliest, token)
    tl.store(tokens + row, token)
    tl.store(history + step, token)
    tl.store(number + row, count + 1)
    if PENALIZE:
        tl.store(seen + row * VOCABULARY + token, 1)
    if row == 0:
        tl.store(slot, last + 1)
