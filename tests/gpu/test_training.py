"""Asynchronous metrics, `--batch-size auto`, CUDA graphs, fp16, fp8 and experts on a CUDA GPU."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training import test_async_metrics, test_auto_batch_size, test_recompilation

from minimind.config.options import PretrainConfig
from minimind.data.builtin_corpus import builtin_documents
from minimind.data.shards import ShardWriter, TokenShards, random_shards, token_dtype
from minimind.distributed.accelerator import close_accelerator, start_accelerator
from minimind.formats.open_model import open_model
from minimind.modeling import float8
from minimind.optim.build import set_schedule
from minimind.planning.budget import plan_budget
from minimind.tokenizer import load_tokenizer
from minimind.training.async_metrics import AsyncScalars
from minimind.training.cuda_graph import StepGraphs
from minimind.training.pretrain import pretrain
from minimind.training.setup import build_training, resolve_run
from minimind.training.step import train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_seq_len": 128,
    "batch_size": 4,
}


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
    values = torch.zeros(2, device="cuda")
    values += 1
    readback.enqueue(0, values)  # the first pinned allocation, and loading a kernel, may wait
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
    torch._C._cuda_clearCublasWorkspaces()
    before = torch.cuda.memory_allocated()
    config, (sentence,) = test_auto_batch_size.resolve(tmp_path, compile=True, mixed_precision="auto")
    assert config.batch_size in (1, 2, 4, 8)
    assert "measured: " in sentence
    torch._C._cuda_clearCublasWorkspaces()
    assert torch.cuda.memory_allocated() - before < 1e6


def test_a_budget_measures_a_gpu_whose_index_is_not_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    config = PretrainConfig(
        budget="10s", output_dir=str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"), tracker=("none",)
    )
    plan = plan_budget(config, quiet=True)
    assert plan.machine.device == "cuda"
    assert plan.best.measured


def graphs_and_weights(
    tmp_path: Path, *, update: bool, accumulation: int
) -> tuple[StepGraphs, list[torch.Tensor], list[list[float]]]:
    """Train some steps; return the graphs, the weights and the values of each step."""
    config = PretrainConfig(
        **SMALL,
        accumulation_steps=accumulation,
        compile=False,
        output_dir=str(tmp_path),
    )
    accelerator = start_accelerator(config)
    try:
        inputs = resolve_run(config)
        shards = random_shards(tmp_path / f"tokens-{update}", inputs.model_config.vocab_size)
        parts = build_training(inputs, shards, accelerator)
        assert parts.graphs is not None
        graphs = parts.graphs if update else StepGraphs(parts.graphs.forward_backward)
        values = []
        for step, batch in zip(range(12), parts.loader.steps(0), strict=False):
            set_schedule(parts.optimizer, 1e-3 * (1 + step), step)
            # A loss above the limit skips one of the steps that are captured.
            limit = 1.0 if step == 9 else math.inf
            done = train_step(
                parts.model,
                parts.optimizer,
                batch,
                accelerator,
                grad_clip=1.0,
                loss_limit=limit,
                graphs=graphs,
            )
            values.append(done.tolist())
        return graphs, [p.detach().clone() for p in parts.model.parameters()], values
    finally:
        close_accelerator(accelerator)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_updates_in_a_graph_equal_those_without(tmp_path: Path, accumulation: int) -> None:
    graphs, weights, values = graphs_and_weights(tmp_path, update=True, accumulation=accumulation)
    assert graphs.update is not None
    assert graphs.update.captured
    _, wanted, expected = graphs_and_weights(tmp_path, update=False, accumulation=accumulation)
    for step, (ours, theirs) in enumerate(zip(values, expected, strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-5), step
    for ours, theirs in zip(weights, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_with_graphs_has_the_losses_of_one_without(tmp_path: Path, accumulation: int) -> None:
    losses = {}
    ways = {
        "with": (True, True, False),
        "without": (True, False, False),
        "with, not compiled": (False, True, False),
        "recomputed, not compiled": (False, None, True),
        "recomputed": (True, None, True),
    }
    for name, (compiled, graphs, recomputed) in ways.items():
        config = PretrainConfig(
            **SMALL,
            accumulation_steps=accumulation,
            # A low rate: with the default one the first steps amplify differences of rounding by a hundred.
            learning_rate=5e-4,
            max_steps=12,
            eval_interval=5,
            log_interval=1,
            compile=compiled,
            cuda_graphs=graphs,
            activation_checkpointing=recomputed,
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
    # Compiled code rounds to bf16 in other places.
    assert losses["with, not compiled"] == pytest.approx(losses["without"], rel=1e-3)
    assert losses["recomputed, not compiled"] == pytest.approx(losses["with, not compiled"], rel=1e-3)
    assert losses["recomputed"] == pytest.approx(losses["without"], rel=1e-3)
    assert len(losses["with"]) >= 12


def skewed_shards(folder: Path, vocab_size: int) -> TokenShards:
    """Write 3M random tokens, 60% of which are the same."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    tokens = rng.integers(0, vocab_size, 3_000_000)
    tokens[rng.random(len(tokens)) < 0.6] = 32
    writer = ShardWriter(folder, "train", token_dtype(vocab_size))
    writer.append(tokens.astype(token_dtype(vocab_size)), np.full(3_000, 1_000, np.int64))
    return TokenShards(folder, "train", writer.close(), "skewed")


def test_fp16_with_a_small_vocabulary_and_large_batches_trains_as_bf16_does(tmp_path: Path) -> None:
    """A gradient that overflows whatever the loss scale would skip every update."""
    steps, losses, skipped, scale = 40, {}, [], 0.0
    shards = skewed_shards(tmp_path / "tokens", 256)
    for precision in ("no", "bf16", "fp16"):
        options: dict[str, Any] = {**SMALL, "max_seq_len": 512, "batch_size": 512, "compile": False}
        config = PretrainConfig(**options, mixed_precision=precision, output_dir=str(tmp_path))
        accelerator = start_accelerator(config)
        try:
            inputs = resolve_run(config)
            inputs = dataclasses.replace(
                inputs, model_config=dataclasses.replace(inputs.model_config, vocab_size=256)
            )
            parts = build_training(inputs, shards, accelerator)
            batches = parts.loader.steps(0, epochs=None)
            losses[precision] = []
            for step, batch in zip(range(steps), batches, strict=False):
                set_schedule(parts.optimizer, 2e-3, step)
                done = train_step(
                    parts.model, parts.optimizer, batch, accelerator, grad_clip=1.0, graphs=parts.graphs
                )
                losses[precision].append(done[0].item() / batch.num_targets)
                if precision == "fp16":
                    skipped.append(parts.optimizer.step_was_skipped)
                    scale = accelerator.scaler.get_scale()
            parts.release()
        finally:
            close_accelerator(accelerator)
    assert all(map(math.isfinite, losses["fp16"]))
    assert not any(skipped[10:]), (skipped, scale)
    assert scale >= 1
    assert losses["no"][-1] < losses["no"][0] - 1
    assert losses["bf16"][-1] == pytest.approx(losses["no"][-1], rel=1e-2)
    assert losses["fp16"][-1] == pytest.approx(losses["no"][-1], rel=1e-2), skipped


@pytest.mark.skipif(not float8.available(), reason="needs compute capability 8.9")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_fp8_trains_as_bf16_does(tmp_path: Path, accumulation: int) -> None:
    losses = {}
    for precision in ("bf16", "fp8"):
        config = PretrainConfig(
            **SMALL | {"batch_size": 32},
            accumulation_steps=accumulation,
            mixed_precision=precision,
            max_steps=30,
            log_interval=1,
            output_dir=str(tmp_path / precision),
            cache_dir=str(tmp_path / "cache"),
            tracker=("none",),
        )
        history = pretrain(config).history
        losses[precision] = [*history.losses, *history.val_losses]
        launch = json.loads((tmp_path / precision / "environment.json").read_text())["launch"]
        assert launch["precision"] == precision
        assert launch["compiled"] or precision == "bf16"
        assert len(history.losses) == 30
    assert losses["bf16"][29] < 0.9 * losses["bf16"][0]
    assert losses["fp8"] == pytest.approx(losses["bf16"], rel=0.02)
    assert losses["fp8"] != losses["bf16"]


def test_ten_evaluations_of_a_compiled_run_of_28_layers_compile_nothing_again(tmp_path: Path) -> None:
    graphs = test_recompilation.graphs_at_evaluations(tmp_path, hidden_size=64)
    assert graphs[0] >= 3
    assert set(graphs[1:]) == {graphs[1]}, graphs


def test_no_expert_dies_in_3000_steps_with_little_balancing(tmp_path: Path) -> None:
    config = PretrainConfig(
        **SMALL | {"hidden_size": 128, "batch_size": 32},
        use_moe=True,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        router_aux_loss_coef=0.001,
        compile=True,
        cuda_graphs=True,
        epochs=1_000,
        max_steps=3_000,
        log_interval=250,
        save_interval=1_000_000,
        val_fraction=0.0,
        output_dir=str(tmp_path / "run"),
        cache_dir=str(tmp_path / "cache"),
        tracker=("none",),
    )
    result = pretrain(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    reports = [row for row in rows if "expert_load" in row]
    assert len(reports) == 12
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in reports)
    assert reports[-1]["loss"] < reports[0]["loss"]
    # 4 for an expert that every token is routed to; 2.1 was measured.
    loads = [row["expert_load"] for row in reports]
    assert max(loads[1:]) < 3, loads
    assert all(row["dropped_share"] < 1e-6 for row in reports)

    assert result.model_dir is not None
    model = open_model(str(result.model_dir)).load().cuda()
    largest = {name: p.abs().max().item() for name, p in model.named_parameters() if ".mlp." in name}
    assert max(largest.values()) < 2, largest  # 0.5 was measured
    tokenizer = load_tokenizer()
    documents = itertools.islice(builtin_documents(), 100)
    tokens = list(itertools.chain.from_iterable(map(tokenizer.encode, documents)))[: 128 * 128]
    with torch.no_grad():
        output = model(torch.tensor(tokens, device="cuda").view(-1, 128))
    shares = output.routing[:, 0] / output.routing[:, 0].mean(-1, keepdim=True)
    assert shares.min() > 0.03, shares  # 0.15 was measured
