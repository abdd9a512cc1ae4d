"""Evaluation of given text against transformers in float64, against training, and on several processes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind import pretrain
from minimind.config.options import PretrainConfig
from minimind.errors import ConfigError
from minimind.evaluation.corpus import evaluate_text
from minimind.formats.huggingface import save_model
from minimind.modeling.config import MiniMindConfig
from minimind.modeling.transformer import MiniMindForCausalLM
from minimind.tokenizer import load_tokenizer
from support.tiny_runs import reports, tiny, write_corpus

LENGTH = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights that are strong enough to have opinions, and two files of text."""
    torch.manual_seed(0)
    shape = MiniMindConfig(
        vocab_size=6400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    save_model(MiniMindForCausalLM(shape), path / "model")
    load_tokenizer().save(path / "model")
    write_corpus(path / "a.jsonl")
    long = " ".join(str(number * number) for number in range(60))
    lines = [{"text": text} for text in ("漢字 and 🙂", long, "b", long[::-1])]
    (path / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config(folder: Path, *names: str, **changes: Any) -> PretrainConfig:
    options = {"max_seq_len": LENGTH, "batch_size": 3, "mixed_precision": "no", "packing": False, **changes}
    data = tuple(str(folder / name) for name in names)
    return PretrainConfig(data=data, cache_dir=str(folder / "cache"), **options)


def documents(file: Path) -> Iterator[list[int]]:
    tokenizer = load_tokenizer()
    for line in file.read_text(encoding="utf-8").splitlines():
        ids = tokenizer.encode(json.loads(line)["text"])
        yield [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]


def token_losses(folder: Path, ids: list[int], stride: int) -> list[tuple[int, float]]:
    """(context, nats) of every target, by transformers in float64, one window after the other."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    found: list[tuple[int, float]] = []
    start = 0
    while len(found) < len(ids) - 1:
        window = torch.tensor([ids[start : start + LENGTH + 1]])
        with torch.no_grad():
            losses = -model(window[:, :-1]).logits[0].log_softmax(-1)
        for place in range(window.shape[1] - 1):
            if start + place == len(found):
                found.append((place + 1, float(losses[place, window[0, place + 1]])))
        start += stride
    return found


@pytest.mark.parametrize("stride", [LENGTH, 7])
def test_the_numbers_are_those_of_transformers_in_float64(folder: Path, stride: int) -> None:
    found = evaluate_text(str(folder / "model"), config(folder, "b.jsonl"), stride=stride)
    losses = [pair for ids in documents(folder / "b.jsonl") for pair in token_losses(folder, ids, stride)]
    nats = sum(loss for _, loss in losses)
    lines = (folder / "b.jsonl").read_text(encoding="utf-8").splitlines()
    text_bytes = sum(len(json.loads(line)["text"].encode()) for line in lines)
    assert found.total.tokens == len(losses) > 2 * LENGTH
    assert found.total.loss == pytest.approx(nats / len(losses), rel=1e-6)
    assert found.total.perplexity == pytest.approx(math.exp(nats / len(losses)), rel=1e-5)
    assert found.total.bits_per_byte == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-6)
    for part, (low, high) in zip(
        found.contexts, ((1, 1), (2, 3), (4, 7), (8, 15), (16, LENGTH)), strict=True
    ):
        inside = [loss for context, loss in losses if low <= context <= high]
        assert part.name == (f"{low}-{high}" if low < high else "1")
        assert part.evaluation.tokens == len(inside) > 0
        assert part.evaluation.loss == pytest.approx(sum(inside) / len(inside), rel=1e-6)


@pytest.mark.parametrize("packing", [True, False])
def test_parts_add_up_to_the_whole_and_are_what_each_gives_alone(folder: Path, packing: bool) -> None:
    both = (folder / "a.jsonl", folder / "b.jsonl")
    # The same two files as two entries, and as one of two files.
    apart = evaluate_text(str(folder), config(folder, *(file.name for file in both), packing=packing))
    together = evaluate_text(str(folder), config(folder, "*.jsonl", packing=packing))
    assert apart.total == together.total
    assert [part.name for part in apart.sources] == [str(file) for file in both]
    assert [file.name for file in together.sources[0].files] == [str(file) for file in both]
    assert [part.evaluation for part in apart.sources] == [f.evaluation for f in together.sources[0].files]
    for parts in (apart.sources, apart.contexts, together.sources[0].files):
        tokens = [part.evaluation.tokens for part in parts]
        assert sum(tokens) == apart.total.tokens
        nats = sum(part.evaluation.loss * part.evaluation.tokens for part in parts)
        assert nats / sum(tokens) == pytest.approx(apart.total.loss, rel=1e-9)
    if not packing:
        for part in apart.sources:
            alone = evaluate_text(str(folder), config(folder, Path(part.name).name))
            assert part.evaluation.tokens == alone.total.tokens
            assert part.evaluation.loss == pytest.approx(alone.total.loss, rel=1e-6)


def test_a_run_has_the_validation_loss_that_it_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where training would take bf16 for a model of the width that `PretrainConfig` has by default."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    corpus, held_out = write_corpus(tmp_path / "corpus.jsonl"), tmp_path / "held_out.jsonl"
    held_out.write_text("".join(reversed(corpus.read_text().splitlines(keepends=True)[::3])))
    run = tiny(corpus, tmp_path / "run", max_steps=10, val_data=(str(held_out),))
    pretrain(run)
    reported = [line["val_loss"] for line in reports(tmp_path / "run") if "val_loss" in line][-1]
    options = {"max_seq_len": 32, "packing": True, "cache_dir": str(tmp_path / "cache")}
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000010"
    found = evaluate_text(str(checkpoint), PretrainConfig(data=(str(held_out),), **options))
    assert found.total.loss == pytest.approx(reported, rel=1e-6)


@pytest.mark.alone
@pytest.mark.slow
def test_two_processes_find_what_one_does(folder: Path) -> None:
    names = ("a.jsonl", "b.jsonl")
    alone = evaluate_text(str(folder), config(folder, *names), stride=10).to_dict()
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "-m", "minimind_cli"]
    args = ["eval", str(folder), *(word for name in names for word in ("--data", str(folder / name)))]
    args += ["--max-seq-len", str(LENGTH), "--cache-dir", str(folder / "cache"), "--batch-size", "3"]
    done = subprocess.run(
        [sys.executable, "-m", *launch, *args, "--no-packing", "--stride", "10", "--json"],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert_equal(json.loads(done.stdout), alone)


def assert_equal(ours: Any, theirs: Any) -> None:
    """Counts and names are the same, and so are losses up to the last bits of float32."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert_equal(ours[name], value)
    elif isinstance(theirs, list):
        for one, other in zip(ours, theirs, strict=True):
            assert_equal(one, other)
    else:
        assert ours == (pytest.approx(theirs, rel=1e-6) if isinstance(theirs, float) else theirs)


@pytest.mark.parametrize(
    ("changes", "stride", "sentence"),
    [
        ({"max_seq_len": 300}, None, "--max-seq-len 300 is more than the 256 positions of the model"),
        ({"packing": True}, 5, "--stride 5 needs --no-packing"),
        ({}, 30, "at most --max-seq-len 24"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    folder: Path, changes: dict[str, Any], stride: int | None, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        evaluate_text(str(folder), config(folder, "a.jsonl", **changes), stride=stride)


def test_weights_are_for_training_only(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--data has a weight"):
        evaluate_text(str(folder), config(folder, "a.jsonl:0.5"))
