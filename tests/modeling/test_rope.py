"""Rotary positions against float64 rotations and against transformers' YaRN."""

from __future__ import annotations

import math

import pytest
import torch

from minimind.modeling.config import MiniMindConfig
from minimind.modeling.rope import RotaryTable, rope_frequencies, rotate

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 2048}


def table(**changes) -> RotaryTable:
    shape = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return RotaryTable(MiniMindConfig(**{**shape, **changes}))


def test_a_pair_is_rotated_by_its_frequency_times_the_position():
    x = torch.randn(1, 64, 3, 16)
    turned = rotate(x, *table()(None, 0, 64)[:2])
    angles = torch.arange(64).double()[:, None] * 1e6 ** (-torch.arange(0, 16, 2).double() / 16)
    pairs = torch.complex(x[..., :8].double(), x[..., 8:].double())
    expected = pairs * torch.polar(torch.ones_like(angles), angles)[None, :, None]
    torch.testing.assert_close(turned[..., :8], expected.real.float(), atol=2e-5, rtol=0)
    torch.testing.assert_close(turned[..., 8:], expected.imag.float(), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"attention_factor": 1.0},
        {"beta_fast": 16.0, "beta_slow": 2.0},
        {"truncate": False},
        {"factor": 0.5},
    ],
)
@pytest.mark.parametrize("head_dim", [16, 96])
def test_yarn_is_that_of_transformers(extra, head_dim):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {**YARN, **extra}
    config = transformers.Qwen3Config(
        hidden_size=64, num_attention_heads=4, head_dim=head_dim, rope_theta=1e6,
        max_position_embeddings=int(2048 * scaling["factor"]), rope_scaling={**scaling, "rope_theta": 1e6},
    )  # fmt: skip
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    frequencies, ours = rope_frequencies(head_dim, 1e6, scaling)
    assert ours == pytest.approx(factor)
    torch.testing.assert_close(frequencies, expected, atol=0, rtol=1e-6)


def test_the_attention_factor_scales_cos_and_sin():
    plain, scaled = table(rope_scaling={**YARN, "attention_factor": 1.0}), table(rope_scaling=YARN)
    torch.testing.assert_close(scaled.cos, plain.cos * (0.1 * math.log(8) + 1))
    torch.testing.assert_close(scaled.sin, plain.sin * (0.1 * math.log(8) + 1))


def test_position_ids_index_the_table():
    rotary = table()
    positions = torch.tensor([[5, 0, 63], [1, 1, 2]], dtype=torch.int32)
    cos, sin, _ = rotary(positions, 0, 3)
    assert cos.shape == (2, 3, 1, 8)
    assert torch.equal(cos[0, 1, 0], torch.ones(8))
    assert torch.equal(sin[1, 2], rotary(None, 2, 1)[1][0, 0])


def test_the_table_stays_float32_after_casts_and_the_meta_device():
    reference = table()
    assert not reference.state_dict()
    with torch.device("meta"):
        moved = table()
    for rotary in (table().half(), table().to(torch.bfloat16), moved.to_empty(device="cpu")):
        assert torch.equal(rotary.cos, reference.cos)
        assert torch.equal(rotary.sin, reference.sin)
        assert list(dict(rotary.named_buffers())) == ["cos", "sin"]
