"""Asynchronous metrics, `--batch-size auto` and CUDA graphs on a CUDA GPU."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from training import test_async_metrics, test_auto_batch_size

from minimind.config.options import PretrainConfig
from minimind.training.async_metrics import AsyncScalars
from minimind.training.pretrain import pretrain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_on_a_gpu_values_arrive_a_fixed_number_of_puts_later() -> None:
    readback: AsyncScalars[int] = AsyncScalars(torch.device("cuda"), delay=2)
    seen = []
    for step in range(5):
        readback.enqueue(step, torch.full((2,), float(step), device="cuda"))
        seen.append([tag for tag, _ in test_async_metrics.read(readback)])
    assert seen == [[], [], [0], [1], [2]]
    assert test_async_metrics.read(readback, everything=True) == [(3, [3.0, 3.0]), (4, [4.0, 4.0])]


def test_putting_does_not_wait_for_a_busy_gpu() -> None:
    readback: AsyncScalars[int] = AsyncScalars(torch.device("cuda"))
    values = torch.ones(2, device="cuda")
    readback.enqueue(0, values)  # the first pinned allocation may wait
    torch.cuda.synchronize()
    torch.cuda._sleep(500_000_000)
    values += 1
    busy = torch.cuda.Event()
    busy.record()
    readback.enqueue(1, values)
    assert not busy.query()
    assert test_async_metrics.read(readback, everything=True) == [(0, [1.0, 1.0]), (1, [2.0, 2.0])]


def test_on_a_gpu_times_are_those_of_the_device_not_of_the_reading() -> None:
    readback: AsyncScalars[int] = AsyncScalars(torch.device("cuda"), delay=5)
    work = torch.ones(1, device="cuda")
    for step in range(4):
        torch.cuda._sleep(50_000_000)  # some 30 ms
        readback.enqueue(step, work)
    torch.cuda.synchronize()
    times = [arrival.time for arrival in readback.ready(everything=True)]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert all(0.01 < gap < 0.2 for gap in gaps)


def test_a_gpu_is_measured_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    before = torch.cuda.memory_allocated()
    config, (sentence,) = test_auto_batch_size.resolve(tmp_path, compile=True, mixed_precision="auto")
    assert config.batch_size in (1, 2, 4, 8)
    assert "measured: " in sentence
    assert torch.cuda.memory_allocated() - before < 1e6


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_with_graphs_has_the_losses_of_one_without(tmp_path: Path, accumulation: int) -> None:
    losses = {}
    ways = {"with": (True, True), "without": (True, False), "with, not compiled": (False, True)}
    for name, (compiled, graphs) in ways.items():
        config = PretrainConfig(
            hidden_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_seq_len=128,
            batch_size=4,
            accumulation_steps=accumulation,
            max_steps=12,
            eval_interval=5,
            log_interval=1,
            compile=compiled,
            cuda_graphs=graphs,
            output_dir=str(tmp_path / name),
            cache_dir=str(tmp_path / "cache"),
            tracker=("none",),
        )
        pretrain(config)
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [
            row.get("loss", row.get("val_loss")) for row in rows if "loss" in row or "val_loss" in row
        ]
    assert losses["with"] == pytest.approx(losses["without"], rel=1e-4)
    assert losses["with, not compiled"] == pytest.approx(losses["without"], rel=1e-3)
    assert len(losses["with"]) >= 12
