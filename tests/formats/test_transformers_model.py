"""Models that transformers computes: opened, run and saved like those of minimind."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from minimind.config.options import PretrainConfig
from minimind.errors import ConfigError
from minimind.formats.open_model import open_model
from minimind.formats.transformers_folder import load_model, stored_dtype, write_model
from minimind.formats.transformers_model import TransformersModel
from minimind.generation.generate import generate
from minimind.generation.sampling import Sampling
from minimind.optim.build import build_optimizer
from support.foreign_models import save_shape

transformers = pytest.importorskip("transformers")


@pytest.fixture(params=["llama", "qwen2", "gpt2", "mistral", "opt"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_shape(request.param, tmp_path / request.param)


def opened(folder: Path) -> TransformersModel:
    model = open_model(folder).load()
    assert isinstance(model, TransformersModel)
    return model


def packed(vocab_size: int, lengths: list[int]) -> dict[str, torch.Tensor]:
    """Return a sequence of several documents, as the loader builds it."""
    ids = torch.arange(sum(lengths))[None] * 7 % vocab_size
    numbers = torch.cat([torch.full((length,), n) for n, length in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {"input_ids": ids, "document_ids": numbers.int(), "position_ids": positions.int()}


def test_a_packed_document_has_the_logits_of_the_document_alone(folder: Path) -> None:
    model = opened(folder)
    lengths = [5, 1, 9, 17]
    batch = packed(model.config.vocab_size, lengths)
    logits = model(**batch).logits[0]
    first = 0
    for length in lengths:
        alone = model.network(input_ids=batch["input_ids"][:, first : first + length]).logits[0]
        torch.testing.assert_close(logits[first : first + length], alone, atol=1e-5, rtol=1e-5)
        first += length
    model.separation = "none"
    assert not torch.allclose(model(**batch).logits[0], logits, atol=1e-4)


def test_a_model_without_positions_says_that_documents_are_not_kept_apart(tmp_path: Path) -> None:
    model = opened(save_shape("bloom", tmp_path))
    (note,) = model.notes
    assert note.startswith("documents in a packed sequence are not kept apart, because BloomForCausalLM")
    assert opened(save_shape("llama", tmp_path / "llama")).notes == ()


def test_a_model_in_which_tokens_see_later_ones_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokens attend to later ones"):
        opened(save_shape("bert", tmp_path))


def test_the_loss_is_the_summed_cross_entropy(tmp_path: Path) -> None:
    model = opened(save_shape("llama", tmp_path))
    batch = packed(model.config.vocab_size, [12])
    labels = batch["input_ids"].roll(-1)
    labels[0, 3] = labels[0, -1] = -100
    loss = model(batch["input_ids"], shift_labels=labels, num_items_in_batch=2).loss
    reference = model.network(input_ids=batch["input_ids"], labels=batch["input_ids"])
    logits = reference.logits[0].log_softmax(-1)
    expected = -sum(logits[n, labels[0, n]] for n in range(11) if n != 3) / 2
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model(batch["input_ids"], labels=batch["input_ids"]).loss, reference.loss)


def test_the_state_dict_has_the_names_of_transformers(folder: Path) -> None:
    model = opened(folder)
    names = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict().keys()
    state = model.state_dict()
    assert list(state) == list(names)
    assert model.load_state_dict(state).missing_keys == []


def test_a_saved_model_is_the_one_that_was_opened(folder: Path, tmp_path: Path) -> None:
    source, model = open_model(folder), opened(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    (tmp_path / "again").mkdir()
    state = {name: tensor for name, tensor in model.state_dict().items() if name in source.weights()}
    files = write_model(state, model.config, tmp_path / "again", torch.float32)
    assert files == ["model.safetensors"]
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert type(back) is type(model.network)
    ids = packed(model.config.vocab_size, [20])["input_ids"]
    assert torch.equal(back(ids).logits, model(ids).logits)
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again"))
    assert {key for key in before | after if before.get(key) != after.get(key)} <= {"dtype"}
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_muon_updates_the_matrices_of_linear_layers(folder: Path) -> None:
    model = opened(folder)
    groups = build_optimizer(model, PretrainConfig(optimizer="muon"), "cpu").param_groups
    by_name = {name: group.get("algorithm") for group in groups for name in group["param_names"]}
    inner = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    } - {"lm_head.weight"}
    assert inner
    assert {name for name, algorithm in by_name.items() if algorithm == "muon"} == inner
    assert len(by_name) == len(list(model.parameters()))


def test_dropout_is_that_of_the_run(tmp_path: Path) -> None:
    folder = save_shape("gpt2", tmp_path)  # with a dropout of 0.1
    model = opened(folder).train()
    ids = packed(model.config.vocab_size, [20])["input_ids"]
    assert torch.equal(model(ids).logits, model(ids).logits)
    source = open_model(folder)
    config = type(model.config)(**{**vars(source.config), "dropout": 0.5})
    model = load_model(config).train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_generation_continues_as_transformers_does(folder: Path) -> None:
    model = opened(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # so that positions matter
    prompts = [[5, 9, 11, 2, 8], [7, 3]]
    greedy = Sampling(temperature=0.0)
    found = generate(model, prompts, greedy, max_new_tokens=8)
    for prompt, tokens in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        for _ in range(8):
            ids = torch.cat((ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)), 1)
        assert tokens == ids[0, len(prompt) :].tolist()


def test_the_published_precision_is_kept(tmp_path: Path) -> None:
    folder = save_shape("llama", tmp_path, dtype=torch.bfloat16)
    source = open_model(folder)
    assert stored_dtype(source.config) == torch.bfloat16
    assert {tensor.dtype for tensor in source.weights().values()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in opened(folder).parameters()} == {torch.float32}


def test_sizes_are_read_from_any_config(folder: Path) -> None:
    config = open_model(folder).config
    sizes = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads)
    assert sizes == (32, 2, 4)
    network = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert config.num_parameters() == sum(parameter.numel() for parameter in network.parameters())
    assert config.max_position_embeddings == 128
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * 32
    assert config.flops_per_token(8) == 6 * (config.num_parameters() - embedding) + 6 * 2 * 32 * 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "unheard_of"}, "does not know the model type 'unheard_of'"),
        ({"quantization_config": {"bits": 4}}, "has quantized weights"),
        ({"hidden_size": None, "n_embd": None}, "hidden_size is None"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, not a size"),
        ({"num_hidden_layers": 3}, "has no model.layers.2"),
    ],
)
def test_a_folder_that_cannot_be_opened_is_one_sentence(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = save_shape("llama", tmp_path)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(ConfigError, match=words) as raised:
        opened(folder)
    assert "\n" not in str(raised.value)


def test_damaged_weights_are_one_sentence(tmp_path: Path) -> None:
    folder = save_shape("llama", tmp_path)
    (folder / "model.safetensors").write_bytes(b"1234567890")
    with pytest.raises(ConfigError, match=r"cannot be opened by transformers \(.*\)\.$"):
        opened(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot be opened by transformers"):
        opened(folder)


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_shape("llama", tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="pip install transformers"):
        open_model(folder)


def test_a_tokenizer_of_another_format_is_converted(tmp_path: Path) -> None:
    folder = save_shape("gpt2", tmp_path)
    kept = open_model(folder).tokenizer()
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    names = ("bos_token", "eos_token", "pad_token")
    settings = {"tokenizer_class": "GPT2Tokenizer", **{name: settings[name] for name in names}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").unlink()
    converted = open_model(folder).tokenizer()
    assert kept is not None
    assert converted is not None
    assert converted.encode("the cat sat.") == kept.encode("the cat sat.")
    assert converted.eos_token_id == kept.eos_token_id
