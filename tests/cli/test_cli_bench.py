"""`minimind-train bench`: options of a run, a table or JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from minimind.config.presets import PRESETS

Command = Callable[..., Any]

TINY = (
    *("bench", "--hidden-size", "32", "--num-hidden-layers", "1", "--num-attention-heads", "2"),
    *("--num-key-value-heads", "1", "--max-seq-len", "64", "--batch-size", "4", "--no-compile"),
    *("--seconds", "0.2"),
)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def test_json_holds_every_number(run: Command) -> None:
    done = run(*TINY, "--json", "--optimizer", "muon")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["optimizer"] == "muon"
    assert (result["batch_size"], result["max_seq_len"], result["reduced"]) == (4, 64, False)
    assert result["tokens_per_second"] > 0


def test_the_table_names_speed_time_and_memory(run: Command) -> None:
    done = run(*TINY)
    assert done.code == 0, done.err
    keys = [line.partition(":")[0] for line in done.out.splitlines()]
    assert keys == ["model", "device", "step", "speed", "matmul", "time", "memory", "start"]
    assert "forward" in done.out


def test_without_a_gpu_and_a_size_it_is_the_tiny_preset(
    run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def benchmark(config: Any, seconds: float) -> Any:
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("minimind.planning.benchmark.benchmark", benchmark)
    run("bench", "--learning-rate", "0.1")
    run("bench", "--preset", "minimind-3")
    assert [config.hidden_size for config in seen] == [
        PRESETS[p]["hidden_size"] for p in ("tiny", "minimind-3")
    ]
    assert seen[0].learning_rate == 0.1


def test_a_launch_that_would_measure_one_process_for_several_is_refused(
    run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As `accelerate launch --cpu --num_processes 2` starts it.
    for name, value in {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    done = run(*TINY)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: the launcher was asked for several processes but started one")


def test_a_wrong_option_is_reported_in_a_sentence(run: Command) -> None:
    done = run("bench", "--batch-sise", "4")
    assert done.code == 2
    assert "--batch-size" in done.err
