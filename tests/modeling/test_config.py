"""Model configuration: counts against torch, config.json, error messages."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minimind.errors import ConfigError
from minimind.modeling.config import MiniMindConfig
from minimind.modeling.transformer import MiniMindForCausalLM

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@st.composite
def experts(draw) -> dict[str, Any]:
    if not draw(st.booleans()):
        return {}
    number = draw(st.integers(1, 5))
    return {
        "use_moe": True,
        "num_experts": number,
        "num_experts_per_tok": draw(st.integers(1, number)),
        "moe_intermediate_size": draw(st.sampled_from([None, 5, 24])),
        "norm_topk_prob": draw(st.sampled_from([None, True, False])),
        "router_aux_loss_coef": draw(st.sampled_from([0.0, 0.25])),
    }


@st.composite
def configs(draw) -> MiniMindConfig:
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from([None, 2, 6]))
    return MiniMindConfig(
        vocab_size=draw(st.integers(1, 50)),
        hidden_size=heads * 2 * draw(st.integers(1, 4)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=draw(st.sampled_from([None, 5, 24])),
        max_position_embeddings=draw(st.integers(1, 256)),
        rope_theta=draw(st.floats(10.0, 1e6)),
        rope_scaling=draw(st.sampled_from([None, YARN, {**YARN, "attention_factor": 1.0}])),
        tie_word_embeddings=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.1])),
        **draw(experts()),
        eos_token_id=draw(st.integers(0, 9)),
    )


@settings(max_examples=40)
@given(configs())
def test_the_number_of_parameters_is_that_of_the_model_built(config):
    with torch.device("meta"):
        model = MiniMindForCausalLM(config)
    assert config.num_parameters() == sum(p.numel() for p in model.parameters())
    # Of stacked experts a token passes some.
    passed = {True: config.num_experts_per_tok, False: 1}
    active = sum(
        p.numel() * passed[p.dim() == 3] // (len(p) if p.dim() == 3 else 1) for p in model.parameters()
    )
    assert config.num_active_parameters() == active
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * 16
    assert config.flops_per_token(16) == 6 * (active - embedding + attention)


@settings(max_examples=100)
@given(configs())
def test_a_config_round_trips_through_json(config):
    assert MiniMindConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(("hidden", "inner"), [(512, 1408), (768, 2048), (128, 384), (32, 128)])
def test_the_inner_width_is_eight_thirds_rounded_up_to_64(hidden, inner):
    assert MiniMindConfig(hidden_size=hidden).intermediate_size == inner


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_torch_counts_with_causal_attention_halved(tied):
    config = MiniMindConfig(
        vocab_size=96, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        tie_word_embeddings=tied, max_position_embeddings=64,
    )  # fmt: skip
    model = MiniMindForCausalLM(config)
    ids = torch.randint(96, (2, 32))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids, labels=ids).loss.backward()
    counts = {str(op).split(".")[-1]: n for op, n in counter.get_flop_counts()["Global"].items()}
    tokens, norms = ids.numel(), sum(p.numel() for p in model.parameters() if p.dim() == 1)
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * 32
    # Norm weights are counted as if they were multiplied by a matrix product: below 1% in any real model.
    assert counts["mm"] == tokens * (config.flops_per_token(32) - attention - 6 * norms)
    assert counts["bmm"] == tokens * 2 * attention


def test_the_defaults_are_those_of_minimind2_small():
    assert MiniMindConfig() == MiniMindConfig(
        vocab_size=6400,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=1408,
        max_position_embeddings=32768,
        rope_theta=1e6,
        rope_scaling=None,
        rms_norm_eps=1e-6,
        use_moe=False,
        num_experts=4,
        num_experts_per_tok=1,
        moe_intermediate_size=None,
        norm_topk_prob=None,
        router_aux_loss_coef=0.01,
        dropout=0.0,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def test_absent_keys_of_a_hugging_face_config_mean_transformers_defaults():
    shape = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MiniMindConfig.from_dict(
        {
            "model_type": "qwen3",
            "num_key_value_heads": 2,
            "intermediate_size": 16,
            "eos_token_id": [7, 3],
            **shape,
        }
    )
    assert (config.head_dim, config.tie_word_embeddings, config.rope_theta) == (128, False, 1e4)
    assert config.eos_token_id == 7


def test_absent_keys_of_a_mixture_mean_transformers_defaults():
    shape = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MiniMindConfig.from_dict({"model_type": "qwen3_moe", "num_key_value_heads": 2, **shape})
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (128, 8, 768)
    assert (config.norm_topk_prob, config.head_dim, config.use_moe) == (False, 4, True)
    # As transformers 5 writes it.
    named = {**config.to_dict(), "num_local_experts": 16}
    del named["num_experts"]
    assert MiniMindConfig.from_dict(named).num_experts == 16


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"hidden_size": 10, "num_attention_heads": 4}, "hidden_size 10 is not a multiple of num_attention"),
        ({"num_attention_heads": 8, "num_key_value_heads": 3}, "num_key_value_heads 3 does not divide"),
        ({"head_dim": 5}, "head_dim 5 is odd"),
        ({"vocab_size": 0}, "vocab_size 0 is not a size"),
        ({"dropout": 1.0}, "dropout 1.0 is not a number from 0 to 0.999"),
        ({"use_moe": True, "num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok 3 is more than"),
        ({"use_moe": True, "num_experts": 0}, "num_experts 0 is not a size"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type 'linear' is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "original_max_position_embeddings is None"),
        ({"rope_scaling": {**YARN, "mscale": 1.0}}, "mscale not supported"),
        # Values of an edited file.
        ({"hidden_size": "512"}, "hidden_size 512 is not a size"),
        ({"num_attention_heads": "8", "vocab_size": [1]}, r"vocab_size \[1\] is not a size.*\n.*heads 8 is"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers 1(0)+ is not a size"),
        ({"rope_theta": "1e6"}, "rope_theta 1e6 is not a number"),
        ({"rope_theta": 0}, "rope_theta 0 is not a number from 1.001"),
        ({"rope_theta": 1.0, "rope_scaling": YARN}, "rope_theta 1.0 is not a number from 1.001"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000 is not a size.*from 1 to 10000"),
        ({"max_position_embeddings": 2**31 - 1}, "max_position_embeddings 2147483647 is not a size"),
        (
            {"hidden_size": 2**20, "head_dim": 64, "num_hidden_layers": 9999},
            r"a model of \d.\de\+1\d parameters",
        ),
        ({"rms_norm_eps": 1e9}, "rms_norm_eps 1000000000.0 is not a number from 0 to 1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan is not a number"),
        ({"dropout": "none"}, "dropout none is not a number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings false is neither true nor false"),
        ({"eos_token_id": "</s>"}, "eos_token_id </s> is not a token id"),
        ({"rope_scaling": "yarn"}, "rope_scaling 'yarn' is not a table"),
        ({"rope_scaling": {**YARN, "factor": float("inf")}}, "rope_scaling factor is inf"),
    ],
)
def test_an_invalid_config_is_refused(values, sentence):
    with pytest.raises(ConfigError, match=sentence):
        MiniMindConfig(**values)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"intermediate_size": None}, "intermediate_size missing"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, "mlp_only_layers is .0."),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ({"rope_parameters": "yarn"}, "rope_parameters 'yarn' is not a table"),
        (
            {"rope_theta": None, "rope_parameters": {"rope_theta": "large"}},
            "rope_theta large is not a number",
        ),
    ],
)
def test_the_config_of_another_model_is_refused(change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        MiniMindConfig.from_dict({**MiniMindConfig().to_dict(), **change})


@pytest.mark.parametrize(
    "edit",
    [
        {"rope_theta": 0},
        {"rope_theta": 5e5},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    ],
)
def test_rope_settings_that_contradict_each_other_are_refused(edit: dict[str, Any]) -> None:
    """transformers 4 reads `rope_theta` and `rope_scaling`, where version 5 reads `rope_parameters`."""
    written = MiniMindConfig().to_dict()
    assert MiniMindConfig.from_dict(written) == MiniMindConfig()
    with pytest.raises(ConfigError, match=r"in one place and .* in rope_parameters; make them equal"):
        MiniMindConfig.from_dict({**written, **edit})
