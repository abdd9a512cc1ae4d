"""The same training with any number of processes, and a clear error for numbers that do not divide."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from minimind import pretrain
from minimind.config.options import CONFIG_SECTIONS
from minimind.config.schema import write_toml
from minimind.distributed.collectives import sum_over_processes
from support.tiny_runs import reports, tiny, write_corpus

STEPS = 12
# Sequences of a step; in micro-batches of 2 they divide by 1, 2 and 4 processes.
OPTIONS: dict[str, Any] = {
    "batch_size": 2,
    "accumulation_steps": None,
    "global_batch_size": 8,
    "dropout": 0.0,
    "lr_schedule": "constant",
    "warmup_steps": 2,
    "log_interval": 1,
    "eval_interval": 3,
    "save_interval": 3,
}


def command_line(args: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *args],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.alone
@pytest.mark.slow
def test_the_number_of_processes_changes_neither_sequences_nor_losses(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    # Neither the constant schedule nor Muon depends on the --max-steps that ends a part; NorMuon does.
    options = {**OPTIONS, "optimizer": "muon"}
    pretrain(tiny(corpus, tmp_path / "straight", max_steps=STEPS, **options))
    file = tmp_path / "run.toml"
    file.write_text(write_toml(tiny(corpus, tmp_path / "parts", **options), CONFIG_SECTIONS))
    pretrain(tiny(corpus, tmp_path / "parts", max_steps=3, **options))
    for processes, last in ((2, 6), (4, 9)):
        launch = ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
        launch += ["--num_processes", str(processes), "--main_process_port", "0", "-m", "minimind_cli"]
        child = command_line(
            [*launch, "pretrain", "--config", str(file), "--max-steps", str(last), "--resume"]
        )
        output, errors = child.communicate()
        assert reports(tmp_path / "parts")[-1]["step"] == last, errors
        assert f"processes {processes}, " in output
    pretrain(tiny(corpus, tmp_path / "parts", max_steps=STEPS, resume="auto", **options))
    straight, parts = reports(tmp_path / "straight"), reports(tmp_path / "parts")
    assert [(line["step"], line["kind"], line.get("digest")) for line in parts] == [
        (line["step"], line["kind"], line.get("digest")) for line in straight
    ]
    assert len({line["digest"] for line in parts if "digest" in line}) == STEPS
    for ours, theirs in zip(parts, straight, strict=True):
        for name in ("loss", "val_loss", "grad_norm"):
            if name in theirs:
                tolerance = 1e-4 if name == "grad_norm" else 1e-5
                assert ours[name] == pytest.approx(theirs[name], rel=0, abs=tolerance), (theirs["step"], name)


@pytest.mark.alone
@pytest.mark.slow
def test_processes_agree_on_a_micro_batch_that_they_measure(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    options = {**OPTIONS, "max_steps": 3}
    pretrain(tiny(corpus, tmp_path / "straight", **options))
    file = tmp_path / "run.toml"
    auto = tiny(corpus, tmp_path / "auto", **{**options, "batch_size": "auto"})
    file.write_text(write_toml(auto, CONFIG_SECTIONS))
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2"]
    args = [*launch, "--main_process_port", "0", "-m", "minimind_cli", "pretrain", "--config", str(file)]
    output, errors = command_line(args).communicate()
    assert output.count("--batch-size auto: ") == 1, errors
    straight, measured = reports(tmp_path / "straight"), reports(tmp_path / "auto")
    losses = [(line["digest"], line["loss"]) for line in straight if "digest" in line]
    for (digest, loss), line in zip(losses, (line for line in measured if "digest" in line), strict=True):
        assert line["digest"] == digest
        assert line["loss"] == pytest.approx(loss, rel=0, abs=1e-5)


@pytest.mark.alone
@pytest.mark.slow
def test_a_step_that_does_not_divide_ends_every_process_with_a_sentence(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    file = tmp_path / "run.toml"
    config = tiny(corpus, tmp_path / "run", **{**OPTIONS, "batch_size": 4, "global_batch_size": 12})
    file.write_text(write_toml(config, CONFIG_SECTIONS))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = [
        command_line(
            ["minimind_cli", "pretrain", "--config", str(file)],
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            **together,
        )
        for rank in range(2)
    ]
    ends = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [2, 2]
    assert ends[0][1].splitlines()[-1] == (
        "error: --global-batch-size 12 is not a multiple of 8 sequences (--batch-size 4 x 2 processes); "
        "use --global-batch-size 8 or 16, or --batch-size 3."
    )
    assert not any("Traceback" in error for _, error in ends)
    # Without a launcher that ends it, the other process says the same, signed.
    assert ends[1][1].splitlines()[-1].startswith("rank 1: error: --global-batch-size 12")


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize("to_whom", ["launcher", "one process"])
def test_a_signal_stops_all_processes_at_one_step_with_the_state_saved(tmp_path: Path, to_whom: str) -> None:
    corpus, out = write_corpus(tmp_path / "corpus.jsonl"), tmp_path / "run"
    options = {**OPTIONS, "epochs": 100_000, "save_interval": 1_000_000, "eval_interval": 1_000_000}
    file = tmp_path / "run.toml"
    file.write_text(write_toml(tiny(corpus, out, **options), CONFIG_SECTIONS))
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2"]
    child = command_line(
        [*launch, "--main_process_port", "0", "-m", "minimind_cli", "pretrain", "--config", str(file)]
    )
    deadline = time.monotonic() + 90
    while not (out / "metrics.jsonl").exists() or len(reports(out)) < 5:
        assert time.monotonic() < deadline, child.poll()
        time.sleep(0.2)
    workers = [process for process in psutil.Process(child.pid).children() if process.is_running()]
    os.kill(child.pid if to_whom == "launcher" else workers[-1].pid, signal.SIGTERM)
    output, errors = child.communicate(timeout=60)
    assert output.splitlines()[-1] == (
        "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 -m minimind_cli pretrain "
        f"--resume --output-dir {out}"
    ), errors
    assert not psutil.pid_exists(workers[0].pid) or not workers[0].is_running()
    (checkpoint,) = (out / "checkpoints").glob("step-*")
    step = int(checkpoint.name.removeprefix("step-"))
    assert f"after step {step:,}, checkpoint saved" in output
    assert reports(out)[-1]["step"] == step
    # One process alone finds a whole state there and goes on.
    result = pretrain(tiny(corpus, out, **{**options, "max_steps": step + 2, "resume": "auto"}))
    assert (result.steps, result.stopped) == (step + 2, None)


def test_values_are_summed_over_all_ranks() -> None:
    ranks = SimpleNamespace(
        num_processes=2, device=torch.device("cpu"), reduce=lambda values, reduction: values * 2
    )
    assert sum_over_processes(torch.tensor([1.0, 2.5]), ranks) == [2.0, 5.0]  # type: ignore[arg-type]
