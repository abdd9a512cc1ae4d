"""One token after another against the whole text at once."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from minimind.generation import packed_linear as projection
from minimind.generation.engine import InferenceEngine
from minimind.generation.generate import generate
from minimind.generation.packed_linear import exact_half_scale, pack_weights
from minimind.modeling.config import MiniMindConfig
from minimind.modeling.transformer import MiniMindForCausalLM

SHAPE = MiniMindConfig(
    vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=12, intermediate_size=48, max_position_embeddings=64, initializer_range=0.3, dropout=0.3,
)  # fmt: skip


def build(precision: str = "float32", **changes) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    model = MiniMindForCausalLM(dataclasses.replace(SHAPE, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.3)
            # What a folder saved in this precision holds, read back to float32.
            parameter.copy_(parameter.to(getattr(torch, precision)))
    return model


def some_ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 40, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def whole(model: MiniMindForCausalLM, ids: list[int]) -> torch.Tensor:
    """Float64 logits after the last token, from the whole text."""
    with torch.no_grad():
        return model.double()(torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"use_moe": True, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ],
)
def test_each_step_gives_the_logits_of_the_whole_text(precision, changes):
    model = build(precision, **changes)
    decoder, ids = InferenceEngine(model), some_ids(12)
    texts, logits = decoder.begin([ids[:7]], 20)
    steps = [logits, *(decoder.step(texts, torch.tensor([token])) for token in ids[7:])]
    exact = build(precision, **changes)
    for end, logits in enumerate(steps, start=7):
        torch.testing.assert_close(logits[0].double(), whole(exact, ids[:end]), atol=2e-5, rtol=1e-5)


def test_texts_of_several_lengths_do_not_see_their_padding():
    model, prompts, following = build(), [some_ids(n, n) for n in (3, 9, 1, 9)], some_ids(4, 50)
    decoder = InferenceEngine(model)
    texts, logits = decoder.begin(prompts, 16)
    exact = build()
    for end in range(5):
        for sequence, prompt in enumerate(prompts):
            expected = whole(exact, prompt + following[:end])
            torch.testing.assert_close(logits[sequence].double(), expected, atol=2e-5, rtol=1e-5)
        if end < 4:
            logits = decoder.step(texts, torch.tensor([following[end]] * 4))


def test_bf16_is_computed_in_bf16():
    model, ids = build().bfloat16(), some_ids(12)
    decoder = InferenceEngine(model)
    texts, _ = decoder.begin([ids[:-1]], 12)
    logits = decoder.step(texts, torch.tensor(ids[-1:]))
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1].float()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits[0], expected, atol=0.25, rtol=0.05)


@pytest.mark.slow
def test_a_compiled_step_gives_the_same_whatever_the_length_and_compiles_once():
    model = build()
    plain, compiled = InferenceEngine(model), InferenceEngine(model, compiled=True)
    for number, lengths in enumerate([(5, 3), (9, 2), (4, 20)]):
        prompts = [some_ids(length, length) for length in lengths]
        options = {"max_new_tokens": 6, "seed": number}
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            # A second batch of the same size finds what the first left in the cache.
            ours = generate(compiled, prompts, **options)
        assert ours == generate(plain, prompts, **options)


@pytest.mark.parametrize(
    ("weights", "scale"),
    [
        ([0.5, -3.0], 1.0),
        ([2.0**-24, 65504.0], 1.0),
        ([2.0**-30, 1.0], 2.0**15),  # subnormal in float16 as they are
        ([0.1, 0.2], None),  # 24 bits
        ([2.0**-40, 1.0], None),
        ([0.0, 0.0], None),
        ([float("nan"), 1.0], None),
        ([float("inf"), 1.0], None),
    ],
)
def test_half_precision_is_taken_only_where_it_holds_every_weight(weights, scale):
    found = exact_half_scale(torch.tensor(weights))
    assert found == scale
    if scale is not None:
        scaled = torch.tensor(weights) * scale
        assert torch.equal(scaled.half().float() / scale, torch.tensor(weights))


@pytest.mark.parametrize("half_kernel", [True, False])
@pytest.mark.parametrize("weights", ["float16", "tiny bfloat16", "float32"])
def test_packed_products_are_those_of_the_layers(monkeypatch, half_kernel, weights):
    if half_kernel and not projection._has_half_kernel():
        pytest.skip("FBGEMM is for x86")
    monkeypatch.setattr(projection, "_has_half_kernel", lambda: half_kernel)
    rng = torch.Generator().manual_seed(0)
    layers = [nn.Linear(37, outputs, bias=False) for outputs in (5, 70, 1)]
    for layer in layers:
        drawn = torch.randn(layer.weight.shape, generator=rng)
        if weights == "tiny bfloat16":
            drawn = (drawn * 1e-5).bfloat16()
        layer.weight.data = drawn.to(getattr(torch, weights.split()[-1])).float()
    f = pack_weights(layers)
    for shape in ((1, 37), (1, 1, 37), (6, 37), (2, 90, 37)):
        x = torch.randn(shape, generator=rng)
        expected = torch.cat([x.double() @ layer.weight.double().mT for layer in layers], dim=-1)
        with torch.no_grad():
            torch.testing.assert_close(
                f(x).double(), expected, atol=1e-5 * float(expected.abs().max()), rtol=0
            )
