"""The fused decoding step and sampling against the plain ones; `fused_cases` runs them in the interpreter."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from minimind.generation import decode_graph, fused_step
from minimind.generation.decode_graph import DecodeState
from minimind.generation.engine import InferenceEngine
from minimind.generation.sampling import Sampling
from minimind.modeling.config import MiniMindConfig
from minimind.modeling.kv_cache import KVCache
from minimind.modeling.transformer import MiniMindForCausalLM

# Lengths of the prompts, splits of the keys, and changes to the model.
CASES: dict[str, tuple[list[int], int, dict[str, Any]]] = {
    "one prompt": ([17], 16, {}),
    "padding and splits": ([5, 2, 19], 4, {"num_key_value_heads": 1}),
    "large batch": ([5, 2, 7, 1, 3], 1, {}),
    "experts": ([2, 1], 1, {"use_moe": True, "num_experts": 2, "moe_intermediate_size": 8}),
}


def build(changes: dict[str, Any], **more: Any) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 10, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 14, "max_position_embeddings": 20,
        "initializer_range": 0.3,
    }  # fmt: skip
    model = MiniMindForCausalLM(MiniMindConfig(**{**shape, **changes, **more})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.3)
    return model


@torch.inference_mode()
def error(
    model: MiniMindForCausalLM,
    lengths: list[int],
    splits: int,
    *,
    device: str = "cpu",
    steps: int = 2,
    capacity: int = 32,
) -> float:
    """Return the largest relative error of the logits over some steps; the two steps have separate caches."""
    engine = InferenceEngine(model.to(device), capture=False)
    engine._blocks = InferenceEngine(model, compiled=True)._blocks
    fused = engine.fused_step()
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    prompts = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]
    caches = [engine.begin(prompts, capacity)[0].cache for _ in range(2)]
    padding = torch.tensor([max(lengths) - length for length in lengths], device=device)
    errors = []
    for number in range(steps):
        tokens = torch.randint(vocabulary, (len(lengths),), generator=generator).to(device)
        slot = torch.tensor([max(lengths) + number], device=device)
        with mock.patch.object(fused_step, "_splits", return_value=splits):
            ours = fused(tokens, slot, padding, caches[0])
        exact = engine.fixed_step(tokens, slot, padding, caches[1])
        errors.append((ours - exact).norm() / exact.norm())
    # NaN if one of them is.
    return float(torch.stack(errors).max())


SAMPLINGS = {
    "greedy": Sampling(temperature=0, repetition_penalty=1.5),
    "top-k": Sampling(top_k=7),
    "top-k of all": Sampling(top_k=1000, temperature=2),
    "min-p": Sampling(top_k=None, min_p=0.1, repetition_penalty=0.7),
    "top-p": Sampling(top_p=0.5),
}


@torch.inference_mode()
def sampled_differently(sampling: Sampling, *, vocabulary: int, device: str = "cpu") -> int:
    """Return how many numbers differ in the states after some steps of sampling."""
    generator = torch.Generator().manual_seed(0)
    states = []
    model = build({})
    fused = InferenceEngine(model.to(device), compiled=True).fused_step()
    for _ in range(2):
        cache = KVCache(model.config, 8, batch_size=5, device=device)
        state = DecodeState(cache, vocabulary)
        state.uniform.copy_(torch.rand(state.uniform.shape, generator=generator.manual_seed(1)))
        state.seen[:, ::3] = True
        states.append(state)
    for _ in range(3):
        # Some are equal, and most negative.
        logits = ((torch.randn(5, vocabulary, generator=generator) * 8).round() / 4 - 3).to(device)
        fused.sample(logits, sampling, states[0])
        decode_graph.sample(logits, sampling, states[1])
    names = ("slot", "number", "tokens", "history", "seen")
    pairs = [[getattr(state, name) for state in states] for name in names]
    return sum(int((a != b).sum()) for a, b in pairs)


def all_cases() -> dict[str, float]:
    """Return the error of each case on the CPU, in the interpreter, and how many numbers differ."""
    with mock.patch.object(fused_step, "_TILE", 0):  # so that one program reads several blocks of keys
        found: dict[str, float] = {name: error(build(more), *shape) for name, (*shape, more) in CASES.items()}
    return found | {name: sampled_differently(kind, vocabulary=40) for name, kind in SAMPLINGS.items()}
