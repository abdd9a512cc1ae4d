"""`eval --tasks`: the packaged items, and lm-evaluation-harness on tasks of a local folder."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind.config.options import PretrainConfig
from minimind.errors import ConfigError
from minimind.evaluation.cloze import LANGUAGES, load_items
from minimind.evaluation.corpus import evaluate_text
from minimind.evaluation.tasks import harness_scores, split_pair
from minimind.formats.huggingface import save_model
from minimind.modeling.config import MiniMindConfig
from minimind.modeling.transformer import MiniMindForCausalLM
from minimind.tokenizer import load_tokenizer

Command = Callable[..., Any]
TOKENIZER = load_tokenizer()
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = MiniMindConfig(
        vocab_size=TOKENIZER.vocab_size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    save_model(MiniMindForCausalLM(config), path, dtype=torch.float32)
    TOKENIZER.save(path)
    return path


@pytest.fixture
def few_items(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {language: load_items(language)[:10] for language in LANGUAGES}
    monkeypatch.setattr("minimind.evaluation.cloze.load_items", few.__getitem__)


@pytest.mark.usefixtures("few_items")
def test_the_packaged_items_need_nothing(run: Command, folder: Path) -> None:
    args = ["eval", str(folder), "--max-seq-len", "64", "--tasks"]
    found = json.loads(run(*args, "cloze", "--json").out)
    assert found["model"] == str(folder)
    assert [score["task"] for score in found["scores"]] == ["cloze_en", "cloze_zh"]
    shown = run(*args, "cloze_zh").out
    assert shown.startswith("cloze_zh  ")
    assert "of 10 items (95% interval " in shown
    assert "chance 25%)" in shown
    assert "cloze_en" not in shown


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--per-document", "x.jsonl", "--tasks", "cloze"], "--per-document needs --data."),
        (["--tasks", "arc_easy"], "--tasks arc_easy needs the package lm-eval ("),
    ],
)
def test_mistakes_are_explained(
    args: list[str], sentence: str, run: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = run("eval", str(folder), "--max-seq-len", "64", *args)
    assert done.code == 2
    assert done.err.startswith(f"error: {sentence}")


def test_several_processes_are_refused(run: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minimind.evaluation.tasks.world_size", lambda: 2)
    done = run("eval", str(folder), "--tasks", "cloze")
    assert done.err == "error: --tasks runs in one process; start the command without a launcher.\n"


def test_each_document_has_its_loss(run: Command, folder: Path, tmp_path: Path) -> None:
    for name, texts in (("a", ["one two", "three"]), ("b", ["four " * 40])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    out = tmp_path / "losses.jsonl"
    args = ["eval", str(folder), "--max-seq-len", "16", "--cache-dir", str(tmp_path / "c"), "--json"]
    args += ["--data", str(tmp_path / "[ab].jsonl"), "--per-document"]
    total = json.loads(run(*args, str(out)).out)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(Path(line["file"]).name, line["document"]) for line in found] == [
        ("a.jsonl", 0),
        ("a.jsonl", 1),
        ("b.jsonl", 0),
    ]
    assert found[0]["beginning"] == "one two"
    assert sum(line["tokens"] for line in found) == total["tokens"]
    mean = sum(line["loss"] * line["tokens"] for line in found) / total["tokens"]
    assert mean == pytest.approx(total["loss"])
    # Each is the loss of a corpus of that document alone.
    (tmp_path / "alone.jsonl").write_text(json.dumps({"text": "three"}) + "\n")
    config = PretrainConfig(
        data=(str(tmp_path / "alone.jsonl"),), max_seq_len=16, batch_size=1, cache_dir=str(tmp_path / "c")
    )
    alone = evaluate_text(str(folder), config, per_document=True)
    assert alone.documents[0].evaluation.loss == pytest.approx(found[1]["loss"], rel=1e-5)
    assert evaluate_text(str(folder), config).documents == ()
    done = run(*args, str(tmp_path / "missing" / "x.jsonl"))
    assert done.code == 2
    assert "x.jsonl cannot be written (No such file or directory)" in done.err


def test_a_space_before_the_continuation_belongs_to_its_first_word() -> None:
    context, continuation = split_pair(TOKENIZER, "The cat sat ", "down")
    assert (context, context + continuation) == (
        TOKENIZER.encode("The cat sat"),
        TOKENIZER.encode("The cat sat down"),
    )


TASKS = {
    "endings": """
output_type: multiple_choice
doc_to_text: "{{beginning}}"
doc_to_choice: "{{endings}}"
doc_to_target: right
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{beginning}}"
metric_list: [{metric: bits_per_byte}]
""",
    "writing": """
output_type: generate_until
doc_to_text: "{{beginning}}"
doc_to_target: "{{endings[0]}}"
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
""",
}


@needs_lm_eval
@pytest.mark.slow
def test_local_tasks_of_the_harness_run_without_a_network(
    folder: Path, tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    questions = [
        {"beginning": "The cat sat on the", "endings": ["mat", "moon", "idea"], "right": 0},
        {"beginning": "二月有", "endings": ["二十八天", "四十天"], "right": 1},
    ]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tmp_path / "tasks").mkdir()
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        (tmp_path / "tasks" / f"{name}.yaml").write_text(f"{head}test_split: test{text}")
    done = run(
        *("eval", str(folder), "--json", "--max-seq-len", "64", "--task-dir", str(tmp_path / "tasks")),
        *("--tasks", "endings,rolling,writing"),
    )
    assert done.code == 0, done.err
    found = {(score["task"], score["metric"]): score["value"] for score in json.loads(done.out)["scores"]}
    # By hand, with bits per byte as `eval --data` computes them but for the end token.
    from minimind.formats.huggingface import load_model

    model = load_model(folder).eval()

    def nats(text: str, after: int = 0) -> float:
        ids = torch.tensor([[TOKENIZER.bos_token_id, *TOKENIZER.encode(text)]])
        with torch.no_grad():
            losses = -model(input_ids=ids[:, :-1]).logits[0].log_softmax(-1)
        return float(losses.gather(1, ids[0, 1:, None])[after:].sum())

    right = 0
    for question in questions:
        skipped = len(TOKENIZER.encode(question["beginning"]))
        sums = [nats(f"{question['beginning']} {ending}", skipped) for ending in question["endings"]]
        right += sums.index(min(sums)) == question["right"]
    assert found["endings", "acc"] == right / 2
    texts = [question["beginning"] for question in questions]
    bits = sum(map(nats, texts)) / math.log(2) / sum(len(text.encode()) for text in texts)
    assert found["rolling", "bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    assert found["writing", "exact_match"] == 0.0
    with pytest.raises(ConfigError, match="--tasks nothing is not a task of lm-eval or of --task-dir"):
        harness_scores(model, TOKENIZER, ["nothing"], max_length=64)
