"""The examples in docs/examples run, and do what their comments say."""

from __future__ import annotations

import ast
import csv
import json
import os
import runpy
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_model

import minimind
from minimind.optim.build import build_optimizer
from support.foreign_models import save_shape
from support.tiny_runs import write_corpus

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
# A run of two processes and one of a single process take the same steps by it.
DRIVER = """
import runpy, sys
train = runpy.run_path(sys.argv[1])["train"]
train("recurrent", data=(sys.argv[2],), output_dir=sys.argv[3], batch_size=2, global_batch_size=4,
      max_steps=3, max_seq_len=32, tracker=("none",), val_fraction=0.1, log_interval=1)
"""
TINY = {"max_steps": 4, "batch_size": 4, "max_seq_len": 32, "tracker": ("none",), "val_fraction": 0.1}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    # A bare Accelerator leaves its state for whatever comes next in this process.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def losses_of(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def test_every_example_has_a_test_here() -> None:
    tested = Path(__file__).read_text(encoding="utf-8")
    assert [path.stem for path in EXAMPLES.glob("*.py") if f'example("{path.stem}")' not in tested] == []


def test_the_walkthrough_learns_and_writes() -> None:
    left = example("walkthrough")
    assert len(left["losses"]) == 60
    assert left["losses"][0] == pytest.approx(left["math"].log(512), abs=0.3)
    assert left["losses"][-1] < left["losses"][0] - 1
    assert len(left["sample"]) > len("The")


def test_a_custom_loop_resumes_where_it_was(tmp_path: Path) -> None:
    corpus = str(write_corpus(tmp_path / "corpus.jsonl"))
    train = example("custom_loop")["train"]
    straight = train(corpus, tmp_path / "straight", steps=6)
    train(corpus, tmp_path / "resumed", steps=3)
    resumed = train(corpus, tmp_path / "resumed", steps=6)
    steps = sorted(path.name for path in (tmp_path / "resumed").glob("step-*"))
    assert steps == ["step-00000003", "step-00000006"]
    for name, weight in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name


# Users write these from the documentation.
SHORT = (
    *("short_loop", "callback", "custom_optimizer", "custom_schedule", "custom_tracker", "data_source"),
    "continue_llama",
)
TINIER = {**TINY, "hidden_size": 32, "num_hidden_layers": 1, "log_interval": 1, "save_interval": 100}


@pytest.mark.parametrize("name", SHORT)
def test_a_short_example_has_at_most_30_lines_of_code(name: str) -> None:
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    documentation = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    code = [
        line
        for number, line in enumerate(source.partition("\nif __name__")[0].splitlines(), 1)
        if number not in documentation and line.strip() and not line.strip().startswith("#")
    ]
    assert len(code) <= 30, "\n".join(code)


def test_the_short_loop_learns(tmp_path: Path) -> None:
    losses = example("short_loop")["train"](str(write_corpus(tmp_path / "corpus.jsonl")), steps=12)
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.5


def test_the_callback_ends_a_run_early_also_across_a_resume(tmp_path: Path) -> None:
    corpus = str(write_corpus(tmp_path / "corpus.jsonl"))
    train = example("callback")["train"]
    # Without a change of the weights no evaluation improves on the first.
    options = {**TINIER, "data": (corpus,), "learning_rate": 1e-30, "eval_interval": 1, "max_steps": 20}
    result = train(**options)
    assert "does not fall" in result.stopped
    assert 3 <= result.steps <= 5
    resumed = train(**options, resume="auto")
    # It knows the best loss of the first part: the next evaluation ends the run again.
    assert resumed.steps <= result.steps + 2


def test_a_custom_optimizer_and_schedule_train(tmp_path: Path) -> None:
    corpus = str(write_corpus(tmp_path / "corpus.jsonl"))
    module = example("custom_optimizer")
    result = module["train"](data=(corpus,), **TINIER)
    assert result.history.losses[-1] < result.history.losses[0]
    schedule = example("custom_schedule")
    # The rate of step s is in the report after it.
    rates = schedule["train"](data=(corpus,), **TINIER, learning_rate=1.0).history.learning_rates
    assert rates.tolist() == [schedule["restarts"](step, 4) for step in range(4)]


def test_a_custom_tracker_writes_each_step_once(tmp_path: Path) -> None:
    corpus = str(write_corpus(tmp_path / "corpus.jsonl"))
    train = example("custom_tracker")["train"]
    train(data=(corpus,), **{**TINIER, "max_steps": 2})
    train(data=(corpus,), **TINIER, resume="auto")
    with Path("runs/csv/metrics.csv").open(newline="") as file:
        losses = [float(row[2]) for row in csv.reader(file) if row[1] == "loss"]
    assert losses == losses_of(Path("runs/csv"))
    assert len(losses) == 4


def test_a_database_is_a_data_source(tmp_path: Path) -> None:
    with closing(sqlite3.connect("notes.db")) as database, database:
        database.execute("CREATE TABLE documents (text)")
        texts = [json.loads(line)["text"] for line in write_corpus(tmp_path / "c.jsonl").open()]
        database.executemany("INSERT INTO documents VALUES (?)", [(text,) for text in texts])
    result = example("data_source")["train"](Path("notes.db"), **TINIER)
    assert (result.steps, len(result.history.losses)) == (4, 4)
    assert result.history.losses[-1] < result.history.losses[0]


def test_a_llama_is_continued_and_used_as_before(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    corpus = str(write_corpus(tmp_path / "corpus.jsonl"))
    module = example("continue_llama")
    folder = save_shape("llama", tmp_path / "llama")
    result = module["train"](str(folder), data=(corpus,), **TINY, log_interval=1)
    assert result.history.losses[-1] < result.history.losses[0]
    assert module["complete"](result.model_dir, "the cat")


def test_a_part_exchanged_trains_and_resumes(tmp_path: Path) -> None:
    corpus = str(write_corpus(tmp_path / "corpus.jsonl"))
    train, model_class = (example("custom_model")[name] for name in ("train", "ReLUMiniMind"))
    train("relu", data=(corpus,), output_dir="run", **TINY)
    result = train("relu", data=(corpus,), output_dir="run", resume="auto", **{**TINY, "max_steps": 6})
    assert (result.steps, result.sample) == (6, "")
    sizes = minimind.preset_config("tiny")
    shape = minimind.MiniMindConfig(
        vocab_size=6400,
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_key_value_heads,
    )
    model = model_class(shape)
    load_model(model, result.model_dir / "model.safetensors")
    assert not any("gate_proj" in name for name in model.state_dict())
    assert not (result.model_dir / "config.json").exists()  # it would call this model a Qwen3


def test_any_module_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = str(write_corpus(tmp_path / "corpus.jsonl"))
    module = example("custom_model")
    torch.manual_seed(minimind.PretrainConfig.seed)
    model = module["RecurrentLM"](6400)
    fresh = model.lm_head.weight.clone()
    groups = build_optimizer(model, minimind.preset_config("tiny"), "cpu").param_groups
    (inside,) = (group["param_names"] for group in groups if group["algorithm"] == "muon")
    assert inside
    assert all(name.startswith("gru.weight") for name in inside)
    result = module["train"]("recurrent", data=(corpus,), **TINY, log_interval=1)
    load_model(model, result.model_dir / "model.safetensors")
    assert not torch.equal(model.lm_head.weight, fresh)
    losses = losses_of(Path("runs/recurrent"))
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert "parameters: RecurrentLM" in capsys.readouterr().out


@pytest.mark.alone
@pytest.mark.slow
def test_any_module_trains_on_two_processes_as_on_one(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    (tmp_path / "driver.py").write_text(DRIVER)
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    launch += ["--num_processes", "2", "--main_process_port", "0"]
    for name, args in (("one", []), ("two", launch)):
        command = [sys.executable, *args, "driver.py", str(EXAMPLES / "custom_model.py"), str(corpus), name]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (tmp_path / name / "model" / "model.safetensors").is_file(), done.stderr
    assert len(losses_of(tmp_path / "one")) == 3
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)
