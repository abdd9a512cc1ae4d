"""Attention against a float64 softmax, with and without documents."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from minimind.modeling.attention import RMSNorm, attend, cached_mask, document_block_mask, document_mask


def heads(length: int, *, query_heads: int = 4, kv_heads: int = 2, width: int = 16, keys: int | None = None):
    rng = torch.Generator().manual_seed(length)
    shapes = (query_heads, length), (kv_heads, keys or length), (kv_heads, keys or length)
    return tuple(torch.randn(2, *shape, width, generator=rng) for shape in shapes)


def reference(q, k, v, allowed):
    """Float64 attention, one head at a time; `allowed` is (B, T, S)."""
    out = torch.empty(q.shape, dtype=torch.float64)
    for head in range(q.shape[1]):
        shared = head * k.shape[1] // q.shape[1]
        scores = q[:, head].double() @ k[:, shared].double().mT / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~allowed, -torch.inf)
        out[:, head] = scores.softmax(-1) @ v[:, shared].double()
    return out


@st.composite
def documents(draw) -> torch.Tensor:
    """(2, T) document ids as a packer makes them, ids out of order and repeated lengths included."""
    length = draw(st.integers(1, 40))
    sequences = []
    for _ in range(2):
        cuts = sorted(draw(st.sets(st.integers(1, length), max_size=5)))
        ids = draw(st.permutations(range(len(cuts) + 1)))
        sequences.append([ids[sum(position >= cut for cut in cuts)] for position in range(length)])
    return torch.tensor(sequences, dtype=torch.int32)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_without_a_mask_attention_is_causal(kv_heads):
    q, k, v = heads(9, kv_heads=kv_heads)
    allowed = torch.ones(2, 9, 9, dtype=torch.bool).tril()
    torch.testing.assert_close(attend(q, k, v, None).double(), reference(q, k, v, allowed), atol=1e-5, rtol=0)


@settings(max_examples=40)
@given(documents())
def test_with_documents_a_query_attends_to_its_own_document(ids):
    length = ids.shape[1]
    allowed = torch.tensor(
        [
            [[sequence[t] == sequence[s] and s <= t for s in range(length)] for t in range(length)]
            for sequence in ids.tolist()
        ]
    )
    mask = document_mask(ids)
    assert torch.equal(mask[:, 0], allowed)
    assert mask.any(-1).all(), "softmax over no key is not finite"
    q, k, v = heads(length)
    torch.testing.assert_close(attend(q, k, v, mask).double(), reference(q, k, v, allowed), atol=1e-5, rtol=0)


def test_the_block_mask_is_the_boolean_mask():
    ids = torch.zeros(2, 300, dtype=torch.int32)
    ids[0, 40:], ids[0, 200:], ids[1, 290:] = 3, 1, 7
    blocks = document_block_mask(ids)
    at = torch.arange(300)
    elements = blocks.mask_mod(torch.arange(2)[:, None, None, None], 0, at[:, None], at)
    assert torch.equal(elements, document_mask(ids))
    whole = torch.nn.functional.pad(document_mask(ids), (0, 84, 0, 84))
    touched = whole.view(2, 1, 3, 128, 3, 128).any(5).any(3)
    assert torch.equal(blocks.to_dense().bool(), touched)
    assert not touched[0, 0, 2, 0], "a block of another document is skipped"


@pytest.mark.slow
def test_flex_attention_gives_what_the_boolean_mask_gives_and_compiles_once():
    attend_compiled = torch.compile(attend, fullgraph=True, dynamic=False)
    create = torch.compile(create_block_mask, dynamic=False)
    q, k, v = heads(256)
    for cut in (10, 128, 200):
        ids = torch.zeros(2, 256, dtype=torch.int32)
        ids[:, cut:] = 1
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=cut != 10):
            flex = attend_compiled(q, k, v, document_block_mask(ids, create))
        torch.testing.assert_close(flex, attend(q, k, v, document_mask(ids)), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("start", "length"), [(0, 5), (3, 1), (3, 4)])
def test_new_queries_see_the_cache_and_each_other_in_order(start, length):
    q, k, v = heads(length, keys=start + length)
    allowed = torch.ones(2, length, start + length, dtype=torch.bool).tril(start)
    out = attend(q, k, v, cached_mask(start, length, q.device))
    torch.testing.assert_close(out.double(), reference(q, k, v, allowed), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_computes_in_float32_and_rounds_once(dtype):
    norm = RMSNorm(64, 1e-6).to(dtype)
    torch.nn.init.normal_(norm.weight, 1.0, 0.1)
    # Squares of these overflow float16 and their mean is lost in bfloat16.
    x = (torch.randn(8, 64) * 300).to(dtype)
    wide, weight = x.double(), norm.weight.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = norm(x)
    assert out.dtype == dtype
    # Computed in float32, the result is within half a unit in the last place of the exact one.
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=torch.finfo(dtype).eps * 0.51 + 1e-6)


def test_the_norm_returns_float32_from_the_half_precision_of_autocast():
    assert RMSNorm(8, 1e-6)(torch.randn(2, 8).bfloat16()).dtype == torch.float32
