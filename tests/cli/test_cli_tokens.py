"""`minimind-train tokenize` and `minimind-train tokenizer`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("minimind.tokenizer")
pytest.importorskip("minimind.data.prepare")
pytest.importorskip("minimind.tracking.console")

from minimind.tokenizer import load_tokenizer

Command = Callable[..., Any]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A small JSONL file with the field `body`."""
    path = tmp_path / "corpus.jsonl"
    words = ["the river runs low", "a letter came today", "bread and salt", "nine green bottles"]
    documents = [f"{number}: {words[number % 4]} in {number * number} places." for number in range(400)]
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def test_tokenize_builds_the_cache_once_and_reports(run: Command, corpus: Path, tmp_path: Path) -> None:
    args = ["tokenize", "--data", str(corpus), "--text_key", "body", "--cache_dir", str(tmp_path / "cache")]
    first, second = run(*args), run(*args)
    assert (first.code, second.code) == (0, 0)
    assert first.out.startswith("tokenized\n")
    assert second.out.startswith("found in the cache\n")
    assert first.out.splitlines()[1:] == second.out.splitlines()[1:]
    assert len(first.out.splitlines()) > 2


def test_tokenize_reads_the_file_of_a_run(run: Command, corpus: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    cache = (tmp_path / "cache").as_posix()
    file.write_text(f'data = "{corpus.as_posix()}"\ntext_key = "title"\ncache_dir = "{cache}"\nepochs = 3\n')
    wrong = run("tokenize", "--config", str(file))
    assert wrong.code == 2
    assert f"{corpus}:1" in wrong.err
    assert run("tokenize", "--config", str(file), "--text-key", "body").code == 0


def test_tokenize_reports_all_mistakes(run: Command) -> None:
    done = run("tokenize --max_seq_len 1 --bad-lines ignore --datta x")
    assert done.code == 2
    assert done.err.splitlines() == [
        "error: unknown option --datta; did you mean '--data'?",
        "error: --max-seq-len 1 is out of range; it must be at least 2.",
        "error: --bad-lines ignore is not known; choose error or skip.",
    ]


def test_a_trained_tokenizer_can_be_inspected(run: Command, corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    args = ["tokenizer", "train", "--data", str(corpus), "--text-key", "body", "--output_dir", str(folder)]
    done = run(*args, "--vocab_size", "300")
    assert (done.code, done.err) == (0, "")
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.vocab_size == 300

    text = "the river runs"
    shown = run("tokenizer", "inspect", str(folder), "--text", text).out
    assert "300" in shown
    assert tokenizer.fingerprint in shown
    assert [int(number) for number in re.findall(r"^ +(\d+)  '", shown, re.MULTILINE)] == tokenizer.encode(
        text
    )
    assert f"{len(tokenizer.encode(text))} tokens, {len(text)} bytes" in shown

    again = run(*args)
    assert again.code == 2
    assert "already holds a tokenizer" in again.err


def test_training_a_tokenizer_reports_all_mistakes(run: Command) -> None:
    done = run("tokenizer train --vocab-size many --bad-lines ignore")
    assert done.code == 2
    assert done.err.splitlines() == [
        "error: --vocab-size many is not a whole number; write for example 6400.",
        "error: --bad-lines ignore is not known; choose error or skip.",
    ]


def test_the_tokenizer_of_the_package_is_inspected_by_default(run: Command) -> None:
    done = run("tokenizer inspect")
    assert done.code == 0
    assert load_tokenizer(None).fingerprint in done.out
