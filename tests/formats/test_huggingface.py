"""Model folders: transformers reads ours, we read those of transformers, and broken ones are explained."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minimind.errors import ConfigError, UserError
from minimind.formats.huggingface import load_config, load_model, save_model, save_weights
from minimind.modeling.config import MiniMindConfig
from minimind.modeling.transformer import MiniMindForCausalLM

SHAPE = {
    "vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "wide heads": {"head_dim": 24, "num_key_value_heads": 1},
    "one expert": {"use_moe": True},
    "two experts": {"use_moe": True, "num_experts_per_tok": 2, "moe_intermediate_size": 40},
    "one expert, normalized": {"use_moe": True, "norm_topk_prob": True, "head_dim": 24},
    "yarn": {"rope_scaling": YARN},
    "yarn with all numbers": {
        "rope_scaling": {**YARN, "attention_factor": 1.0, "beta_fast": 16, "beta_slow": 2}
    },
}
IDS = torch.randint(96, (2, 100), generator=torch.Generator().manual_seed(0))


def build(**changes) -> MiniMindForCausalLM:
    """A model whose weights float16 holds exactly, with norms that do something."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(**{**SHAPE, "initializer_range": 0.1, **changes}))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    return model.half().float().eval()


@pytest.fixture
def folder(tmp_path) -> Path:
    save_model(build(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_loads_our_folder_and_gives_our_logits(variant, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = build(**VARIANTS[variant])
    save_model(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    kind = "Qwen3MoeForCausalLM" if model.config.use_moe else "Qwen3ForCausalLM"
    assert type(theirs).__name__ == kind
    with torch.no_grad():
        expected, ours = theirs(IDS, labels=IDS), model(IDS, labels=IDS)
    torch.testing.assert_close(ours.logits, expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.loss, expected.loss, atol=1e-5, rtol=0)
    assert theirs.config.dtype == torch.float32
    assert theirs.generation_config.eos_token_id == model.config.eos_token_id


@pytest.mark.parametrize("variant", VARIANTS)
def test_we_load_a_folder_of_transformers_and_give_its_logits(variant, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = MiniMindConfig(**{**SHAPE, "initializer_range": 0.1, **VARIANTS[variant]}).to_dict()
    torch.manual_seed(1)
    kind = "Qwen3Moe" if VARIANTS[variant].get("use_moe") else "Qwen3"
    described = getattr(transformers, f"{kind}Config")(**config)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(described)
    for name, parameter in theirs.named_parameters():
        if name.endswith("mlp.gate.weight"):  # transformers begins with zeros
            torch.nn.init.normal_(parameter)
    theirs.eval().save_pretrained(tmp_path)
    model = load_model(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_model_comes_back_the_same(variant, tmp_path):
    model = build(**VARIANTS[variant])
    save_model(model, tmp_path)
    back = load_model(tmp_path)
    assert back.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert (back.lm_head.weight is back.model.embed_tokens.weight) == model.config.tie_word_embeddings


def test_each_matrix_of_each_expert_stands_by_itself_in_a_file(tmp_path):
    model = build(use_moe=True)
    save_model(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for projection in ("gate_proj", "up_proj", "down_proj"):
        stack = model.state_dict()[f"model.layers.1.mlp.experts.{projection}"]
        for e in range(4):
            stored = weights.pop(f"model.layers.1.mlp.experts.{e}.{projection}.weight")
            assert torch.equal(stored.float(), stack[e])
    assert not any("layers.1.mlp.experts" in name for name in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_rounded_and_a_tied_matrix_is_written_once(dtype, tmp_path):
    model = build()
    save_model(model, tmp_path, dtype=dtype, generation={"temperature": 0.7})
    weights = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    assert weights.keys() == model.state_dict().keys() - {"lm_head.weight"}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == str(dtype).split(".")[1]
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "temperature": 0.7}


def test_saving_again_replaces_the_model_and_leaves_other_files(folder):
    (folder / "tokenizer.json").write_text("{}")
    before = {path.name for path in folder.iterdir()}
    other = build(hidden_size=32)
    save_model(other, folder)
    assert {path.name for path in folder.iterdir()} == before
    assert load_model(folder).config == other.config


def test_a_save_that_fails_leaves_the_old_model(folder, monkeypatch):
    old = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match=r"could not be written to .*No space left"):
        save_model(build(hidden_size=32), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old


def test_weights_that_float16_cannot_hold_are_not_saved_as_infinity(folder):
    model = build()
    torch.nn.init.constant_(model.model.norm.weight, 1e5)
    with pytest.raises(UserError, match=r"model.norm.weight has values too large for torch.float16"):
        save_model(model, folder)
    save_model(model, folder, dtype=torch.bfloat16)


def test_a_gathered_state_dict_is_saved_as_the_model_is(folder, tmp_path):
    model = build()
    save_weights(model.state_dict(), model.config, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, drop: str | None = None, **added: torch.Tensor) -> None:
    weights = {**load_file(folder / "model.safetensors"), **added}
    weights.pop(drop or "", None)
    save_file(weights, folder / "model.safetensors")
    (folder / "checksums.json").unlink()


BROKEN = {
    "no folder": (
        lambda f: os.rename(f, f.with_name("moved")),
        r"model is not a folder; name a folder",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), r"holds no config.json; name a folder"),
    "bad json": (lambda f: (f / "config.json").write_text("{"), r"config.json is not valid JSON"),
    "no object": (
        lambda f: (f / "config.json").write_text("[]"),
        r"config.json: the file is not a JSON object",
    ),
    "llama": (lambda f: change_config(f, model_type="llama"), r"model_type is 'llama'.*; name a folder"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"has no model.safetensors .* save the"),
    "cut off": (lambda f: os.truncate(f / "model.safetensors", 999), "model.safetensors is damaged"),
    "missing": (lambda f: change_weights(f, drop="model.norm.weight"), r"has no model.norm.weight. Use the"),
    "unexpected": (lambda f: change_weights(f, bias=torch.ones(2)), r"has an unexpected bias"),
    "more layers": (
        lambda f: change_config(f, num_hidden_layers=3),
        r"has 2 layers, but num_hidden_layers is 3\. Use",
    ),
    "shape": (
        lambda f: change_config(f, vocab_size=97),
        r"model.embed_tokens.weight is \(96, 48\), but the config makes it \(97, 48\)",
    ),
    "tied but different": (
        lambda f: change_weights(f, **{"lm_head.weight": torch.ones(96, 48)}),
        r"lm_head.weight differs from model.embed_tokens.weight",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_folder_that_cannot_be_used_is_explained(fault, folder):
    damage, sentence = BROKEN[fault]
    damage(folder)
    with pytest.raises(ConfigError, match=sentence):
        load_model(folder)


def test_the_config_alone_can_be_read(folder):
    (folder / "model.safetensors").unlink()
    assert load_config(folder) == build().config
