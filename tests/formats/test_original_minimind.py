"""The original's files: shape, weights and refusals. Its logits: test_transformer.py."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
import torch

from minimind.errors import ConfigError
from minimind.formats.huggingface import to_checkpoint_names
from minimind.formats.original_minimind import (
    infer_upstream_config,
    load_upstream,
    read_upstream_config,
    read_upstream_weights,
    save_upstream,
    unset_by_commands,
    upstream_config,
    upstream_settings,
)
from minimind.modeling.config import MiniMindConfig
from minimind.modeling.transformer import MiniMindForCausalLM

TINY = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 24,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["dense", "yarn", "moe"])
def test_the_originals_weights_are_read_without_loss(shared, kind):
    path = shared / "compat" / f"minimind3_{kind}_tiny"
    model = load_upstream(path.with_suffix(".pth"), read_upstream_config(path.with_suffix(".config.json")))
    stored = torch.load(path.with_suffix(".pth"), weights_only=True)
    weights = to_checkpoint_names(model.state_dict())
    assert weights.keys() == stored.keys()
    for name, tensor in weights.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor.half(), stored[name])


def test_the_original_normalizes_the_weight_of_a_single_expert_too():
    config = upstream_config({**TINY, "use_moe": True})
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (4, 1, 24)
    assert (config.norm_topk_prob, config.router_aux_loss_coef) == (True, 5e-4)
    assert upstream_config({**TINY, "use_moe": True, "norm_topk_prob": False}).norm_topk_prob is False


def test_a_mixture_does_not_fit_a_dense_config(shared):
    path = shared / "compat" / "minimind3_moe_tiny"
    dense = {**json.loads(path.with_suffix(".config.json").read_text()), "use_moe": False}
    with pytest.raises(ConfigError, match=r"moe_tiny.pth has no .*mlp.down_proj.*Use the config"):
        load_upstream(path.with_suffix(".pth"), upstream_config(dense))


def test_yarn_takes_the_originals_defaults_and_acts_only_beyond_the_original_length():
    short = {"type": "yarn", "original_max_position_embeddings": 64}
    assert upstream_config({**TINY, "rope_scaling": short}).rope_scaling == {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": 1.0,
    }
    off = upstream_config({**TINY, "rope_scaling": short, "inference_rope_scaling": False})
    assert off.rope_scaling is None
    within = upstream_config({**TINY, "rope_scaling": short, "max_position_embeddings": 64})
    assert within.rope_scaling["factor"] == 1.0


def test_a_file_that_would_run_code_is_not_run(tmp_path):
    ran = tmp_path / "ran"

    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    torch.save({"weights": Harmful()}, tmp_path / "x.pth")
    with pytest.raises(ConfigError, match="cannot be read as a state dict"):
        load_upstream(tmp_path / "x.pth", MiniMindConfig(**TINY))
    assert not ran.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (torch.nn.Linear(2, 2), "it contains torch.nn.modules.linear.Linear, which is not a tensor"),
        (b"", "EOFError, it is empty or cut off"),
        (bytes(1000), "torch.save did not write it, or it is damaged"),
    ],
)
def test_what_cannot_be_read_is_explained_without_advice_to_run_it(tmp_path, content, reason):
    if isinstance(content, bytes):
        (tmp_path / "x.pth").write_bytes(content)
    else:
        torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ConfigError) as refused:
        read_upstream_weights(tmp_path / "x.pth")
    assert str(refused.value) == f"{tmp_path / 'x.pth'} cannot be read as a state dict: {reason}."


def test_files_that_are_no_weights_are_explained(tmp_path):
    config = MiniMindConfig(**TINY)
    with pytest.raises(ConfigError, match=r"does not exist; name a \.pth"):
        load_upstream(tmp_path / "none.pth", config)
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ConfigError, match=r"text.pth cannot be read as a state dict"):
        load_upstream(tmp_path / "text.pth", config)
    torch.save({"model": {}, "step": 3}, tmp_path / "resume.pth")
    with pytest.raises(ConfigError, match=r"name a pretrain_.*pth, not a resume file"):
        load_upstream(tmp_path / "resume.pth", config)
    weights = MiniMindForCausalLM(config).half().state_dict()
    torch.save(weights, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"is \(32, 16\), but the config makes it \(33, 16\)"):
        load_upstream(tmp_path / "other.pth", MiniMindConfig(**{**TINY, "vocab_size": 33}))
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ConfigError, match="is not a JSON object"):
        read_upstream_config(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_upstream_config(tmp_path / "none.json")
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "hidden_size": "16"}))
    with pytest.raises(ConfigError, match=r"config.json: hidden_size 16 is not a size"):
        read_upstream_config(tmp_path / "config.json")
    for odd in ({**weights, 1: torch.ones(2)}, {**weights, "model.norm.weight": torch.ones(16).to_sparse()}):
        torch.save(odd, tmp_path / "odd.pth")
        with pytest.raises(ConfigError, match=r"odd.pth contains more than weights"):
            load_upstream(tmp_path / "odd.pth", config)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("dense", "pretrain_64.pth"), ("yarn", "pretrain_64.pth"), ("moe", "pretrain_64_moe.pth")],
)
def test_what_is_written_is_what_the_originals_trainer_writes(shared, tmp_path, kind, name):
    """The same names, shapes, types and bits: what loads the one strictly loads the other."""
    path = shared / "compat" / f"minimind3_{kind}_tiny"
    config = read_upstream_config(path.with_suffix(".config.json"))
    stored = read_upstream_weights(path.with_suffix(".pth"))
    written = save_upstream(stored, config, tmp_path)
    assert written.name == name
    theirs, ours = (torch.load(file, weights_only=True) for file in (path.with_suffix(".pth"), written))
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == torch.float16
        assert torch.equal(ours[key], tensor), key
    settings = json.loads(written.with_suffix(".config.json").read_text())
    expected = json.loads(path.with_suffix(".config.json").read_text())
    of_experts = {"num_experts", "num_experts_per_tok", "moe_intermediate_size"}
    of_experts |= {"norm_topk_prob", "router_aux_loss_coef"}
    for key in expected.keys() - {"rope_scaling", *(of_experts if kind != "moe" else ())}:
        assert settings[key] == expected[key], key
    assert read_upstream_config(written.with_suffix(".config.json")) == config


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_shape_is_worked_out_from_the_tensors(shared, kind):
    path = shared / "compat" / f"minimind3_{kind}_tiny"
    given = read_upstream_config(path.with_suffix(".config.json"))
    inferred = infer_upstream_config(read_upstream_weights(path.with_suffix(".pth")), "x.pth")
    # What is no tensor is as the original's commands always build it.
    assert inferred == dataclasses.replace(given, max_position_embeddings=32768, num_experts_per_tok=1)


def test_untied_weights_are_recognized_by_their_values():
    config = MiniMindConfig(**TINY, tie_word_embeddings=False)
    weights = MiniMindForCausalLM(config).state_dict()
    assert infer_upstream_config(weights, "x.pth") == config


def test_a_flipped_bit_is_found(tmp_path):
    weights = MiniMindForCausalLM(MiniMindConfig(**TINY)).state_dict()
    torch.save(weights, tmp_path / "x.pth")
    assert read_upstream_weights(tmp_path / "x.pth").keys() == weights.keys()
    content = bytearray((tmp_path / "x.pth").read_bytes())
    content[content.index(weights["model.norm.weight"].numpy().tobytes())] ^= 1
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ConfigError, match=r"x.pth is corrupt: checksum mismatch in x/data/\d+"):
        read_upstream_weights(tmp_path / "x.pth")


def test_an_older_architecture_is_not_accepted_as_this_one():
    weights = MiniMindForCausalLM(MiniMindConfig(**TINY)).state_dict()
    del weights["model.layers.0.self_attn.q_norm.weight"]
    with pytest.raises(ConfigError, match=r"x.pth has no .*q_norm.weight: it is of another architecture"):
        infer_upstream_config(weights, "x.pth")
    for shape in ((2, 2), (0,), (3,)):
        with pytest.raises(ConfigError, match=r"x.pth is no state dict"):
            infer_upstream_config(
                {**weights, "model.layers.0.self_attn.q_norm.weight": torch.ones(shape)}, "x.pth"
            )


def test_a_yarn_that_the_original_has_not_is_refused():
    known = {
        "rope_type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 2048,
        "attention_factor": 1.0,
    }
    settings = upstream_settings(
        MiniMindConfig(**TINY, rope_scaling={**known, "beta_fast": 32, "beta_slow": 1})
    )
    assert settings["inference_rope_scaling"]
    assert upstream_config(settings).rope_scaling["factor"] == 16
    for changes in ({"factor": 4}, {"attention_factor": None}, {"truncate": False}):
        with pytest.raises(ConfigError, match="the original minimind supports one YaRN only"):
            upstream_settings(MiniMindConfig(**TINY, rope_scaling={**known, **changes}))
    with pytest.raises(ConfigError, match="the original minimind supports one YaRN only"):
        upstream_settings(MiniMindConfig(**TINY, rope_scaling=known, max_position_embeddings=2048))
    idle = MiniMindConfig(**TINY, rope_scaling={**known, "factor": 1})
    assert not upstream_settings(idle)["inference_rope_scaling"]


def test_sizes_that_the_originals_commands_cannot_build_are_named():
    as_built = {"num_key_value_heads": 4, "intermediate_size": 1664}
    assert list(unset_by_commands(MiniMindConfig(hidden_size=512, **as_built))) == []
    others = list(unset_by_commands(MiniMindConfig(hidden_size=512, num_key_value_heads=4)))
    assert others == ["intermediate_size 1408 (not 1664)"]
    experts = {"use_moe": True, "num_experts": 8}
    others = list(unset_by_commands(MiniMindConfig(hidden_size=512, **as_built, **experts)))
    assert others == ["num_experts 8 (not 4)", "norm_topk_prob False (not True)"]
