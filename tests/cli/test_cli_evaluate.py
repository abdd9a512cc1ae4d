"""`minimind-train eval`: what it prints, and where it takes its defaults from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind.formats.export import export_model
from minimind.formats.huggingface import save_model
from minimind.modeling.config import MiniMindConfig
from minimind.modeling.transformer import MiniMindForCausalLM
from minimind.tokenizer import load_tokenizer
from minimind.training.pretrain import pretrain
from support import tiny_runs

Command = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run, and two files of text beside it."""
    torch.manual_seed(0)
    shape = MiniMindConfig(
        vocab_size=6400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64,
    )  # fmt: skip
    save_model(MiniMindForCausalLM(shape), tmp_path / "run" / "model")
    load_tokenizer().save(tmp_path / "run" / "model")
    (tmp_path / "run" / "config.toml").write_text("max_seq_len = 48\n")
    for name in ("one", "two"):
        text = json.dumps({"body": f"{name} and another sentence, " * 20})
        (tmp_path / f"{name}.jsonl").write_text(text + "\n")
    return tmp_path


def test_it_prints_the_numbers_as_json_or_for_people(
    run: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Wide enough for the path of a file, however deep the folder of the tests lies.
    monkeypatch.setenv("COLUMNS", "400")
    args = ["eval", str(folder / "run"), "--data", str(folder / "[ot]*.jsonl"), "--text-key", "body"]
    args += ["--cache-dir", str(folder / "cache")]
    found = json.loads(run(*args, "--json").out)
    assert found["max_seq_len"] == 48, "that of the run"
    assert found["tokens"] == sum(file["tokens"] for file in found["sources"][0]["files"])
    assert 8 < found["loss"] < 9.5
    shown = run(*args)
    assert (shown.code, shown.err) == (0, "")
    assert f"loss {found['loss']:.4f} | perplexity {found['perplexity']:.4g} |" in shown.out
    assert f"{found['bits_per_byte']:.4f} bits/byte | {found['tokens']:,} tokens" in shown.out
    lines = shown.out.splitlines()
    contexts = lines[next(n for n, line in enumerate(lines) if line.startswith("context")) + 1 :]
    assert [line.split()[0] for line in contexts] == ["1", "2-3", "4-7", "8-15", "16-31", "32-48"]
    assert sum("/one.jsonl" in line or "/two.jsonl" in line for line in lines) == 2
    short = json.loads(run(*args, "--json", "--max-seq-len", "8", "--packing", "false").out)
    assert (short["max_seq_len"], short["tokens"]) == (8, found["tokens"])


def test_what_nothing_was_measured_of_has_no_number(
    run: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    (folder / "none.jsonl").write_text("")
    (folder / "short.jsonl").write_text('{"text": "a"}\n' * 3)
    args = ["eval", str(folder / "run"), "--cache-dir", str(folder / "cache")]
    for name in ("none", "short"):
        args += ["--data", str(folder / f"{name}.jsonl")]
    found = json.loads(run(*args, "--json").out)
    empty = dict.fromkeys(("loss", "perplexity", "bits_per_byte"))
    assert found["sources"][0] == {
        "data": str(folder / "none.jsonl"),
        **empty,
        "tokens": 0,
        "files": [{"file": str(folder / "none.jsonl"), **empty, "tokens": 0}],
    }
    # After "a" comes the end of the document, which is no text.
    ends = found["contexts"][1]
    assert (ends["context"], ends["tokens"], ends["bits_per_byte"]) == ("2-3", 3, None)
    assert ends["loss"] > 0
    lines = run(*args).out.splitlines()
    assert [line.split()[-4:] for line in lines if "none.jsonl" in line] == [["0", "-", "-", "-"]]


def test_what_was_assumed_of_the_model_is_said(run: Command, folder: Path) -> None:
    export_model(folder / "run" / "model", folder / "pth", "minimind")
    (folder / "pth" / "pretrain_16.config.json").unlink()
    args = ["eval", str(folder / "pth" / "pretrain_16.pth"), "--data", str(folder / "one.jsonl")]
    done = run(*args, "--text-key", "body", "--max-seq-len", "48", "--json", "--cache-dir", str(folder / "c"))
    assert done.code == 0
    assert done.err.startswith(
        "note: configuration inferred from the tensors, with the original's defaults: rope_theta 1e+06"
    )
    assert json.loads(done.out)["tokens"] > 0


def test_a_narrow_terminal_loses_no_column(
    run: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    args = ["eval", str(folder / "run"), "--data", str(folder / "one.jsonl"), "--text-key", "body"]
    lines = run(*args, "--cache-dir", str(folder / "cache")).out.splitlines()
    table = [line.split() for line in lines[lines.index("") + 1 :]]
    assert table[0] == ["context", "tokens", "loss", "perplexity", "bits/byte"]
    assert [len(row) for row in table] == [5] * 7


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], "error: --data is missing; give the evaluation data, or --tasks cloze for a score."),
        (
            ["--data", "x", "--batch-size", "0"],
            "error: --batch-size 0 is out of range; it must be at least 1.",
        ),
        (["--datta", "x"], "error: unknown option --datta; did you mean '--data'?"),
    ],
)
def test_user_errors_are_reported(run: Command, args: list[str], sentence: str) -> None:
    done = run("eval", "nowhere", *args)
    assert (done.code, done.err.splitlines()[0]) == (2, sentence)


def test_a_run_whose_settings_were_edited_into_something_else_is_refused(run: Command, folder: Path) -> None:
    (folder / "run" / "config.toml").write_text('max_seq_len = "long"\n')
    done = run("eval", str(folder / "run"), "--data", "x")
    assert done.code == 2
    assert done.err.startswith(f"error: {folder / 'run' / 'config.toml'}: --max-seq-len long is not a whole")


def test_the_same_weights_have_one_loss_by_every_path(
    run: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tiny_runs.write_corpus(tmp_path / "corpus.jsonl")
    changes = {"max_steps": 2, "save_interval": 2, "eval_interval": 100, "max_seq_len": 24}
    pretrain(tiny_runs.tiny(corpus, tmp_path / "run", **changes))
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    # In float32, as in the checkpoint: rounding the final model is not what is looked for here.
    export_model(tmp_path / "run", tmp_path / "exact")
    shutil.copy(tmp_path / "exact" / "model.safetensors", tmp_path / "run" / "model")
    (tmp_path / "run" / "model" / "checksums.json").unlink()
    capsys.readouterr()
    found = set()
    for path in ("run", "run/model", "run/checkpoints", f"run/checkpoints/{checkpoint.name}"):
        args = ("eval", path, "--data", str(corpus), "--cache-dir", str(tmp_path / "cache"))
        done = run(*args, "--json")
        assert done.code == 0, done.err
        values = json.loads(done.out)
        found.add((values["max_seq_len"], values["loss"], values["tokens"]))
    ((length, _, _),) = found
    assert length == 24
    assert "sequences of up to 24 tokens" in run(*args).out


def test_a_folder_outside_of_a_run_has_the_default_length(run: Command, folder: Path) -> None:
    (folder / "run" / "model").rename(folder / "run" / "other")
    args = ("eval", str(folder / "run" / "other"), "--data", str(folder / "one.jsonl"), "--text-key", "body")
    done = run(*args, "--cache-dir", str(folder / "cache"))
    assert "--max-seq-len 512 is more than the 64 positions" in done.err
