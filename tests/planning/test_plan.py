"""A plan against the run that it describes: sizes, steps and disk must be those that then come."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import minimind.planning.plan as module
import minimind.planning.scaled_run as scaled_run
from minimind.config.options import PretrainConfig
from minimind.data.batch_plan import BatchPlan, plan_batches
from minimind.data.prepare import prepare_data
from minimind.errors import CheckpointError, ConfigError
from minimind.planning.benchmark import BenchmarkResult, TooLargeError
from minimind.planning.memory import MemoryEstimate
from minimind.planning.plan import plan_run
from minimind.planning.plan_report import RunPlan
from minimind.planning.scaled_run import ScaleRequest
from minimind.training.pretrain import pretrain
from minimind.training.setup import resolve_run
from support import tiny_runs, topologies

RESULT = BenchmarkResult(
    device="CPU",
    processes=1,
    precision="no",
    compiled=False,
    optimizer="adamw",
    parameters=1,
    batch_size=4,
    max_seq_len=32,
    reduced=False,
    steps=2,
    step_seconds=1.0,
    tokens_per_second=1.0,
    data_seconds=0.0,
    forward_seconds=0.4,
    backward_seconds=0.4,
    optimizer_seconds=0.2,
    start_seconds=7.0,
    memory_gb=1.5,
    flops_per_token=1,
    peak_flops=None,
    mfu=None,
    matmul_flops=1.0,
    matmul_share=0.1,
)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    topologies.forget_accelerator()
    yield
    topologies.forget_accelerator()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return tiny_runs.write_corpus(tmp_path / "corpus.jsonl")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[PretrainConfig]:
    """Put a fake measurement in place of the real one; the list holds what was to be measured."""
    configs: list[PretrainConfig] = []

    def benchmark(config: PretrainConfig, seconds: float) -> BenchmarkResult:
        configs.append(config)
        return RESULT

    monkeypatch.setattr(module, "benchmark", benchmark)
    return configs


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_the_run_that_follows_is_the_one_that_was_planned(corpus: Path, tmp_path: Path) -> None:
    config = tiny_runs.tiny(corpus, tmp_path / "out", keep_checkpoints=20)
    plan = plan_run(config, seconds=0.1, quiet=True)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "cache").exists()
    result = pretrain(config)
    assert (plan.total_steps, plan.total_tokens) == (result.steps, result.tokens)
    checkpoint = tiny_runs.last_checkpoint(tmp_path / "out")
    # The files also hold their headers and the names of the tensors.
    tensors = sum(
        (checkpoint.path / name).stat().st_size for name in ("model.safetensors", "optimizer.safetensors")
    )
    assert plan.checkpoint_bytes <= tensors <= plan.checkpoint_bytes * 1.2
    assert checkpoint.trainer["settings"]["data_fingerprint"] == plan.data.fingerprint
    assert plan.measured is not None
    assert plan.seconds > 0
    assert sum(plan.parts.values()) == plan.measured.parameters
    resumed = dataclasses.replace(config, resume="auto")
    again = plan_run(resumed, seconds=0.1, quiet=True)
    assert (again.first_step, again.total_steps) == (result.steps, result.steps)
    # What the run would refuse or warn of at its start.
    with pytest.raises(CheckpointError, match=r"cannot resume from .*:\n  seed 42 → 43"):
        plan_run(dataclasses.replace(resumed, seed=43), seconds=0.1, quiet=True)
    (checkpoint.path / "trainer.json").unlink()
    earlier = plan_run(resumed, seconds=0.1, quiet=True)
    assert 0 < earlier.first_step < result.steps
    assert any("is skipped" in problem for problem in earlier.problems)


@pytest.mark.parametrize("packing", [True, False])
def test_the_tokens_of_a_plan_are_those_of_its_steps(
    corpus: Path, tmp_path: Path, asked: list[PretrainConfig], packing: bool
) -> None:
    """The last step of an epoch is short, so a step is no fixed share of an epoch's tokens."""
    config = tiny_runs.tiny(corpus, tmp_path / "out", accumulation_steps=3, packing=packing)
    inputs = resolve_run(config)
    data = prepare_data(config, inputs.tokenizer)
    batches = plan_batches(config, 1)
    loader = inputs.loader(data.train, batches)
    taken = [step.num_tokens for epoch in range(2) for step in loader.steps(epoch)]
    per_epoch = loader.steps_per_epoch
    assert taken[per_epoch - 1] < taken[0]
    for steps in (1, per_epoch - 1, per_epoch, per_epoch + 2):
        planned = plan_run(dataclasses.replace(config, max_steps=steps), quiet=True).total_tokens
        # Inside an epoch one short sequence may come later, and padded ones are counted by their mean length.
        most = 0 if steps == per_epoch else config.max_seq_len if packing else 0.25 * planned
        assert abs(planned - sum(taken[:steps])) <= most


def test_a_long_step_is_put_together_from_its_micro_batches(
    corpus: Path, tmp_path: Path, asked: list[PretrainConfig]
) -> None:
    config = tiny_runs.tiny(corpus, tmp_path / "out", accumulation_steps=5, epochs=40)
    plan = plan_run(config, quiet=True)
    assert (asked[0].accumulation_steps, asked[0].global_batch_size) == (2, None)
    # Two of the five micro-batches take 0.8 s forward and backward and are in the second that was measured.
    assert plan.step_seconds == pytest.approx(1.0 + 3 * 0.4)
    by_global = dataclasses.replace(config, accumulation_steps=None, global_batch_size=20)
    assert plan_run(by_global, quiet=True).step_seconds == plan.step_seconds


def test_time_and_cost_count_the_start_the_steps_and_the_evaluations(
    corpus: Path, tmp_path: Path, asked: list[PretrainConfig]
) -> None:
    config = tiny_runs.tiny(corpus, tmp_path / "out", eval_batches=1)
    plan = plan_run(config, price_per_hour=3600.0, quiet=True)
    # Two micro-batches each.
    evaluations = 2 * (1 + -(-plan.total_steps // 5))
    assert plan.evaluation_seconds == pytest.approx(0.2 * evaluations)
    assert plan.seconds == pytest.approx(7.0 + plan.total_steps * 1.0 + 0.2 * evaluations)
    assert plan.cost == pytest.approx(plan.seconds)
    assert "cost" in dict(plan.rows())
    assert "cost" not in dict(plan_run(config, quiet=True).rows())


def test_a_step_measured_smaller_is_scaled_by_its_arithmetic_but_for_the_optimizer(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smaller = dataclasses.replace(RESULT, batch_size=1, reduced=True)
    monkeypatch.setattr(module, "benchmark", lambda config, seconds: smaller)
    monkeypatch.setattr(module, "_device_memory", lambda: 8 * 10**9)
    plan = plan_run(tiny_runs.tiny(corpus, tmp_path / "out"), quiet=True)
    # A second, of which the optimizer took 0.2, for a quarter of the sequences.
    assert plan.step_seconds == pytest.approx(4 * 0.8 + 0.2)
    assert plan.measured_memory is None
    assert "scaled up" in dict(plan.rows())["speed"]


def test_a_step_that_does_not_fit_leaves_a_plan_without_times(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(config: PretrainConfig, seconds: float) -> BenchmarkResult:
        raise TooLargeError("--batch-size 4 does not fit; lower it.")

    monkeypatch.setattr(module, "benchmark", fails)
    plan = plan_run(tiny_runs.tiny(corpus, tmp_path / "out"), price_per_hour=1.0, quiet=True)
    assert (plan.seconds, plan.cost, plan.step_seconds) == (None, None, None)
    assert plan.problems[0].startswith("--batch-size 4 does not fit")
    assert "does not fit" in dict(plan.rows())["time"]
    json.dumps(plan.to_dict())


@pytest.mark.parametrize("place", ["build_training", "measure_steps"])
def test_out_of_memory_is_distinguished_from_other_errors(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(f"minimind.planning.benchmark.{place}", fails)
    plan = plan_run(tiny_runs.tiny(corpus, tmp_path / "out"), seconds=0.1, quiet=True)
    assert plan.measured is None
    assert "does not fit into the memory of the GPU" in plan.problems[0]


def test_what_would_go_wrong_is_reported(
    corpus: Path, tmp_path: Path, asked: list[PretrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_runs.tiny(corpus, tmp_path / "out")
    assert plan_run(config, quiet=True).problems == ()
    monkeypatch.setattr(module, "_device_memory", lambda: 10**6)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: Disk(free=1000))
    in_a_file = dataclasses.replace(config, output_dir=str(corpus / "out"), keep_every=1)
    text = " ".join(plan_run(in_a_file, quiet=True).problems)
    assert "raise --keep-every" in text
    assert f"cannot be written, because {corpus} cannot" in text
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").touch()
    short = dataclasses.replace(config, max_time="9s", warmup_steps=15, save_interval=999, decay_steps=3)
    text = " ".join(plan_run(short, quiet=True).problems)
    for phrase in ("--keep-checkpoints", "already holds a run", "of the GPU's", "max_time 9s ends the run",
                  "max_time 9s allows about 2 steps, fewer than the 15 of the warm-up",
                  "save_interval 999 is beyond the run", "decay_steps 3 has no effect"):  # fmt: skip
        assert phrase in text


@dataclasses.dataclass
class Disk:
    free: int


@pytest.mark.parametrize(
    ("changes", "checkpoints"),
    [
        ({"keep_checkpoints": 2}, 4),  # the best and the one being written besides
        ({"keep_checkpoints": 2, "val_fraction": 0.0}, 3),
        ({"keep_checkpoints": 9, "save_interval": 10}, 2),  # there are no more
        ({"keep_checkpoints": 1, "keep_every": 5, "save_interval": 10}, 4),  # those of 5, 10, 15, 20 stay
        (
            {"keep_checkpoints": 1, "keep_every": 5, "save_interval": 4},
            7,
        ),  # besides, two of 4, ... and the best
    ],
)
def test_disk_is_counted_for_all_checkpoints_that_lie_there_at_one_time(
    corpus: Path, tmp_path: Path, asked: list[PretrainConfig], changes: dict[str, Any], checkpoints: int
) -> None:
    plan = plan_run(tiny_runs.tiny(corpus, tmp_path / "out", **changes), quiet=True)
    assert plan.disk_bytes == checkpoints * plan.checkpoint_bytes + 2 * plan.parameters


def test_a_resumed_run_needs_no_disk_for_the_checkpoints_it_has(
    corpus: Path, tmp_path: Path, asked: list[PretrainConfig]
) -> None:
    config = tiny_runs.tiny(corpus, tmp_path / "out", keep_checkpoints=2)
    present = tmp_path / "out" / "checkpoints" / "step-00000002"
    present.mkdir(parents=True)
    (present / "optimizer.safetensors").write_bytes(bytes(1000))
    data = SimpleNamespace(validation=None)
    new, resumed = (
        module._disk(dataclasses.replace(config, resume=resume), data, 10_000, 500, 40)[0]
        for resume in (None, "auto")
    )
    assert (new, resumed) == (3 * 10_000 + 500, 3 * 10_000 + 500 - 1000)


def test_the_launcher_decides_how_many_share_the_work(
    corpus: Path, tmp_path: Path, asked: list[PretrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_runs.tiny(corpus, tmp_path / "out")
    alone = plan_run(config, quiet=True)
    launched = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**launched, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    shared = plan_run(config, quiet=True)
    assert shared.batches.global_batch_size == 2 * alone.batches.global_batch_size
    assert shared.total_steps == pytest.approx(alone.total_steps / 2, abs=1)
    assert module._shards(2) == 1
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert module._shards(2) == 2
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", "4")
    assert module._shards(8) == 4


def test_json_and_lines_tell_the_same(corpus: Path, tmp_path: Path, asked: list[PretrainConfig]) -> None:
    plan: RunPlan = plan_run(tiny_runs.tiny(corpus, tmp_path / "out"), quiet=True)
    values = json.loads(json.dumps(plan.to_dict()))
    rows = dict(plan.rows())
    assert f"{values['total_steps']:,} steps" in rows["run"]
    assert values["parameters"]["all"] == plan.parameters
    assert values["memory_bytes"]["peak"] == plan.memory.peak
    assert "tokenized now" in rows["cache"]
    assert "found" in dict(plan_run(tiny_runs.tiny(corpus, tmp_path / "out"), quiet=True).rows())["cache"]


def screen(**changes: Any) -> dict[str, str]:
    """Return the rows of a plan of round numbers."""
    memory = MemoryEstimate(
        weights=10 * MB, weight_copies=5 * MB, gradients=10 * MB, optimizer=20 * MB, activations=30 * MB,
        working=4 * MB, optimizer_working=6 * MB, gradients_stay=False, gradients_twice=False,
    )  # fmt: skip
    data: Any = SimpleNamespace(
        train=SimpleNamespace(num_documents=1234), validation=SimpleNamespace(num_tokens=5000), built=True
    )
    values = {
        "config": PretrainConfig(output_dir="out", max_seq_len=64),
        "batches": BatchPlan(4, 2, 3),
        "parts": {"embedding": 1_000_000, "MLP": 1_500_000, "head": 0},
        **{"flops_per_token": 15 * MB, "data": data, "tokens_per_epoch": 100_000, "steps_per_epoch": 65},
        **{"first_step": 0, "total_steps": 130, "total_tokens": 200_000},
        **{"cache_folder": Path("cache"), "cache_bytes": 250_000, "memory": memory, "device_memory": None},
        **{"measured": RESULT, "step_seconds": 0.5, "evaluation_seconds": 8.0, "checkpoint_bytes": 30 * MB},
        **{
            "disk_bytes": 95 * MB,
            "disk_free": 2000 * MB,
            "price_per_hour": None,
            "problems": (),
            "scaled": None,
        },
    }
    return dict(RunPlan(**{**values, **changes}).rows())


MB = 1_000_000


def test_the_screen_of_a_plan() -> None:
    plain = screen()
    assert plain == {
        "model": "2.50M parameters: embedding 1.00M, MLP 1.50M, head 0 (tied)",
        "arithmetic": "15.0M FLOP per token, 3.00T FLOP in total",
        "data": "100k tokens per epoch in 1,234 documents, 5.00k for validation",
        "cache": "250 kB in cache, tokenized now; the run will use it",
        "step": "1.54k tokens (micro-batch 4 x accumulation 2 x processes 3, sequences of 64 tokens)",
        "run": "130 steps, 200k tokens, 2 epochs, 0.08 tokens per parameter",
        "optimizer": "normuon, learning rate 0.004, weight decay 0.1",
        "memory": "estimate 136 MB at the peak: weights 15.0 MB, gradients 10.0 MB, optimizer 20.0 MB, "
        "activations 30.0 MB, working space 6.00 MB",
        "speed": "3.07k tokens/s, 500 ms per step (2 steps measured on CPU x 1)",
        "time": "1m20s: steps 1m05s, evaluations 8s, start 7s",
        "disk": "95.0 MB for checkpoints of 30.0 MB and the model, 2.00 GB free in out",
    }

    def changed(**changes: Any) -> dict[str, str]:
        return {name: text for name, text in screen(**changes).items() if plain.get(name) != text}

    data = SimpleNamespace(train=SimpleNamespace(num_documents=1234), validation=None, built=False)
    assert changed(
        data=data,
        first_step=30,
        config=PretrainConfig(output_dir="o", max_seq_len=64, tie_word_embeddings=False),
    ) == {
        "model": "2.50M parameters: embedding 1.00M, MLP 1.50M, head 0",
        "data": "100k tokens per epoch in 1,234 documents",
        "cache": "250 kB in cache, found; the run will use it",
        "run": "130 steps, 100 of them left, 200k tokens, 2 epochs, 0.08 tokens per parameter",
        "time": "1m05s: steps 50s, evaluations 8s, start 7s",
        "disk": plain["disk"].removesuffix("ut"),
    }
    smaller = dataclasses.replace(RESULT, reduced=True, mfu=0.375)
    assert changed(measured=smaller, device_memory=80_000 * MB, price_per_hour=90.0, step_seconds=2.0) == {
        "": "of 80.0 GB on the GPU",
        "speed": "768 tokens/s, 2 s per step (2 steps measured on CPU x 1, of 4 sequences of 32 tokens and "
        "scaled up)",
        "MFU": "37.5% of the peak FLOP/s",
        "time": "4m35s: steps 4m20s, evaluations 8s, start 7s",
        "cost": "6.88 at 90 per hour",
    }
    assert changed(device_memory=80_000 * MB)[""] == "measured 1.50 GB, of 80.0 GB on the GPU"


def test_more_gpus_are_planned_from_the_measured_step(
    corpus: Path, tmp_path: Path, asked: list[PretrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaled_run, "device_type", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    config = tiny_runs.tiny(
        corpus, tmp_path / "out", accumulation_steps=None, global_batch_size=16, optimizer="muon"
    )
    plan = plan_run(config, price_per_hour=3600.0, scale=ScaleRequest(2), quiet=True)
    scaled = plan.scaled
    assert scaled is not None
    # The step was measured in float32, which has no CUDA graph.
    assert (scaled.gpu, scaled.measured, scaled.graphs) == ("NVIDIA H200", True, False)
    # Four micro-batches here, of which two were measured in a second; two on each of two GPUs.
    assert plan.batches.accumulation_steps == 4
    assert (scaled.one.micro_batches, scaled.one.seconds) == (2, pytest.approx(1.0))
    assert (scaled.one.forward_seconds, scaled.one.backward_seconds) == (0.2, pytest.approx(0.2))
    assert (scaled.step_tokens, scaled.total_steps) == (16 * config.max_seq_len, plan.total_steps)
    assert scaled.one.muon is not None
    assert scaled.one.muon.seconds == 0.2  # at most what the optimizer took
    # The same evaluations by two processes, as far as micro-batches divide.
    assert scaled.other_seconds < plan.evaluation_seconds + 7.0
    assert plan.cost == pytest.approx(scaled.seconds("DDP"))
    assert json.loads(json.dumps(plan.to_dict()))["scaled"]["num_processes"] == 2
    rows = dict(plan.rows())
    assert rows["scaled to"].startswith("2 x NVIDIA H200 on 1 node")
    assert rows["cost"].endswith("per hour with DDP")
    with pytest.raises(ConfigError, match="16 is not a multiple of 12 sequences"):
        plan_run(config, scale=ScaleRequest(3), quiet=True)


def test_without_a_gpu_more_gpus_are_planned_by_the_peak_of_an_h100(
    corpus: Path, tmp_path: Path, asked: list[PretrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_runs.tiny(corpus, tmp_path / "out", optimizer="muon")
    scaled = plan_run(config, scale=ScaleRequest(2), quiet=True).scaled
    assert scaled is not None
    assert (scaled.gpu, scaled.measured, scaled.graphs) == ("NVIDIA H100 80GB HBM3", False, True)
    # So small a model is limited by its launches: 1.1 ms per layer and micro-batch.
    layers, rounds = scaled.one.layers, scaled.one.micro_batches
    assert scaled.one.seconds == pytest.approx(rounds * layers * 8 * 512 / 462e3 / 8)
    assert scaled.one.muon is not None
    large = dataclasses.replace(config, hidden_size=4096, num_attention_heads=32, batch_size=512)
    scaled = plan_run(large, scale=ScaleRequest(2), quiet=True).scaled
    assert scaled is not None
    flops = scaled.step_tokens / 2 * scaled_flops(large)
    assert scaled.one.seconds == pytest.approx(flops / (0.4 * 989.4e12))
    tied = scaled.one.embedding_parameters
    untied = dataclasses.replace(config, tie_word_embeddings=False, optimizer="adamw", reduce_dtype="bf16")
    scaled = plan_run(untied, scale=ScaleRequest(2), quiet=True).scaled
    assert scaled is not None
    assert scaled.one.embedding_parameters == 2 * tied * config.hidden_size // 4096
    assert scaled.one.muon is None
    assert (tied, scaled.one.gradient_bytes) == (6400 * 4096, 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="start --plan without a launcher"):
        plan_run(config, scale=ScaleRequest(2), quiet=True)


def scaled_flops(config: PretrainConfig) -> int:
    return resolve_run(config).model_config.flops_per_token(config.max_seq_len)
