"""`minimind-train generate`: prompts from the command line, a pipe or a person."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind.formats.huggingface import load_model, save_model
from minimind.formatting import printable
from minimind.generation.text import continue_texts
from minimind.modeling.config import MiniMindConfig
from minimind.modeling.transformer import MiniMindForCausalLM
from minimind.tokenizer import load_tokenizer

Command = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that delivered a model with random weights."""
    torch.manual_seed(0)
    shape = MiniMindConfig(
        vocab_size=6400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    save_model(MiniMindForCausalLM(shape), tmp_path / "run" / "model")
    load_tokenizer().save(tmp_path / "run" / "model")
    return tmp_path / "run"


def expected(folder: Path, prompts: list[str], seed: int) -> list[str]:
    model = load_model(folder / "model")
    texts = continue_texts(model, load_tokenizer(), prompts, max_new_tokens=8, seed=seed)
    return [prompt + printable(text.text, keep="\n\t") for prompt, text in zip(prompts, texts, strict=True)]


def test_prompts_are_continued(run: Command, folder: Path) -> None:
    options = ["--max-new-tokens", "8", "--seed", "4"]
    one = run("generate", str(folder), "Once upon", *options)
    assert (one.code, one.err) == (0, "")
    assert one.out == expected(folder, ["Once upon"], 4)[0] + "\n"
    two = run("generate", str(folder), "Once upon", "漢字 and", *options)
    assert two.out == "\n\n".join(expected(folder, ["Once upon", "漢字 and"], 4)) + "\n"


def test_a_prompt_may_begin_with_a_dash_behind_two_of_them(run: Command, folder: Path) -> None:
    done = run("generate", str(folder), "--max-new-tokens", "8", "--seed", "4", "--", "--top-p and more")
    assert (done.code, done.out) == (0, expected(folder, ["--top-p and more"], 4)[0] + "\n")


def test_json_tells_all_and_can_be_repeated(run: Command, folder: Path) -> None:
    args = ["generate", str(folder), "one", "two", "--max-new-tokens", "8", "--json"]
    lines = [json.loads(line) for line in run(*args).out.splitlines()]
    assert [line["prompt"] for line in lines] == ["one", "two"]
    assert lines[1]["seed"] == lines[0]["seed"] + 1
    assert all((line["tokens"], line["ended"]) == (8, "length") for line in lines)
    again = [json.loads(line) for line in run(*args, "--seed", str(lines[0]["seed"])).out.splitlines()]
    assert again == lines


def test_the_standard_input_is_a_prompt(run: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Once upon\n"))
    done = run("generate", str(folder), "--max-new-tokens", "8", "--seed", "4")
    assert done.out == expected(folder, ["Once upon"], 4)[0] + "\n"


@pytest.mark.parametrize(
    ("stdin", "sentence"),
    [
        (io.TextIOWrapper(io.BytesIO("漢字".encode("gbk")), "utf-8"), "the standard input is not UTF-8 text"),
        (None, "there is no standard input; give the prompt after the model."),
    ],
)
def test_a_standard_input_that_is_no_text_is_refused(
    run: Command, monkeypatch: pytest.MonkeyPatch, stdin: Any, sentence: str
) -> None:
    monkeypatch.setattr("sys.stdin", stdin)
    done = run("generate", "nowhere")
    assert done.code == 2
    assert done.err.startswith(f"error: {sentence}")


def test_bytes_of_a_prompt_that_are_no_text_are_replaced(run: Command, folder: Path) -> None:
    args = ["--max-new-tokens", "2", "--seed", "4"]
    done = run("generate", str(folder), "a\udcff", *args)
    assert (done.code, done.out) == (0, run("generate", str(folder), "a\ufffd", *args).out)


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a person with some answers in the place of the terminal."""

    def with_answers(*texts: str) -> None:
        answers = iter(texts)

        def ask(question: str) -> str:
            try:
                return next(answers)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        monkeypatch.setattr("builtins.input", ask)

    return with_answers


def test_in_a_terminal_prompts_are_asked_for(run: Command, folder: Path, answer: Callable[..., None]) -> None:
    args = ["generate", str(folder), "--max-new-tokens", "8", "--seed", "4"]
    answer("one", "two")
    done = run(*args)
    assert done.code == 0
    assert done.out == "".join(expected(folder, [prompt], 4)[0] + "\n" for prompt in ("one", "two"))
    answer("one", "two")
    lines = [json.loads(line) for line in run(*args, "--json").out.splitlines()]
    shown = [printable(line["prompt"] + line["text"], keep="\n\t") for line in lines]
    assert shown == done.out.splitlines()
    assert any(r"\x" in text for text in shown), "a control character that the model wrote"


def test_after_a_prompt_that_is_too_long_the_next_is_asked_for(
    run: Command, folder: Path, answer: Callable[..., None]
) -> None:
    answer("a b " * 64, "two")
    done = run("generate", str(folder), "--max-new-tokens", "8", "--seed", "4")
    assert done.code == 0
    assert "error: the prompt has " in done.err
    assert done.out.endswith("\n" + expected(folder, ["two"], 4)[0] + "\n")


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--top-p", "0"], "--top-p 0.0 is out of range; it must be above 0 and at most 1."),
        (["--top-k", "0"], "--top-k 0 is out of range; it must be at least 1, or none."),
        (["--temperature", "hot"], "--temperature hot is not a number"),
        (["--tempature", "1"], "No such option: --tempature"),
        (["-5 degrees"], "No such option: -5. Put a prompt that begins with a dash after --."),
    ],
)
def test_user_errors_are_reported_before_the_model_is_read(
    run: Command, args: list[str], sentence: str
) -> None:
    done = run("generate", "nowhere", "x", *args)
    assert done.code == 2
    assert sentence in done.err
    assert "nowhere" not in done.err


def test_a_path_without_a_model_is_refused(run: Command, tmp_path: Path) -> None:
    done = run("generate", str(tmp_path / "nowhere"), "x")
    assert done.code == 2
    assert "nowhere does not exist; name a run folder" in done.err
