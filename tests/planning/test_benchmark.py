"""The measurement of speed: what it runs, that its parts add up, and when it makes a step smaller."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import minimind.planning.benchmark as module
from minimind.config.options import PretrainConfig
from minimind.modeling.config import MiniMindConfig
from minimind.planning.benchmark import PARTS, WARMUP_STEPS, BenchmarkResult, benchmark, matmul_flops
from minimind.training.setup import RunInputs
from minimind.training.step import train_step
from support import topologies

TINY = PretrainConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_seq_len=64,
    batch_size=8,
    compile=False,
)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    topologies.forget_accelerator()
    yield
    topologies.forget_accelerator()


@pytest.fixture(scope="module")
def measured() -> tuple[BenchmarkResult, list[tuple[int, int]]]:
    """The result, and micro-batches and sequences of each training step that was measured."""
    steps: list[tuple[int, int]] = []

    def counting(model: Any, optimizer: Any, batch: Any, *rest: Any, **options: Any) -> torch.Tensor:
        if options["timer"] is None:
            steps.append((len(batch.micro_batches), len(batch.micro_batches[0].input_ids)))
        return train_step(model, optimizer, batch, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(module, "train_step", counting)
        topologies.forget_accelerator()
        return benchmark(dataclasses.replace(TINY, accumulation_steps=2), seconds=0.5), steps


def test_whole_steps_are_those_of_training(measured: Any) -> None:
    result, steps = measured
    assert len(steps) == WARMUP_STEPS + 1 + result.steps
    assert result.steps > 2  # as many as fit into the time
    assert set(steps) == {(2, 8)}
    tokens = 2 * 8 * 64
    assert result.tokens_per_second == pytest.approx(tokens / result.step_seconds)
    assert (
        result.parameters
        == MiniMindConfig(
            vocab_size=6400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
        ).num_parameters()
    )


def test_the_parts_make_up_a_step(measured: Any) -> None:
    result, _ = measured
    parts = [getattr(result, f"{name}_seconds") for name in PARTS]
    # No more than this: what else the machine does may fall into any of these measurements.
    assert all(part > 0 for part in parts)
    assert result.step_seconds > 0


def test_utilization_is_reported_only_where_the_peak_is_known(
    measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, _ = measured
    assert (result.mfu, result.peak_flops) == (None, None)
    assert "MFU" not in dict(result.rows())
    assert 0 < result.matmul_share < 1.2
    monkeypatch.setattr(module, "peak_flops_of", lambda device: 1e12)
    known = benchmark(TINY, seconds=0.1)
    assert known.mfu == pytest.approx(known.tokens_per_second * known.flops_per_token / 1e12)


def test_nothing_is_left_behind(measured: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    benchmark(TINY, seconds=0.1)
    assert list(tmp_path.iterdir()) == []


def test_auto_is_measured_before_the_benchmark(tmp_path: Any) -> None:
    config = dataclasses.replace(TINY, batch_size="auto", global_batch_size=8, cache_dir=str(tmp_path))
    result = benchmark(config, seconds=0.1)
    assert result.batch_size in (1, 2, 4, 8)
    assert not result.reduced
    (known,) = json.loads((tmp_path / "batch_sizes.json").read_text()).values()
    assert known == result.batch_size


def test_a_step_that_would_take_long_is_made_smaller_and_says_so() -> None:
    shape = MiniMindConfig(hidden_size=1792, num_hidden_layers=28, num_attention_heads=14)
    tokenizer: Any = None
    wanted = RunInputs(
        PretrainConfig(batch_size=32, global_batch_size=64, max_seq_len=2048), shape, tokenizer
    )
    slow = module._shortened(wanted, 80e9).config
    assert slow.batch_size == 1
    assert 64 <= slow.max_seq_len < 2048
    assert slow.global_batch_size is None
    assert module._shortened(wanted, 1e15) == wanted


@pytest.mark.parametrize("long", [False, True])
def test_a_smaller_step_tells_the_speed_of_the_one_asked_for(
    monkeypatch: pytest.MonkeyPatch, long: bool
) -> None:
    """On a CPU; the optimizer steps once for any batch, so one sequence alone would look much slower."""
    steps: list[None] = []

    def counting(*arguments: Any, **options: Any) -> torch.Tensor:
        if options["timer"] is None:
            steps.append(None)
        return train_step(*arguments, **options)

    monkeypatch.setattr(module, "train_step", counting)
    monkeypatch.setattr(module, "matmul_flops", lambda device, precision: 1e3)
    if long:
        monkeypatch.setattr(module, "LONGEST_STEP", 1e-6)
    result = benchmark(dataclasses.replace(TINY, max_seq_len=128), seconds=1e-6)
    assert (result.batch_size, result.max_seq_len, result.reduced) == (1, 64, True)
    # A long step is measured in its parts, after a single one.
    assert (len(steps), result.steps) == ((1, 1) if long else (WARMUP_STEPS + 3, 2))
    shape = MiniMindConfig(
        vocab_size=6400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    assert result.flops_per_token == shape.flops_per_token(128)
    work = 8 * 2 * shape.flops_per_token(128) / shape.flops_per_token(64)
    parts = [getattr(result, f"{name}_seconds") for name in PARTS]
    optimizer = result.step_seconds * result.optimizer_seconds / sum(parts)
    seconds = work * (result.step_seconds - optimizer) + optimizer
    assert result.tokens_per_second == pytest.approx(8 * 128 / seconds)
    assert result.matmul_share == pytest.approx(result.tokens_per_second * result.flops_per_token / 1e3)
    assert f"scaled from {result.steps} step" in dict(result.rows())["speed"]


def test_the_matmul_speed_is_one_that_a_computer_can_have() -> None:
    assert 1e8 < matmul_flops(torch.device("cpu"), "no") < 1e14


def test_the_wait_for_data_is_that_of_one_batch(measured: Any) -> None:
    result, _ = measured
    # Whole steps alone are measured for half a second before.
    assert 0 <= result.data_seconds < 0.25


def test_steps_are_counted_in_the_plural_from_two_on(measured: Any) -> None:
    result, _ = measured
    for steps, text in ((1, "(1 step)"), (2, "(2 steps)")):
        assert text in dict(dataclasses.replace(result, steps=steps, reduced=False).rows())["speed"]


def test_the_screen_of_a_benchmark() -> None:
    result = BenchmarkResult(
        device="CPU", processes=2, precision="no", compiled=False, optimizer="adamw", parameters=1_600_000,
        batch_size=4, max_seq_len=32, reduced=False, steps=5, step_seconds=0.25, tokens_per_second=1024.0,
        data_seconds=0.01, forward_seconds=0.08, backward_seconds=0.12, optimizer_seconds=0.04,
        start_seconds=7.0, memory_gb=1.5, flops_per_token=12_000_000, peak_flops=None, mfu=None,
        matmul_flops=8e10, matmul_share=0.125,
    )  # fmt: skip
    assert dict(result.rows()) == {
        "model": "1.60M parameters, 12.0M FLOP per token",
        "device": "CPU x 2, float32",
        "step": "4 sequences x 32 tokens per micro-batch",
        "speed": "1.02k tokens/s (5 steps)",
        "matmul": "80.0GFLOP/s measured; training uses 12.5% of it",
        "time": "250.0 ms per step: data 10.0 ms, forward 80.0 ms, backward 120.0 ms, optimizer 40.0 ms",
        "memory": "1.50 GB",
        "start": "7s",
    }
    compiled = dataclasses.replace(result, precision="bf16", compiled=True, mfu=0.25, reduced=True)
    rows = dict(compiled.rows())
    assert (rows["device"], rows["start"], rows["MFU"]) == ("CPU x 2, bf16", "7s with compilation", "25.0%")
    assert rows["step"].endswith(", less than asked for, which would take too long here")
    assert rows["speed"].endswith("for the size asked for, scaled from 5 steps")
