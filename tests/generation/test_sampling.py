"""Filters against the logits processors of transformers, and draws against their probabilities."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.errors import ConfigError
from minimind.generation.sampling import (
    Sampling,
    choose,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
)

VOCABULARY = 60


def some_logits(seed: int, *, ties: bool = False) -> torch.Tensor:
    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3
    return logits.round() if ties else logits


@pytest.mark.parametrize("ties", [False, True])
@settings(max_examples=15)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, VOCABULARY + 5),
    p=st.floats(0.01, 0.99),
    penalty=st.floats(0.5, 2.0),
)
def test_each_filter_is_that_of_transformers(ties, seed, k, p, penalty):
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = some_logits(seed, ties=ties)
    ids = torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(seed))
    seen = torch.zeros(3, VOCABULARY, dtype=torch.bool).scatter(1, ids, True)
    for ours, theirs in (
        (keep_top_k(logits, k), processors.TopKLogitsWarper(k)),
        (keep_top_p(logits, p), processors.TopPLogitsWarper(p)),
        (keep_min_p(logits, p), processors.MinPLogitsWarper(p)),
        (penalize_repetition(logits, seen, penalty), processors.RepetitionPenaltyLogitsProcessor(penalty)),
    ):
        assert torch.equal(ours, theirs(ids, logits.clone())), type(theirs).__name__


def test_together_they_are_applied_in_the_order_of_transformers(monkeypatch):
    transformers = pytest.importorskip("transformers")
    options = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    generation = transformers.GenerationConfig(do_sample=True, **options)
    theirs = model._get_logits_processor(generation, 9)
    logits = some_logits(3)
    ids = torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(3))
    filtered: list[torch.Tensor] = []
    monkeypatch.setattr("minimind.generation.sampling.draw", lambda logits, uniform: filtered.append(logits))
    seen = torch.zeros(3, VOCABULARY, dtype=torch.bool).scatter(1, ids, True)
    choose(logits, Sampling(**options), seen, torch.zeros(3))
    expected = theirs(ids, logits.clone())
    assert len(theirs) == 5
    torch.testing.assert_close(filtered[0], expected, atol=0, rtol=1e-6)
    assert 1 < expected[0].isfinite().sum() < 20, "all filters have something to do"


def test_without_temperature_the_most_likely_token_follows_after_the_penalty():
    logits = torch.tensor([[3.0, 2.9, -1.0]])
    seen = torch.tensor([[True, False, False]])
    uniform = torch.zeros(1)
    assert choose(logits, Sampling(temperature=0, top_k=1), None, uniform).tolist() == [0]
    assert choose(logits, Sampling(temperature=0, repetition_penalty=1.2), seen, uniform).tolist() == [1]


@pytest.mark.parametrize("temperature", [1e-12, 1e-30, 1e-45, 1e-320])
def test_close_to_no_temperature_the_most_likely_token_follows_too(temperature):
    logits = torch.tensor([[-2.0, 30.0, 29.0]])
    for number in (0.0, 1 - 2**-24):
        chosen = choose(logits, Sampling(temperature=temperature), None, torch.tensor([number]))
        assert chosen.tolist() == [1]


def test_tokens_are_drawn_with_their_probability():
    logits = some_logits(1)[:1].expand(20_000, -1)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    counts = draw(keep_top_k(logits, 12), uniform).bincount(minlength=VOCABULARY) / 20_000
    expected = keep_top_k(logits[:1].double(), 12).softmax(-1)[0]
    deviation = (expected * (1 - expected) / 20_000).sqrt()
    assert ((counts - expected).abs() <= 4.5 * deviation + 1e-9).all()
    assert (counts > 0).sum() > 6


def test_a_token_that_is_filtered_out_is_never_drawn():
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, 400:600] = 0.0
    # At both ends of [0, 1) lie tokens without any probability, and sums in float32 do not end at 1.
    for number in (0.0, 1 - 2**-24, 0.5):
        assert 400 <= draw(logits, torch.tensor([number])).item() < 600


def test_values_out_of_range_are_refused_together():
    with pytest.raises(ConfigError) as refused:
        Sampling(temperature=-1, top_k=0, top_p=0, min_p=2, repetition_penalty=0)
    assert [problem.split()[0] for problem in refused.value.problems] == [
        "--temperature",
        "--top-k",
        "--top-p",
        "--min-p",
        "--repetition-penalty",
    ]


def test_min_p_of_one_keeps_the_most_likely_tokens():
    logits = torch.tensor([[0.0, 2.0, 2.0, -1.0]])
    assert keep_min_p(logits, 1.0).isfinite().tolist() == [[False, True, True, False]]


def test_a_top_p_of_one_does_not_sort_the_vocabulary(monkeypatch):
    monkeypatch.setattr("minimind.generation.sampling.keep_top_p", lambda logits, p: pytest.fail("sorted"))
    assert choose(torch.zeros(1, 4), Sampling(top_p=1), None, torch.tensor([0.6])).tolist() == [2]


def test_a_token_of_the_vocabulary_is_drawn_even_from_nan():
    assert 0 <= draw(torch.full((1, 5), torch.nan), torch.tensor([0.5])).item() < 5
