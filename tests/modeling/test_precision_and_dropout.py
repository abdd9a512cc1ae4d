"""What stays in float32 beside half precision, and which layers `dropout` reaches."""

from __future__ import annotations

import pytest
import torch

from minimind.modeling.attention import Attention
from minimind.modeling.config import MiniMindConfig
from minimind.modeling.loss import linear_cross_entropy
from minimind.modeling.moe import MixtureOfExperts
from minimind.modeling.rope import RotaryTable, rope_frequencies
from minimind.modeling.transformer import MiniMindForCausalLM

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def attention_output(dropout: float, *, training: bool) -> torch.Tensor:
    torch.manual_seed(0)
    config = MiniMindConfig(**SHAPE, dropout=dropout)
    layer = Attention(config).train(training)
    x = torch.randn(2, 24, 32)
    return layer(x, RotaryTable(config)(None, 0, 24))


def test_dropout_reaches_the_attention_weights_in_training_alone() -> None:
    plain = attention_output(0.0, training=True)
    assert torch.equal(attention_output(0.5, training=False), plain)
    dropped = attention_output(0.5, training=True)
    assert not torch.allclose(dropped, plain)
    # The first query has one key: half of its 4 heads see nothing, the others see it doubled.
    assert not torch.allclose(dropped[:, 0], plain[:, 0])


def test_dropout_reaches_attention_and_both_branches_of_each_block() -> None:
    model = MiniMindForCausalLM(MiniMindConfig(**SHAPE, dropout=0.25))
    assert [layer.self_attn.dropout for layer in model.model.layers] == [0.25, 0.25]
    assert [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)] == [0.25, 0.25]


@pytest.mark.parametrize("autocast", [True, False])
def test_experts_are_routed_in_float32(autocast: bool) -> None:
    torch.manual_seed(0)
    shape = {"use_moe": True, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    layer = MixtureOfExperts(MiniMindConfig(**SHAPE, **shape))
    torch.nn.init.normal_(layer.gate.weight)
    for weight in layer.experts.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    x = torch.randn(4, 64, 32)
    expected = (x.double() @ layer.gate.weight.double().T).softmax(-1).flatten(0, 1)
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            _, (counts, sums) = layer(x)
    else:
        # Weights and activations in bf16 are exact in float32, and so must their products be.
        layer, x = layer.bfloat16(), x.bfloat16()
        expected = (x.double() @ layer.gate.weight.double().T).softmax(-1).flatten(0, 1)
        _, (counts, sums) = layer(x)
    assert counts.dtype == sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), expected.sum(0), rtol=1e-5, atol=0)
    chosen = expected.topk(2).indices.flatten().bincount(minlength=8)
    assert torch.equal(counts.long(), chosen)


@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_the_loss_is_summed_in_float32_over_logits_in_half_precision(
    with_gradient: bool, autocast: bool
) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 16), torch.randn(50, 16)
    targets = torch.randint(0, 50, (300,))
    if not autocast:
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    with torch.set_grad_enabled(with_gradient), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = linear_cross_entropy(hidden, weight.requires_grad_(with_gradient), targets)
    logits = (hidden.bfloat16() @ weight.detach().bfloat16().T).double()
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(("factor", "expected"), [(0.5, 1.0), (1.0, 1.0), (1.5, 1.0405465), (8.0, 1.2079442)])
def test_yarns_attention_factor_is_1_unless_positions_are_stretched(factor: float, expected: float) -> None:
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 2048}
    frequencies, attention_factor = rope_frequencies(16, 1e6, scaling)
    assert attention_factor == pytest.approx(expected)
    if factor == 1:
        torch.testing.assert_close(frequencies, rope_frequencies(16, 1e6)[0])
