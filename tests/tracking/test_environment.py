"""The record of what a run ran on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
import torch

from minimind.tracking.environment import HIDDEN, describe_environment, describe_launch, hide_secrets


def git(*arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    return subprocess.run(
        ["git", *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_description_is_json_and_names_versions_and_hardware(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["minimind-train", "pretrain", "--api-key", "s3cret"])
    described = json.loads(json.dumps(describe_environment("cpu")))
    assert described["packages"]["torch"] == torch.__version__
    assert {"minimind", "accelerate", "tokenizers"} <= set(described["packages"])
    assert described["python"] == ".".join(map(str, sys.version_info[:3]))
    assert described["device"] == "cpu"
    assert described["cpu_count"] >= 1
    assert described["memory_gb"] > 0.1
    assert len(described["gpus"]) == torch.cuda.device_count()
    assert described["command"] == ["minimind-train", "pretrain", "--api-key", "***"]
    started = datetime.fromisoformat(described["started"])
    assert abs((datetime.now(UTC) - started).total_seconds()) < 60


@pytest.mark.parametrize(
    ("processes", "fsdp", "kind"), [(1, False, "one process"), (2, False, "DDP"), (2, True, "FSDP2")]
)
def test_a_launch_is_described_without_its_secrets(monkeypatch, processes, fsdp, kind):
    for name in [name for name in os.environ if name.startswith(("FSDP_", "PARALLELISM_CONFIG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("OTHER_TOKEN", "s3cret")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    accelerator = SimpleNamespace(num_processes=processes, is_fsdp2=fsdp, device=torch.device("cpu"))
    assert describe_launch(accelerator, precision="bf16", compiled=True) == {
        **{"processes": processes, "machines": 3, "kind": kind, "on_cpu": True, "precision": "bf16"},
        **{"compiled": True, "variables": {"FSDP_VERSION": "2"}},
    }
    monkeypatch.delenv("GROUP_WORLD_SIZE")
    assert describe_launch(accelerator, precision="no", compiled=False)["machines"] == 1


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_git_revision_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    git("init", "-q")
    (tmp_path / "a.txt").write_text("a")
    git("add", "a.txt")
    git("commit", "-qm", "a")
    assert describe_environment("cpu")["git"] == {"commit": git("rev-parse", "HEAD"), "changed": False}
    (tmp_path / "a.txt").write_text("b")
    assert describe_environment("cpu")["git"]["changed"] is True


def test_outside_of_git_or_without_git_there_is_no_revision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert describe_environment("cpu")["git"] is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_environment("cpu")["git"] is None


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["--api-key", "abc", "--seed", "1"], ["--api-key", "***", "--seed", "1"]),
        (["--wandb_token=abc"], ["--wandb_token=***"]),
        (["WANDB_API_KEY=abc", "x"], ["WANDB_API_KEY=***", "x"]),
        (["--password", "--seed", "1"], ["--password", "--seed", "1"]),
        (["--data", "https://me:abc@host/x.txt"], ["--data", "https://***@host/x.txt"]),
    ],
)
def test_secrets_are_hidden(given, shown):
    assert hide_secrets(given) == shown


def test_options_of_the_program_are_shown():
    command = ["--max-tokens", "1e9", "--text-key=body", "--tokenizer", "t", "--num-key-value-heads", "2"]
    assert hide_secrets(command) == command


@pytest.mark.parametrize(
    "given",
    [
        ["--wandbApiKey", "SECRET"],
        ["--wandb_apikey=SECRET"],
        ["--hftoken", "SECRET"],
        ["--HF-TOKEN", "-SECRET"],
        ["WANDB.API.KEY=SECRET"],
        ["Authorization: Bearer SECRET"],
        ["--header", "x: bearer SECRET"],
        ["--note", "hf_SECRETSECRETSECRET"],
        ["--data", "https://h/x?download=1&Signature=SECRET&y=2"],
    ],
)
def test_secrets_are_hidden_in_every_spelling(given: list[str]) -> None:
    shown = hide_secrets(given)
    assert "SECRET" not in " ".join(shown)
    assert HIDDEN in " ".join(shown)


def test_what_only_resembles_a_secret_is_shown() -> None:
    command = [
        "--tokenizer",
        "a",
        "--text-key",
        "body",
        "--tokens",
        "1e8",
        "--data",
        "key.jsonl:0.5",
        "sk-learn",
    ]
    assert hide_secrets(command) == command
