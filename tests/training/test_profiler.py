"""The trace of some training steps: what it holds, what it is called, and what a short run leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from minimind.config.options import PretrainConfig
from minimind.training.pretrain import pretrain
from minimind.training.profiler import FIRST_STEP, LAST_STEP, ProfileTrace


def record(folder: Path, steps: int, **options: int) -> tuple[list[Path], list[str]]:
    """Train a layer for some steps; return the files and the notes."""
    notes: list[str] = []
    layer = nn.Linear(4, 4)
    with ProfileTrace(folder, torch.device("cpu"), note=notes.append, **options) as trace:
        for step in range(steps):
            # Each step is known by the length of its input.
            layer(torch.zeros(step + 1, 4)).sum().backward()
            trace.step()
    return sorted(folder.rglob("*")), notes


def names(path: Path) -> list[str]:
    return [event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]]


def test_exactly_the_steps_named_are_in_the_trace(tmp_path: Path) -> None:
    (path,), notes = record(tmp_path, LAST_STEP + 3)
    assert path.name == f"process0-steps-{FIRST_STEP}-{LAST_STEP}.pt.trace.json"
    assert str(path) in notes[0]
    found = names(path)
    steps = LAST_STEP - FIRST_STEP + 1
    assert found.count("aten::linear") == steps
    assert sum(name == "AddmmBackward0" for name in found) == steps
    marks = {name for name in found if name.startswith("ProfilerStep")}
    assert marks == {f"ProfilerStep#{step - 1}" for step in range(FIRST_STEP, LAST_STEP + 1)}


def test_a_run_that_goes_on_counts_on_and_each_process_has_its_file(tmp_path: Path) -> None:
    (path,), _ = record(tmp_path, LAST_STEP, start_step=100, process_index=3)
    assert path.name == f"process3-steps-{100 + FIRST_STEP}-{100 + LAST_STEP}.pt.trace.json"


def test_a_run_that_ends_meanwhile_leaves_what_there_is(tmp_path: Path) -> None:
    (path,), _ = record(tmp_path, FIRST_STEP + 1)
    assert path.name == f"process0-steps-{FIRST_STEP}-{FIRST_STEP + 1}.pt.trace.json"
    assert names(path).count("aten::linear") == 2


@pytest.mark.parametrize("steps", [0, 3, FIRST_STEP - 1])
def test_a_run_too_short_says_so_and_writes_nothing(tmp_path: Path, steps: int) -> None:
    files, notes = record(tmp_path, steps)
    assert files == []
    assert "--profile" in notes[0]


@pytest.mark.parametrize("wanted", [True, False])
def test_a_training_run_is_recorded_when_asked(tmp_path: Path, wanted: bool) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"the cat {n} " * 20}) + "\n" for n in range(200)))
    out = tmp_path / "run"
    pretrain(
        PretrainConfig(
            data=(str(corpus),),
            cache_dir=str(tmp_path / "cache"),
            output_dir=str(out),
            val_fraction=0.0,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_seq_len=32,
            batch_size=2,
            max_steps=LAST_STEP + 1,
            compile=False,
            tracker=("none",),
            profile=wanted,
        )
    )
    files = sorted((out / "profile").glob("*")) if (out / "profile").exists() else []
    assert [path.name for path in files] == (
        [f"process0-steps-{FIRST_STEP}-{LAST_STEP}.pt.trace.json"] if wanted else []
    )
    if wanted:
        found = names(files[0])
        assert "aten::scaled_dot_product_attention" in found
        assert any(name.endswith("Backward0") or name.endswith("Backward") for name in found)
        assert any("Optimizer.step" in name for name in found)
