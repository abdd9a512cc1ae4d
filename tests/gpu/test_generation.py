"""Generation as a CUDA graph gives the tokens of single steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minimind.generation import engine as engine_module
from minimind.generation.decode_graph import DecodeGraph
from minimind.generation.engine import InferenceEngine
from minimind.generation.generate import generate
from minimind.generation.sampling import Sampling
from support import decoding_cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

# minimind-3 with fewer layers.
WIDE: dict[str, Any] = {
    "vocab_size": 6400, "hidden_size": 768, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 96, "intermediate_size": 2432, "max_position_embeddings": 2048,
    "initializer_range": 0.02,
}  # fmt: skip
GREEDY = Sampling(temperature=0)
LENGTHS = [5, 1, 40, 12, 300]


def prompts(batch_size: int, vocabulary: int) -> list[list[int]]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randint(vocabulary, (length,), generator=rng).tolist() for length in LENGTHS[:batch_size]]


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize(
    "sampling",
    [GREEDY, Sampling(), Sampling(top_k=None, top_p=0.9, min_p=0.01, repetition_penalty=1.2)],
    ids=["greedy", "top-k", "all filters"],
)
def test_a_graph_gives_the_tokens_of_its_steps(
    monkeypatch: pytest.MonkeyPatch, batch_size: int, sampling: Sampling
) -> None:
    model = decoding_cases.build(WIDE).cuda().bfloat16()
    captured, eager = InferenceEngine(model), InferenceEngine(model)
    given = prompts(batch_size, 6400)
    options: dict[str, Any] = {"max_new_tokens": 40, "seed": 3}
    whole = generate(captured, given, sampling, **options)
    assert captured._idle is not None
    assert captured._idle.captured
    with monkeypatch.context() as patch:
        patch.setattr(DecodeGraph, "_capture", lambda *_: None)
        assert generate(eager, given, sampling, **options) == whole
        # Sequences that stop early, in one graph and in the other.
        options["stop_ids"] = [whole[0][10], whole[-1][25]]
        stopped = generate(eager, given, sampling, **options)
    assert generate(captured, given, sampling, **options) == stopped != whole


def test_later_batches_use_the_graphs_of_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    captures = []
    capture = DecodeGraph._capture
    monkeypatch.setattr(
        DecodeGraph, "_capture", lambda graph, given: captures.append(given) or capture(graph, given)
    )
    model = decoding_cases.build(WIDE).cuda().bfloat16()
    engine = InferenceEngine(model)
    long = prompts(5, 6400)
    short = [prompt[:9] for prompt in long]
    for given, sampling in [(long, GREEDY), (long, Sampling()), (short, GREEDY), (short, Sampling())]:
        ours = generate(engine, given, sampling, max_new_tokens=30, seed=2)
        seen_by_one = len(captures)
        # A graph of a smaller capacity gives the same tokens.
        assert generate(InferenceEngine(model), given, sampling, max_new_tokens=30, seed=2) == ours
        del captures[seen_by_one:]
    assert captures == [GREEDY, Sampling()]


@pytest.mark.parametrize("fused", [True, False])
def test_tokens_in_float32_are_those_of_the_plain_engine(
    monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    monkeypatch.setattr(engine_module, "supported", lambda *_: fused)
    model = decoding_cases.build(WIDE, initializer_range=0.1).cuda()
    given = prompts(5, 6400)
    for size in (5, 2):
        for sampling in (GREEDY, Sampling(), Sampling(top_k=None, min_p=0.01, repetition_penalty=1.2)):
            ours, plain = (
                generate(
                    InferenceEngine(model, capture=capture),
                    given[-size:],
                    sampling,
                    max_new_tokens=30,
                    seed=1,
                )
                for capture in (True, False)
            )
            assert ours == plain


@pytest.mark.parametrize("name", decoding_cases.CASES)
def test_fused_kernels_give_the_logits_of_the_step(name: str) -> None:
    lengths, splits, changes = decoding_cases.CASES[name]
    assert decoding_cases.error(decoding_cases.build(changes), lengths, splits, device="cuda") < 1e-5


@pytest.mark.parametrize("name", decoding_cases.SAMPLINGS)
def test_fused_sampling_chooses_the_same_tokens(name: str) -> None:
    sampling = decoding_cases.SAMPLINGS[name]
    for vocabulary in (6400, 16000):
        assert decoding_cases.sampled_differently(sampling, vocabulary=vocabulary, device="cuda") == 0


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_fused_kernels_in_bf16_round_as_the_step_does(batch_size: int, head_dim: int) -> None:
    model = decoding_cases.build(WIDE, head_dim=head_dim).bfloat16()
    assert decoding_cases.error(model, LENGTHS[:batch_size], 2, device="cuda", capacity=512) < 0.02


def test_experts_are_captured() -> None:
    shape = {**WIDE, "use_moe": True, "num_experts": 4, "moe_intermediate_size": 256}
    model = decoding_cases.build(shape).cuda().bfloat16()
    engine = InferenceEngine(model)
    generate(engine, prompts(2, 6400), GREEDY, max_new_tokens=10)
    assert engine._idle is not None
    # Before Hopper the host reads the size of each group.
    assert engine._idle.captured == (torch.cuda.get_device_capability() >= (9, 0))


def test_a_failure_of_triton_leaves_the_plain_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no compiler")

    model = decoding_cases.build(WIDE).cuda()
    given = prompts(2, 6400)
    expected = generate(InferenceEngine(model, capture=False), given, GREEDY, max_new_tokens=10)
    monkeypatch.setattr(engine_module.FusedStep, "__call__", fail)
    with pytest.warns(UserWarning, match="without fused kernels: no compiler"):
        assert generate(InferenceEngine(model), given, GREEDY, max_new_tokens=10) == expected
