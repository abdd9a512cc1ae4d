"""The decoding step of fixed shapes, run eagerly on the CPU: it gives the logits and tokens of the other."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_engine import SHAPE, build, some_ids

from minimind.generation import decode_graph
from minimind.generation.decode_graph import DecodeGraph, DecodeState
from minimind.generation.engine import InferenceEngine
from minimind.generation.generate import generate, stream
from minimind.generation.sampling import Sampling
from minimind.modeling.kv_cache import KVCache

PROMPTS = [some_ids(length, length) for length in (5, 2, 7)]


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> InferenceEngine:
    """Return an engine that decodes as on a GPU, in blocks of three steps."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setitem(decode_graph._BLOCK, "cpu", 3)
    return InferenceEngine(build(), compiled=True)


@torch.inference_mode()
@pytest.mark.parametrize("lengths", [(5, 5), (5, 2, 7)])
def test_the_step_of_fixed_shapes_gives_the_logits_of_the_other(lengths: tuple[int, ...]) -> None:
    model = build()
    prompts = [some_ids(length, seed) for seed, length in enumerate(lengths)]
    plain = InferenceEngine(model)
    (ours, logits), (theirs, expected) = (plain.begin(prompts, capacity) for capacity in (30, 20))
    padding = torch.tensor([max(lengths) - length for length in lengths])
    for seed in range(6):
        tokens = torch.tensor(some_ids(len(prompts), 10 + seed))
        logits = plain.fixed_step(tokens, torch.tensor([max(lengths) + seed]), padding, ours.cache)
        expected = plain.step(theirs, tokens)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=0), Sampling(repetition_penalty=1.3), Sampling(top_k=None, top_p=0.8, min_p=0.05)],
)
@pytest.mark.parametrize("count", [1, 2, 20])
def test_blocks_hold_the_tokens_of_single_steps(
    fixed: InferenceEngine, sampling: Sampling, count: int
) -> None:
    plain = InferenceEngine(fixed.model)
    # Twice, for cache and buffers are used again.
    for seed in (1, 2):
        ours, theirs = (
            generate(engine, PROMPTS, sampling, max_new_tokens=count, seed=seed) for engine in (fixed, plain)
        )
        assert ours == theirs
    assert {len(tokens) for tokens in ours} == {count}


def test_no_more_tokens_are_decoded_than_random_numbers_are_given(fixed: InferenceEngine) -> None:
    for count in (1, 3, 5):
        steps = fixed.decode(PROMPTS, 20, Sampling(), torch.rand(count, 3), None)
        assert len(list(steps)) == count


def test_what_is_decoded_after_a_stop_token_is_dropped(fixed: InferenceEngine) -> None:
    plain = InferenceEngine(fixed.model)
    whole = generate(plain, PROMPTS, max_new_tokens=20, seed=3)
    for stop in ([whole[0][4]], [tokens[9] for tokens in whole]):
        options = {"max_new_tokens": 20, "stop_ids": stop, "seed": 3}
        ours = generate(fixed, PROMPTS, **options)
        assert ours == generate(plain, PROMPTS, **options)
        assert ours != whole


def test_sequences_end_at_the_last_position(fixed: InferenceEngine) -> None:
    prompts = [some_ids(5), some_ids(60)]
    tokens = generate(fixed, prompts, max_new_tokens=1000, seed=0)
    assert tokens == generate(InferenceEngine(fixed.model), prompts, max_new_tokens=1000, seed=0)
    assert [len(of_one) for of_one in tokens] == [64 - 5, 64 - 60]


def test_a_batch_within_another_has_its_own_buffers(fixed: InferenceEngine) -> None:
    expected = generate(fixed, PROMPTS, max_new_tokens=10, seed=1)
    outer = []
    for tokens in stream(fixed, PROMPTS, max_new_tokens=10, seed=1):
        outer.append(tokens)
        generate(fixed, PROMPTS[::-1], max_new_tokens=4, seed=9)
    assert [list(of_one) for of_one in zip(*outer, strict=True)] == expected


def test_an_abandoned_batch_leaves_nothing_to_the_next(fixed: InferenceEngine) -> None:
    penalty = Sampling(repetition_penalty=2.0)
    expected = generate(fixed, PROMPTS, penalty, max_new_tokens=10, seed=1)
    steps = stream(fixed, PROMPTS[::-1], penalty, max_new_tokens=10, seed=5)
    next(steps)
    steps.close()
    graph = fixed._idle
    assert generate(fixed, PROMPTS, penalty, max_new_tokens=10, seed=1) == expected
    assert fixed._idle is graph


def test_buffers_are_kept_for_similar_capacity_only(fixed: InferenceEngine) -> None:
    graphs = []
    for prompts, count, sampling in [
        (PROMPTS, 5, Sampling()),
        (PROMPTS, 9, Sampling()),
        (PROMPTS, 9, Sampling(top_k=3)),
        (PROMPTS[:1], 9, Sampling(top_k=3)),
    ]:
        generate(fixed, prompts, sampling, max_new_tokens=count)
        graphs.append(fixed._idle)
    assert [a is b for a, b in itertools.pairwise(graphs)] == [True, True, False]


def test_each_sampling_is_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    captures = []
    monkeypatch.setattr(DecodeGraph, "_capture", lambda graph, sampling: captures.append(sampling))
    graph = DecodeGraph(pytest.fail, DecodeState(KVCache(SHAPE, 512, batch_size=2), 40))
    graph.prepare(Sampling())
    assert captures == [], "no CUDA graphs on a CPU"
    graph.state.device = torch.device("cuda")
    many = [Sampling(top_k=number) for number in range(1, decode_graph._MOST_GRAPHS + 2)]
    for sampling in (many[0], many[1], many[0], *many):
        graph.prepare(sampling)
    assert captures == many
    # The first one was dropped.
    graph.prepare(many[-1])
    graph.prepare(many[0])
    assert captures == [*many, many[0]]


def test_a_state_fits_batches_of_its_size_and_where_allowed_smaller_capacity() -> None:
    graph = DecodeGraph(pytest.fail, DecodeState(KVCache(SHAPE, 512, batch_size=2), 40))
    cases = [(2, 512, False), (2, 256, False), (2, 256, True), (2, 768, True), (1, 512, True)]
    fitting = [graph.fits(size, capacity, larger=larger) for size, capacity, larger in cases]
    assert fitting == [True, False, True, False, False]
