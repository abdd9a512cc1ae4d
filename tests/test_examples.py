"""The examples in docs/examples run, and do what their comments say."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_model
from tiny_runs import write_corpus

import minimind

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
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


def test_every_example_has_a_test_here() -> None:
    tested = Path(__file__).read_text(encoding="utf-8")
    assert [path.stem for path in EXAMPLES.glob("*.py") if f'example("{path.stem}")' not in tested] == []


def test_the_walkthrough_learns_and_writes() -> None:
    left = example("walkthrough")
    assert len(left["losses"]) == 100
    assert left["losses"][0] == pytest.approx(left["math"].log(512), abs=0.3)
    assert left["losses"][-1] < left["losses"][0] - 1
    assert len(left["sample"]) > len("The")


def test_the_loop_of_ones_own_goes_on_where_it_was(tmp_path: Path) -> None:
    corpus = str(write_corpus(tmp_path / "corpus.jsonl"))
    train = example("custom_loop")["train"]
    straight = train(corpus, tmp_path / "straight", steps=6)
    train(corpus, tmp_path / "parted", steps=3)
    resumed = train(corpus, tmp_path / "parted", steps=6)
    steps = sorted(path.name for path in (tmp_path / "parted").glob("step-*"))
    assert steps == ["step-00000003", "step-00000006"]
    for name, weight in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name


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
    fresh = model.output.weight.clone()
    result = module["train"]("recurrent", data=(corpus,), **TINY, log_interval=1)
    load_model(model, result.model_dir / "model.safetensors")
    assert not torch.equal(model.output.weight, fresh)
    lines = Path("runs/recurrent/metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert "parameters: RecurrentLM" in capsys.readouterr().out
