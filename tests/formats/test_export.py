"""Models from every source in every format, and back again to the last bit."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minimind import load_tokenizer, pretrain
from minimind.errors import CheckpointError, ConfigError, UserError
from minimind.formats import export
from minimind.formats.export import export_model
from minimind.formats.huggingface import load_config, load_model, load_weights, save_model
from minimind.formats.open_model import load_with_tokenizer, open_model
from minimind.modeling.config import MiniMindConfig
from minimind.modeling.transformer import MiniMindForCausalLM
from minimind.tokenizer import PACKAGED
from support.tiny_runs import tiny, write_corpus

SHAPE = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 24, "max_position_embeddings": 64,
}  # fmt: skip
DTYPES = ("float32", "float16", "bfloat16")


def save(folder: Path, dtype: str = "float16", seed: int = 0, **changes) -> MiniMindConfig:
    """Write a model folder with weights of all magnitudes, negative zeros and subnormal numbers."""
    generator = torch.Generator().manual_seed(seed)
    model = MiniMindForCausalLM(MiniMindConfig(**{**SHAPE, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            exponents = torch.randint(-30, 12, parameter.shape, generator=generator)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 2.0**exponents)
            parameter[..., 0] = -0.0
    save_model(model, folder, dtype=getattr(torch, dtype))
    return load_config(folder)


def bits(weights: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, bytes]]:
    return {
        name: (tensor.dtype, tensor.contiguous().view(torch.uint8).numpy().tobytes())
        for name, tensor in weights.items()
    }


def stored(folder: Path) -> dict[str, tuple[torch.dtype, bytes]]:
    return bits(load_weights(folder, load_config(folder)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_hugging_face_folder_comes_back_to_the_last_bit(tmp_path, dtype, tied):
    config = save(tmp_path / "a", dtype, tie_word_embeddings=tied)
    done = export_model(tmp_path / "a", tmp_path / "b", max_shard_bytes=1000)
    assert done.dtype == dtype
    assert len(done.files) > 5
    assert load_config(tmp_path / "b") == config
    assert stored(tmp_path / "b") == stored(tmp_path / "a")
    assert (tmp_path / "b" / "config.json").read_bytes() == (tmp_path / "a" / "config.json").read_bytes()


@st.composite
def shapes(draw) -> dict[str, object]:
    kv_heads = draw(st.integers(1, 3))
    return {
        "vocab_size": draw(st.integers(3, 40)),
        "hidden_size": 2 * draw(st.integers(1, 8)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": kv_heads * draw(st.integers(1, 3)),
        "num_key_value_heads": kv_heads,
        "head_dim": draw(st.sampled_from([2, 6])),
        "intermediate_size": draw(st.integers(1, 24)),
        "rope_theta": draw(st.floats(10.0, 1e6)),
        "tie_word_embeddings": draw(st.booleans()),
        "max_position_embeddings": 64,
        "use_moe": draw(st.booleans()),
        "num_experts": draw(st.integers(2, 3)),
        "num_experts_per_tok": draw(st.integers(1, 2)),
        "norm_topk_prob": draw(st.booleans()),
    }


@settings(max_examples=12)
@given(shapes(), st.sampled_from(DTYPES), st.integers(0, 2**31), st.sampled_from([None, 1, 500, 10_000]))
def test_nothing_is_lost_from_format_to_format(shape, dtype, seed, max_shard_bytes):
    """Hugging Face to Hugging Face, to .pth, and from there to Hugging Face again, for any shape."""
    # Waiting for the disk a hundred times would be most of the test.
    with tempfile.TemporaryDirectory() as name, patch("os.fsync"):
        folder = Path(name)
        config = save(folder / "first", dtype, seed, **shape)
        export_model(folder / "first", folder / "again", max_shard_bytes=max_shard_bytes)
        export_model(folder / "again", folder / "pth", "minimind", dtype=dtype)
        export_model(next((folder / "pth").glob("*.pth")), folder / "last")
        for place in ("again", "last"):
            assert load_config(folder / place) == config
            assert stored(folder / place) == stored(folder / "first")


@pytest.mark.parametrize("kind", ["dense", "yarn", "moe"])
def test_the_originals_file_comes_back_to_the_last_bit(shared, tmp_path, kind):
    path = shared / "compat" / f"minimind3_{kind}_tiny.pth"
    done = export_model(path, tmp_path / "hf")
    assert any(note.startswith("configuration read from ") for note in done.notes)
    export_model(tmp_path / "hf", tmp_path / "pth", "minimind")
    theirs, ours = (torch.load(file, weights_only=True) for file in (path, *(tmp_path / "pth").glob("*.pth")))
    assert bits(theirs) == bits(ours)
    reference = load_file(path.with_suffix(".reference.safetensors"))
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(reference["input_ids"]).logits
    torch.testing.assert_close(logits, reference["logits"], atol=1e-4, rtol=0)


def test_settings_are_those_named_else_those_beside_else_those_of_the_tensors(tmp_path):
    config = save(tmp_path / "hf", rope_theta=500.0)
    export_model(tmp_path / "hf", tmp_path / "pth", "minimind")
    path = tmp_path / "pth" / "pretrain_16.pth"
    assert open_model(path).config == config
    beside = path.with_name("pretrain_16.config.json")
    beside.rename(tmp_path / "named.json")
    inferred = open_model(path)
    assert inferred.config == dataclasses.replace(config, rope_theta=1e6, max_position_embeddings=32768)
    assert "rope_theta 1e+06" in inferred.notes[0]
    assert open_model(path, tmp_path / "named.json").config == config


def test_a_shape_that_does_not_fit_names_the_tensor_and_both_shapes(tmp_path):
    save(tmp_path / "hf")
    export_model(tmp_path / "hf", tmp_path / "pth", "minimind")
    settings = tmp_path / "pth" / "pretrain_16.config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "intermediate_size": 32}))
    with pytest.raises(
        ConfigError, match=r"mlp.*_proj.weight is \(24, 16\), but the config makes it \(32, 16\)"
    ):
        export_model(tmp_path / "pth" / "pretrain_16.pth", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_precision_is_chosen_and_values_beyond_it_are_refused(tmp_path):
    save(tmp_path / "a", "float32")
    assert export_model(tmp_path / "a", tmp_path / "half", dtype="bfloat16").dtype == "bfloat16"
    weights = load_file(tmp_path / "half" / "model.safetensors")
    expected = {name: t.bfloat16() for name, t in load_file(tmp_path / "a" / "model.safetensors").items()}
    assert bits(weights) == bits(expected)
    model = load_model(tmp_path / "a")
    torch.nn.init.constant_(model.model.norm.weight, 1e6)
    save_model(model, tmp_path / "large", dtype=torch.float32)
    for format in ("huggingface", "minimind"):
        with pytest.raises(UserError, match=r"norm.weight has values too large for torch.float16"):
            export_model(tmp_path / "large", tmp_path / format, format, dtype="float16")
        assert not (tmp_path / format).exists()


def test_what_does_not_read_back_as_written_is_not_kept(tmp_path, monkeypatch):
    save(tmp_path / "a")

    def spoil(path: Path, tensors: dict[str, torch.Tensor], *, metadata: dict[str, str]) -> None:
        tensors["model.norm.weight"].view(torch.int16)[3] ^= 1
        save_file(tensors, path, metadata)

    monkeypatch.setattr("minimind.formats.huggingface.write_tensors", spoil)
    with pytest.raises(UserError, match=r"verification failed: model\.norm\.weight did not read back"):
        export_model(tmp_path / "a", tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize(
    ("format", "reader", "differing"),
    [
        ("huggingface", "load_config", r"config\.json"),
        ("huggingface", "load_weights", r"model\.norm\.weight"),
        ("original_minimind", "read_upstream_config", r"pretrain_16\.config\.json"),
        ("original_minimind", "read_upstream_weights", r"model\.norm\.weight"),
    ],
)
def test_files_that_read_back_as_another_model_are_refused(tmp_path, monkeypatch, format, reader, differing):
    config = save(tmp_path)
    weights = load_weights(tmp_path, config)
    module = getattr(export, format)
    read = getattr(module, reader)

    def changed(*arguments):
        found = read(*arguments)
        if isinstance(found, MiniMindConfig):
            return dataclasses.replace(found, rms_norm_eps=0.5)
        return found | {"model.norm.weight": found["model.norm.weight"] + 1}

    monkeypatch.setattr(module, reader, changed)
    write, limits = export._write_original, ()
    if format == "huggingface":
        write, limits = export._write_huggingface, (None, {})
    with pytest.raises(UserError, match=f"verification failed: {differing} did not read back as written"):
        write(tmp_path, weights, config, torch.float16, *limits)


def test_a_model_is_not_written_over_itself(tmp_path):
    save(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"--output .* is where the model is read from"):
        export_model(tmp_path / "a", tmp_path / "a", overwrite=True)


def test_names_that_are_not_known_are_refused(tmp_path):
    save(tmp_path / "a")
    with pytest.raises(ConfigError, match="--format onnx is not known; choose huggingface, minimind, gguf"):
        export_model(tmp_path / "a", tmp_path / "b", "onnx")
    with pytest.raises(ConfigError, match="--dtype int8 is not known; choose auto, float32, float16"):
        export_model(tmp_path / "a", tmp_path / "b", dtype="int8")
    with pytest.raises(ConfigError, match="--dtype q8_0 is for --format gguf"):
        export_model(tmp_path / "a", tmp_path / "b", dtype="q8_0")
    with pytest.raises(ConfigError, match="a GGUF file contains the tokenizer, and this model has none"):
        export_model(tmp_path / "a", tmp_path / "b", "gguf")
    too_small = (
        r"the tokenizer has 6400 entries, but the embedding of .*a has only 40; pass the tokenizer it was"
    )
    with pytest.raises(ConfigError, match=too_small):
        export_model(tmp_path / "a", tmp_path / "b", tokenizer=PACKAGED)
    with pytest.raises(ConfigError, match=too_small):
        load_with_tokenizer(tmp_path / "a", str(PACKAGED))


def test_a_tokenizer_that_is_named_goes_along_with_its_tokens(tmp_path, shared):
    transformers = pytest.importorskip("transformers")
    save(tmp_path / "a", vocab_size=6400, bos_token_id=6, eos_token_id=7, pad_token_id=8)
    done = export_model(
        tmp_path / "a", tmp_path / "b", tokenizer=shared / "compat" / "minimind3_tokenizer.json"
    )
    assert (done.config.bos_token_id, done.config.eos_token_id, done.config.pad_token_id) == (1, 2, 0)
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text())["eos_token_id"] == 2
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    text = "the cat sat on a mat, 猫坐在垫子上。"
    ours = load_tokenizer(tmp_path / "b")
    assert theirs(text).input_ids == [ours.bos_token_id, *ours.encode(text)]
    assert theirs.eos_token_id == 2
    assert not any("has no tokenizer" in note for note in done.notes)
    # Once there, it is found again; without any, the export says so.
    assert load_tokenizer(tmp_path / "b").fingerprint == open_model(tmp_path / "b").tokenizer().fingerprint
    assert any("has no tokenizer" in note for note in export_model(tmp_path / "a", tmp_path / "c").notes)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("missing", r"missing does not exist; name a run folder"),
        ("empty", r"empty holds no model; name a run folder"),
        ("notes.txt", r"notes.txt is not a .pth; name a run folder"),
    ],
)
def test_what_is_no_model_is_explained(tmp_path, name, sentence):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match=sentence):
        export_model(tmp_path / name, tmp_path / "b")


def test_settings_go_with_a_pth_only(tmp_path):
    save(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"has its own configuration; --model-config is for a \.pth"):
        export_model(tmp_path / "a", tmp_path / "b", model_config=tmp_path / "a" / "config.json")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    pretrain(tiny(corpus, out, max_steps=8))
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step-*"))[-1]


def test_a_run_gives_its_newest_checkpoint_in_full_precision(run, tmp_path):
    done = export_model(run, tmp_path / "b")
    assert done.source.startswith("checkpoint of step 8 (")
    assert done.dtype == "float32"
    assert stored(tmp_path / "b") == bits(load_file(newest(run) / "model.safetensors"))
    # The delivered model is the same, rounded, with the same config and tokenizer.
    assert load_config(tmp_path / "b") == load_config(run / "model")
    halves = {name: t.half() for name, t in load_weights(tmp_path / "b", done.config).items()}
    assert bits(halves) == stored(run / "model")
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == (run / "model" / "tokenizer.json").read_bytes()


def test_a_checkpoint_can_be_named(run, tmp_path):
    earlier = sorted((run / "checkpoints").glob("step-*"))[0]
    assert earlier != newest(run)
    done = export_model(earlier, tmp_path / "b")
    assert stored(tmp_path / "b") == bits(load_file(earlier / "model.safetensors"))
    assert done.source == f"checkpoint of step 4 ({earlier})"
    assert open_model(run / "checkpoints").path == newest(run)


def test_a_damaged_checkpoint_is_skipped_with_a_note(run, tmp_path):
    os.truncate(newest(run) / "optimizer.safetensors", 99)
    done = export_model(run, tmp_path / "b")
    assert done.source.startswith("checkpoint of step 4 (")
    assert "step-00000008 is skipped" in done.notes[0]
    with pytest.raises(CheckpointError, match=r"optimizer.safetensors has 99 bytes"):
        export_model(newest(run), tmp_path / "c")


def test_without_checkpoints_the_final_model_is_used(run, tmp_path):
    shutil.rmtree(run / "checkpoints")
    done = export_model(run, tmp_path / "b")
    assert done.source == f"Hugging Face folder ({run / 'model'})"
    assert "The final model is used instead" in done.notes[0]
    assert stored(tmp_path / "b") == stored(run / "model")
    shutil.rmtree(run / "model")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        export_model(run, tmp_path / "c")


def test_a_checkpoint_finds_the_tokenizer_it_was_trained_with_or_says_that_it_cannot(corpus, tmp_path):
    load_tokenizer().save(tmp_path / "tokenizer")
    pretrain(tiny(corpus, tmp_path / "out", max_steps=1, tokenizer=str(tmp_path / "tokenizer")))
    shutil.rmtree(tmp_path / "out" / "model")
    tokenizer = open_model(tmp_path / "out").tokenizer()
    assert tokenizer.fingerprint == load_tokenizer().fingerprint
    roles = tmp_path / "tokenizer" / "tokenizer_config.json"
    roles.write_text(json.dumps({**json.loads(roles.read_text()), "eos_token": "<|reserved_0|>"}))
    with pytest.raises(ConfigError, match=r"the tokenizer of .*, .*tokenizer, was moved or changed"):
        export_model(tmp_path / "out", tmp_path / "b")
    assert "tokenizer.json" in export_model(tmp_path / "out", tmp_path / "b", tokenizer=roles.parent).files


def test_a_custom_model_is_not_treated_as_ours(corpus, tmp_path):
    class Own(MiniMindForCausalLM):
        pass

    pretrain(tiny(corpus, tmp_path / "out", max_steps=1), model_factory=Own)
    with pytest.raises(CheckpointError, match=r"has no model configuration.* a custom model"):
        export_model(tmp_path / "out", tmp_path / "b")


def test_every_format_holds_the_same_model(run, tmp_path):
    done = [export_model(run, tmp_path / name, name, dtype="float16") for name in ("huggingface", "minimind")]
    files = [set(one.files) for one in done]
    assert files[0] == {
        "README.md", "checksums.json", "config.json", "generation_config.json", "model.safetensors",
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert files[1] >= {"pretrain_32.pth", "pretrain_32.config.json", "tokenizer.json"}
    weights = torch.load(tmp_path / "minimind" / "pretrain_32.pth", weights_only=True)
    assert torch.equal(weights.pop("lm_head.weight"), weights["model.embed_tokens.weight"])
    assert bits(weights) == stored(tmp_path / "huggingface")


def test_a_run_becomes_one_gguf_file(run, tmp_path):
    gguf = pytest.importorskip("gguf")
    done = export_model(run, tmp_path / "mine", "gguf", dtype="q8_0")
    assert list(done.files) == ["mine-q8_0.gguf"]
    reader = gguf.GGUFReader(tmp_path / "mine" / "mine-q8_0.gguf")
    assert reader.get_field("general.name").contents() == "mine"
    assert len(reader.get_field("tokenizer.ggml.tokens").contents()) == 6400


def test_training_starts_from_any_of_them(run, corpus, tmp_path):
    export_model(run, tmp_path / "pth", "minimind", dtype="float32")
    first = []
    for number, source in enumerate((run, newest(run), tmp_path / "pth" / "pretrain_32.pth")):
        out = tmp_path / f"from-{number}"
        pretrain(tiny(corpus, out, from_weight=str(source), max_steps=1, dropout=0.0))
        lines = (out / "metrics.jsonl").read_text().splitlines()
        first.append(next(row["val_loss"] for row in map(json.loads, lines) if "val_loss" in row))
    assert first[0] == first[1] == first[2]


QWEN_LIKE = {
    # As in Qwen3's folders: no pad_token_id in config.json, two end tokens, sampling by default.
    "ids": {"bos_token_id": 3, "eos_token_id": [5, 6]},
    "generation": {"bos_token_id": 3, "do_sample": True, "eos_token_id": [5, 6], "pad_token_id": None,
                   "temperature": 0.6, "top_k": 20, "top_p": 0.95},
}  # fmt: skip


def with_settings(folder: Path, generation: dict[str, object] | None) -> Path:
    """Write a model folder with the ids, and maybe the generation settings, of `QWEN_LIKE`."""
    save(folder)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        del values[name]
    path.write_text(json.dumps({**values, **QWEN_LIKE["ids"]}))
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize("generation", [QWEN_LIKE["generation"], None], ids=["settings", "ids only"])
def test_a_folder_keeps_its_token_ids_and_generation_settings(tmp_path, generation):
    first = with_settings(tmp_path / "a", generation)
    export_model(first, tmp_path / "b")
    export_model(tmp_path / "b", tmp_path / "c")
    written = json.loads((tmp_path / "c" / "config.json").read_text())
    ids = {name: written[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    assert ids == {**QWEN_LIKE["ids"], "pad_token_id": None}
    stored_settings = json.loads((tmp_path / "c" / "generation_config.json").read_text())
    assert stored_settings == (ids if generation is None else generation)


def test_an_exported_folder_generates_in_transformers_what_the_source_does(tmp_path):
    transformers = pytest.importorskip("transformers")
    first = with_settings(tmp_path / "a", QWEN_LIKE["generation"])
    export_model(first, tmp_path / "b")
    # 0 is a token like any other: treated as padding it would be masked.
    prompt = torch.tensor([[7, 0, 0, 9]])
    outputs = []
    for folder in (first, tmp_path / "b"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        settings = model.generation_config
        assert (settings.eos_token_id, settings.pad_token_id) == ([5, 6], None)
        assert (settings.do_sample, settings.temperature, settings.top_k) == (True, 0.6, 20)
        torch.manual_seed(0)
        outputs.append([model.generate(prompt, max_new_tokens=12) for _ in range(4)])
        # Chosen for certain, the second end token ends the text.
        ended = model.generate(prompt, max_new_tokens=12, sequence_bias=[[[6], 1e9]])
        assert ended.tolist() == [[7, 0, 0, 9, 6]]
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_another_tokenizer_replaces_the_ids_and_leaves_the_sampling(tmp_path):
    first = with_settings(tmp_path / "a", QWEN_LIKE["generation"])
    save(tmp_path / "large", vocab_size=6400)
    for name in ("model.safetensors", "config.json"):
        shutil.copy(tmp_path / "large" / name, first / name)
    (first / "checksums.json").unlink()
    export_model(first, tmp_path / "b", tokenizer=PACKAGED)
    settings = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert (settings["eos_token_id"], settings["pad_token_id"], settings["temperature"]) == (2, 0, 0.6)


def test_damaged_generation_settings_are_named(tmp_path):
    save(tmp_path / "a")
    (tmp_path / "a" / "generation_config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"generation_config\.json is not a JSON object; copy it again"):
        open_model(tmp_path / "a")
