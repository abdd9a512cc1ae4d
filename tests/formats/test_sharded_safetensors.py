"""Safetensors in one file or several: what transformers reads and writes, and indexes that do not fit."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minimind.errors import ConfigError
from minimind.formats.huggingface import load_model, load_weights, save_model, save_weights
from minimind.formats.sharded_safetensors import INDEX, WEIGHTS, plan_files, read_weights
from minimind.modeling.config import MiniMindConfig
from minimind.modeling.transformer import MiniMindForCausalLM

CONFIG = MiniMindConfig(
    vocab_size=96, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
)
IDS = torch.arange(40)[None]


@pytest.fixture(scope="module")
def model() -> MiniMindForCausalLM:
    torch.manual_seed(0)
    return MiniMindForCausalLM(CONFIG).half().float().eval()


def save_sharded(model: MiniMindForCausalLM, folder: Path, max_bytes: int = 20_000) -> Path:
    save_weights(model.state_dict(), model.config, folder, max_shard_bytes=max_bytes)
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def test_files_are_filled_in_order_up_to_the_limit_and_a_large_tensor_has_its_own():
    sizes = {"a": 4, "b": 4, "c": 9, "d": 1, "e": 5}
    assert plan_files(sizes, 8) == {
        "model-00001-of-00003.safetensors": ["a", "b"],
        "model-00002-of-00003.safetensors": ["c"],
        "model-00003-of-00003.safetensors": ["d", "e"],
    }
    assert plan_files(sizes, 23) == plan_files(sizes, None) == {WEIGHTS: list(sizes)}


def test_transformers_reads_our_shards(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_sharded(model, tmp_path)
    assert len(shards(tmp_path)) > 3
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 20_000 for file in shards(tmp_path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, atol=1e-4, rtol=0)


def test_we_read_the_shards_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**CONFIG.to_dict())).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(shards(tmp_path)) > 3
    read = load_weights(tmp_path, CONFIG)
    stored = theirs.state_dict()
    assert read.keys() == stored.keys() - {"lm_head.weight"}
    assert all(torch.equal(tensor, stored[name]) for name, tensor in read.items())


def test_the_index_counts_the_bytes_and_places_every_tensor(model, tmp_path):
    save_sharded(model, tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    stored = {name: tensor for file in shards(tmp_path) for name, tensor in load_file(file).items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    assert index["weight_map"].keys() == stored.keys()


@pytest.mark.parametrize("sharded_first", [True, False])
def test_saving_again_leaves_no_file_of_the_earlier_save(model, tmp_path, sharded_first):
    torch.manual_seed(5)
    old = MiniMindForCausalLM(CONFIG)
    if sharded_first:
        save_sharded(old, tmp_path)
        save_model(model, tmp_path)
        assert not shards(tmp_path)
        assert not (tmp_path / INDEX).exists()
    else:
        save_model(old, tmp_path)
        save_sharded(model, tmp_path)
        assert not (tmp_path / WEIGHTS).exists()
    back = load_model(tmp_path).state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def change_index(folder: Path, **changes: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].update(changes)
    (folder / INDEX).write_text(json.dumps(index))


BROKEN = {
    "a shard is missing": (lambda f: shards(f)[1].unlink(), r"has no model-00002-of-.*copy all files"),
    "a shard is cut off": (
        lambda f: os.truncate(shards(f)[1], 999),
        r"00002-of-.* is damaged",
    ),
    "a tensor is missing": (
        lambda f: change_index(f, more=shards(f)[0].name),
        r"index.json and its files disagree on more",
    ),
    "a file elsewhere": (
        lambda f: change_index(f, more=f"../{f.name}/{shards(f)[0].name}"),
        r"has no \.\./.*, which model.safetensors.index.json names",
    ),
    "no json": (lambda f: (f / INDEX).write_text("{"), r"cannot be read as an index"),
    "no map": (lambda f: (f / INDEX).write_text('{"weight_map": [1]}'), r"does not give each tensor a file"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_an_index_that_does_not_fit_is_explained(fault, model, tmp_path):
    damage, sentence = BROKEN[fault]
    damage(save_sharded(model, tmp_path))
    with pytest.raises(ConfigError, match=sentence):
        read_weights(tmp_path)


def test_quantized_weights_are_refused(model, tmp_path):
    save_model(model, tmp_path)
    weights = {name: t.to(torch.float8_e4m3fn) for name, t in load_file(tmp_path / WEIGHTS).items()}
    save_file(weights, tmp_path / WEIGHTS)
    (tmp_path / "checksums.json").unlink()
    with pytest.raises(ConfigError, match=r"is torch.float8_e4m3fn; quantized weights cannot be read"):
        load_weights(tmp_path, CONFIG)
