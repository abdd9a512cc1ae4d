"""Run folders and checkpoints of minimind 0.1.0 still resume, decay, and are read by every command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ASSET = Path(__file__).parent / "assets" / "run_of_0_1_0"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the old run beside its data and tokenizer."""
    shutil.copytree(ASSET, tmp_path / "old")
    return tmp_path / "old"


def minimind_train(folder: Path, *args: str) -> str:
    """Run a command in the folder; return what it prints."""
    paths = os.pathsep.join(path for path in [*sys.path, os.environ.get("PYTHONPATH", "")] if path)
    done = subprocess.run(
        [sys.executable, "-m", "minimind_cli", *args],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true", "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(path: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_an_old_run_resumes_and_computes_what_it_would_have_computed(folder: Path) -> None:
    minimind_train(folder, "pretrain", "--resume", "--output-dir", "run")
    expected = losses(folder / "uninterrupted.jsonl")
    assert max(expected) == 24
    # Another processor may round differently.
    assert losses(folder / "run" / "metrics.jsonl") == pytest.approx(expected, rel=1e-4)
    assert (folder / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_an_old_checkpoint_decays_into_a_new_run(folder: Path) -> None:
    minimind_train(folder, "decay", "run", "--tokens", "512", "--output-dir", "annealed")
    assert max(losses(folder / "annealed" / "metrics.jsonl")) == 17
    assert (folder / "annealed" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_commands_read_an_old_run(folder: Path) -> None:
    described = json.loads(minimind_train(folder, "info", "run", "--json"))
    assert "13" in json.dumps(described)
    assert "13" in minimind_train(folder, "checkpoints", "run")
    shutil.copytree(folder / "run", folder / "again")
    compared = minimind_train(folder, "compare", "run", "again")
    assert "run" in compared
    assert "again" in compared
    assert "--decay-steps 6" in minimind_train(folder, "reproduce", "run")
