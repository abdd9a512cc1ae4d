"""Continuations against a loop without a cache, and draws against their probabilities."""

from __future__ import annotations

import pytest
import torch

from minimind.errors import ConfigError
from minimind.generation import generate
from minimind.model_config import MiniMindConfig
from minimind.modeling.transformer import MiniMindForCausalLM


@pytest.fixture(scope="module")
def model() -> MiniMindForCausalLM:
    torch.manual_seed(0)
    config = MiniMindConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=32, initializer_range=0.3, dropout=0.5, tie_word_embeddings=False,
    )  # fmt: skip
    return MiniMindForCausalLM(config)


PROMPT = torch.tensor([[3, 14, 15, 9, 2]])


def greedy(model: MiniMindForCausalLM, count: int) -> list[int]:
    """The definition: run the whole text again for each token."""
    ids = PROMPT
    model.eval()
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    return ids[0, PROMPT.shape[1] :].tolist()


def test_without_temperature_the_most_likely_token_follows(model):
    expected = greedy(model, 12)
    model.train()
    assert generate(model, PROMPT, max_new_tokens=12, temperature=0) == expected
    assert len(set(expected)) > 3, "a constant answer would prove little"
    assert model.training, "the mode is put back"


def test_a_compiled_model_generates_without_compiling_for_each_length(model):
    expected = greedy(model, 6)
    compiled = MiniMindForCausalLM(model.config)
    compiled.load_state_dict(model.state_dict())
    compiled.compile_for_training("blocks")
    with torch.compiler.set_stance("fail_on_recompile"):
        assert generate(compiled, PROMPT, max_new_tokens=6, temperature=0) == expected


def test_it_stops_after_the_end_token(model):
    expected = greedy(model, 12)
    end = expected[4]
    stopped = generate(model, PROMPT, max_new_tokens=12, temperature=0, eos_token_id=end)
    assert stopped == expected[: expected.index(end) + 1]


def test_it_stops_where_the_positions_end(model):
    assert len(generate(model, PROMPT, max_new_tokens=1000)) == 32 - 5


def test_a_seeded_generator_draws_the_same_again(model):
    first, second, other = (
        generate(model, PROMPT, max_new_tokens=12, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert first == second != other


@pytest.mark.parametrize("top_k", [None, 5, 1, 400])
def test_tokens_are_drawn_with_their_probability_among_the_most_likely(model, top_k):
    model.eval()
    with torch.no_grad():
        logits = model(PROMPT).logits[0, -1].double()
    if top_k is not None and top_k < 40:
        logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
    expected = (logits / 0.4).softmax(-1)
    rng, draws = torch.Generator().manual_seed(0), 300
    counts = torch.zeros(40)
    for _ in range(draws):
        token = generate(model, PROMPT, max_new_tokens=1, temperature=0.4, top_k=top_k, generator=rng)[0]
        counts[token] += 1
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((counts / draws - expected).abs() <= 4.5 * deviation + 1e-9).all()


@pytest.mark.parametrize(
    ("length", "sentence"), [(32, "the prompt has 32 tokens, but the model has 32"), (0, "prompt is empty")]
)
def test_a_prompt_that_leaves_nothing_to_do_is_refused(model, length, sentence):
    with pytest.raises(ConfigError, match=sentence):
        generate(model, torch.zeros(1, length, dtype=torch.int64), max_new_tokens=1)
