"""The fused decoding step against the plain one.

As a program it runs the kernels on the CPU in Triton's interpreter, which must be chosen before Triton is
loaded, and prints the largest relative error of the logits of each case.
"""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import torch

from minimind.generation import fused_step
from minimind.generation.engine import InferenceEngine
from minimind.modeling.config import MiniMindConfig
from minimind.modeling.transformer import MiniMindForCausalLM

# Lengths of the prompts, splits of the keys, and changes to the model.
CASES: dict[str, tuple[list[int], int, dict[str, Any]]] = {
    "one prompt": ([17], 1, {}),
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
    worst = 0.0
    for number in range(steps):
        tokens = torch.randint(vocabulary, (len(lengths),), generator=generator).to(device)
        slot = torch.tensor([max(lengths) + number], device=device)
        with mock.patch.object(fused_step, "_splits", return_value=splits):
            ours = fused(tokens, slot, padding, caches[0])
        exact = engine.fixed_step(tokens, slot, padding, caches[1])
        worst = max(worst, float((ours - exact).norm() / exact.norm()))
    return worst


if __name__ == "__main__":
    from fused_cases import interpret

    interpret()
    # So that one program reads several blocks of keys.
    fused_step._TILE = 0
    print(
        json.dumps(
            {
                name: error(build(changes), lengths, splits)
                for name, (lengths, splits, changes) in CASES.items()
            }
        )
    )
