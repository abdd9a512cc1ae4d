"""Continuations against a loop without a cache and against transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from minimind.errors import ConfigError
from minimind.formats.huggingface import load_model, save_model
from minimind.formats.original_minimind import read_upstream_config
from minimind.generation.engine import InferenceEngine
from minimind.generation.generate import generate, stream
from minimind.generation.sampling import Sampling
from minimind.modeling.config import MiniMindConfig
from minimind.modeling.transformer import MiniMindForCausalLM

GREEDY = Sampling(temperature=0)
PROMPT = [3, 14, 15, 9, 2]


@pytest.fixture(scope="module")
def model() -> MiniMindForCausalLM:
    torch.manual_seed(0)
    config = MiniMindConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=32, initializer_range=0.3, dropout=0.5, tie_word_embeddings=False,
    )  # fmt: skip
    return MiniMindForCausalLM(config)


def greedy(model: MiniMindForCausalLM, prompt: list[int], count: int) -> list[int]:
    """The definition: run the whole text again for each token."""
    ids = torch.tensor([prompt])
    model.eval()
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    model.train()
    return ids[0, len(prompt) :].tolist()


def test_without_temperature_the_most_likely_token_follows(model):
    expected = greedy(model, PROMPT, 12)
    assert generate(model, [PROMPT], GREEDY, max_new_tokens=12) == [expected]
    assert len(set(expected)) > 3, "a constant answer would prove little"
    assert model.training, "the mode is left alone"


def test_a_compiled_model_generates_without_compiling_for_each_length(model):
    compiled = MiniMindForCausalLM(model.config)
    compiled.load_state_dict(model.state_dict())
    compiled.compile_for_training("blocks")
    with torch.compiler.set_stance("fail_on_recompile"):
        written = generate(compiled, [PROMPT], GREEDY, max_new_tokens=6)
    assert written == [greedy(model, PROMPT, 6)]


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0, "repetition_penalty": 1.4}])
def test_prompts_of_different_lengths_are_continued_as_each_would_be_alone(model, options):
    sampling = Sampling(**options)
    prompts = [PROMPT, [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 30, 31, 32], [14, 15]]
    decoder = InferenceEngine(model)
    together = generate(decoder, prompts, sampling, max_new_tokens=15, seed=5)
    alone = [
        generate(decoder, [prompt], sampling, max_new_tokens=15, seed=5 + number)[0]
        for number, prompt in enumerate(prompts)
    ]
    assert together == alone
    assert len({tuple(text) for text in together}) == 4


def test_each_text_stops_after_its_end_token(model):
    prompts = [PROMPT, [7, 8]]
    expected = [greedy(model, prompt, 12) for prompt in prompts]
    end = expected[0][4]
    stopped = generate(model, prompts, GREEDY, max_new_tokens=12, stop_ids=[end])
    cut = [text[: text.index(end) + 1] if end in text else text for text in expected]
    assert stopped == cut
    assert len(cut[0]) != len(cut[1]), "one of the two goes on alone"


def test_each_text_stops_where_the_positions_end(model):
    written = generate(model, [PROMPT, [1] * 20], max_new_tokens=1000, seed=0)
    assert [len(text) for text in written] == [32 - 5, 32 - 20]


def test_tokens_come_as_they_are_chosen(model):
    texts = stream(model, [PROMPT, [1] * 30], GREEDY, max_new_tokens=4)
    expected = greedy(model, PROMPT, 4)
    assert [tokens[0] for tokens in texts] == expected
    texts = stream(model, [PROMPT, [1] * 30], GREEDY, max_new_tokens=4)
    assert [tokens[1] is None for tokens in texts] == [False, False, True, True]


def test_a_seed_draws_the_same_again_and_leaves_the_generator_of_torch_alone(model):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second, other = (generate(model, [PROMPT], max_new_tokens=12, seed=seed) for seed in (1, 1, 2))
    assert first == second != other
    unseeded = [generate(model, [PROMPT], max_new_tokens=12) for _ in range(2)]
    assert unseeded[0] != unseeded[1]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_repetition_penalty_counts_the_prompt_and_what_was_written(model):
    harsh = Sampling(temperature=0, repetition_penalty=1e6)
    (written,) = generate(model, [PROMPT], harsh, max_new_tokens=20)
    # Seen tokens with positive logits are as good as gone, so none comes twice while unseen ones are left.
    assert len(set(PROMPT + written)) == 25


@pytest.mark.parametrize(
    ("length", "sentence"), [(32, "the prompt has 32 tokens, but the model has 32"), (0, "prompt is empty")]
)
def test_a_prompt_that_leaves_nothing_to_do_is_refused(model, length, sentence):
    with pytest.raises(ConfigError, match=sentence):
        generate(model, [PROMPT, [0] * length], max_new_tokens=1)


def theirs(folder: Path, prompt: list[int], count: int) -> list[int]:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, max_new_tokens=count, **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("half", [True, False], ids=["half precision", "as trained"])
def test_greedy_text_is_that_of_transformers(tmp_path, half):
    torch.manual_seed(1)
    shape = MiniMindConfig(
        vocab_size=300, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=24, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    save_model(MiniMindForCausalLM(shape), tmp_path, dtype=torch.float16)
    model = load_model(tmp_path)
    if not half:
        from safetensors.torch import save_file

        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter) * 1e-3
        save_file(dict(model.named_parameters()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    written = generate(model, [PROMPT], GREEDY, max_new_tokens=200)[0]
    assert written == theirs(tmp_path, PROMPT, 200)
    assert len(set(written)) > 3


def test_greedy_text_is_that_of_transformers_beyond_the_training_length(tmp_path, shared):
    original = read_upstream_config(shared / "compat" / "minimind3_yarn_tiny.config.json")
    torch.manual_seed(1)
    # Stronger weights than those of the file, which would write one token for ever.
    shape = dataclasses.replace(original, initializer_range=0.2, tie_word_embeddings=False)
    save_model(MiniMindForCausalLM(shape), tmp_path)
    assert shape.rope_scaling is not None
    trained = shape.rope_scaling["original_max_position_embeddings"]
    rng = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, shape.vocab_size, (trained - 10,), generator=rng).tolist()
    written = generate(load_model(tmp_path), [prompt], GREEDY, max_new_tokens=40)[0]
    assert written == theirs(tmp_path, prompt, 40)
    assert len(set(written)) > 3
