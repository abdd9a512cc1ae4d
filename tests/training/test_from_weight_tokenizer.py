"""`--from-weight` and the tokenizer: that of the weights, unless another is named."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from minimind.config.options import PretrainConfig
from minimind.errors import ConfigError
from minimind.formats.open_model import open_model, training_tokenizer
from minimind.run_folder import RunFolder
from minimind.tokenizer import PACKAGED, Tokenizer, load_tokenizer, train_tokenizer
from minimind.training.pretrain import pretrain
from minimind.training.setup import resolve_run
from support import tiny_runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a tokenizer of fewer entries than the packaged one has, whose ids mean other text."""
    folder = tmp_path_factory.mktemp("from-weight")
    corpus = tiny_runs.write_corpus(folder / "corpus.jsonl")
    train_tokenizer(corpus.read_text().splitlines(), 300).save(folder / "own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        changes = {"tokenizer": str(folder / "own"), "vocab_size": 6400}
        pretrain(tiny_runs.tiny(corpus, folder / "base", max_steps=12, **changes))
    return folder


def own(folder: Path) -> Tokenizer:
    return load_tokenizer(str(folder / "own"))


def continued(folder: Path, out: Path) -> PretrainConfig:
    """Return the options of a run that starts from the weights of the first run."""
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    changes = {**dict.fromkeys(sizes), "from_weight": str(folder / "base")}
    return tiny_runs.tiny(folder / "corpus.jsonl", out, max_steps=2, **changes)


@pytest.mark.parametrize("path", ["base", "base/model", "base/checkpoints"])
def test_the_tokenizer_beside_the_weights_is_used(folder: Path, path: str) -> None:
    tokenizer, note = training_tokenizer(None, str(folder / path))
    assert tokenizer.fingerprint == own(folder).fingerprint != load_tokenizer().fingerprint
    assert note is None


def test_a_run_starts_from_weights_with_their_tokenizer(folder: Path, tmp_path: Path) -> None:
    config = continued(folder, tmp_path / "next")
    pretrain(config, stop_after=1)
    # There is no final model yet, from which a checkpoint could take its tokenizer.
    unfinished = open_model(tmp_path / "next").tokenizer()
    assert unfinished is not None
    assert unfinished.fingerprint == own(folder).fingerprint
    pretrain(dataclasses.replace(config, resume="auto"))
    environment = json.loads(RunFolder(tmp_path / "next").environment.read_text())
    assert environment["fingerprints"]["tokenizer"] == own(folder).fingerprint
    evaluations = [line for line in tiny_runs.reports(folder / "base") if "val_loss" in line]
    first = next(line for line in tiny_runs.reports(tmp_path / "next") if "val_loss" in line)
    assert first["val_loss"] < evaluations[0]["val_loss"] - 0.5, (
        "foreign ids would begin at the loss of chance"
    )


def test_another_tokenizer_is_used_only_where_it_is_named_and_with_a_warning(folder: Path) -> None:
    tokenizer, note = training_tokenizer(str(PACKAGED), str(folder / "base"))
    assert tokenizer.fingerprint == load_tokenizer().fingerprint
    assert note is not None
    assert re.search(
        "--tokenizer .* is not the tokenizer of --from-weight .* learn its embeddings again", note
    )
    assert training_tokenizer(str(folder / "own"), str(folder / "base"))[1] is None


def test_weights_without_a_tokenizer_need_one_that_is_named(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / "base" / "model" / name).read_bytes())
    with pytest.raises(
        ConfigError, match=r"has no tokenizer\.json beside its weights; name their tokenizer by"
    ):
        training_tokenizer(None, str(tmp_path))
    assert training_tokenizer(str(folder / "own"), str(tmp_path))[1] is None


def test_without_weights_the_tokenizer_is_the_named_one_or_the_packaged_one(folder: Path) -> None:
    assert training_tokenizer(None, None)[0].fingerprint == load_tokenizer().fingerprint
    assert training_tokenizer(str(folder / "own"), None)[0].fingerprint == own(folder).fingerprint


def test_unfinished_run_resumes_with_the_packaged_tokenizer_it_started_with(tmp_path: Path) -> None:
    earlier = load_tokenizer(PACKAGED.with_name("tokenizer_0_1")).fingerprint
    # The tokenizer of the packages before 0.2.0: their checkpoints store this fingerprint.
    assert earlier == "ed3666fc593256be087a0b69794c25bb9990aa534e76964ba310480a010c1229"
    assert earlier != load_tokenizer().fingerprint
    checkpoint = tmp_path / "checkpoints" / "step-00000013"
    checkpoint.mkdir(parents=True)
    for recorded, expected in ((earlier, earlier), ("0" * 64, load_tokenizer().fingerprint)):
        settings = {"tokenizer_fingerprint": recorded}
        (checkpoint / "trainer.json").write_text(json.dumps({"settings": settings}))
        for resume in ("auto", str(tmp_path), str(checkpoint.parent), str(checkpoint)):
            config = PretrainConfig(output_dir=str(tmp_path), resume=resume)
            assert resolve_run(config).tokenizer.fingerprint == expected
    assert resolve_run(PretrainConfig(output_dir=str(tmp_path))).tokenizer.fingerprint != earlier


def test_weights_that_are_not_finite_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "base" / "model", tmp_path / "model")
    (tmp_path / "model" / "checksums.json").unlink()
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, file)
    config = dataclasses.replace(
        continued(folder, tmp_path / "next"), from_weight=str(tmp_path / "model"), tokenizer=None
    )
    with pytest.raises(ConfigError, match=r"model\.norm\.weight contains NaN or infinity"):
        pretrain(config)
    assert not (tmp_path / "next").exists()
