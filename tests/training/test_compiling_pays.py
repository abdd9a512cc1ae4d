"""Whether a run on a GPU compiles its model by default: a short one that has CUDA graphs starts without."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DynamoBackend

from minimind import MiniMindConfig, MiniMindForCausalLM, PretrainConfig, preset_config, pretrain
from minimind.data.batch_plan import BatchPlan, max_training_tokens
from minimind.distributed.accelerator import wants_compile
from minimind.modeling.kernels import dispatch as fused
from minimind.optim import build as optim
from minimind.optim.build import build_optimizer
from minimind.training import build_model as prepared_model
from minimind.training import compilation
from minimind.training.build_model import compile_and_wrap
from minimind.training.compilation import SHORT_RUN, USUAL_MFU, build_graphs, compiling_pays
from support.cycle_corpus import write_corpus

SHAPE = MiniMindConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
PEAK = 1e15


class Subclass(MiniMindForCausalLM):
    pass


def machine(device: str = "cuda", processes: int = 1, precision: str = "bf16") -> Any:
    """Only what is asked of an Accelerator, for a GPU that is not here."""
    plugin = SimpleNamespace(backend=DynamoBackend.NO)
    return SimpleNamespace(
        device=torch.device(device),
        num_processes=processes,
        mixed_precision=precision,
        is_fsdp2=False,
        gradient_accumulation_steps=1,
        state=SimpleNamespace(dynamo_plugin=plugin),
    )


@pytest.fixture(autouse=True)
def known_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_BUILDABLE", True)
    monkeypatch.setattr(compilation, "peak_flops_of", lambda device: PEAK if device.type == "cuda" else None)


def pays(tokens: int, accelerator: Any, model: type = MiniMindForCausalLM, **changes: Any) -> bool:
    config = dataclasses.replace(PretrainConfig(), **changes)
    return compiling_pays(config, SHAPE, accelerator, model(SHAPE), tokens)


def test_only_a_long_run_makes_up_for_the_later_start() -> None:
    seconds_per_token = SHAPE.flops_per_token(PretrainConfig().max_seq_len) / (USUAL_MFU * PEAK)
    limit = round(SHORT_RUN / seconds_per_token)
    assert not pays(limit - 10, machine())
    assert pays(limit + 10, machine())


@pytest.mark.parametrize(
    "change",
    [
        {"cuda_graphs": False},
        {"activation_checkpointing": True},
        {"packing": False},
        {"dropout": 0.1},
        {"use_moe": True},
    ],
)
def test_without_a_cuda_graph_short_runs_compile_too(change: dict[str, Any]) -> None:
    assert pays(1000, machine(), **change)


@pytest.mark.parametrize(
    ("accelerator", "model"),
    [
        (machine("cpu"), MiniMindForCausalLM),
        (machine(precision="fp16"), MiniMindForCausalLM),
        (machine(), Subclass),
    ],
    ids=["unknown device", "fp16", "subclass"],
)
def test_where_no_graph_can_be_short_runs_compile_too(accelerator: Any, model: type) -> None:
    assert pays(1000, accelerator, model)


def test_an_fp8_run_compiles_however_short() -> None:
    assert pays(1000, machine(), mixed_precision="fp8")


@pytest.mark.parametrize("asked", [True, False])
def test_what_the_user_asks_for_counts(asked: bool) -> None:
    config = dataclasses.replace(PretrainConfig(), compile=asked)
    assert wants_compile(config, machine(), pays=not asked) == asked


def test_what_the_launcher_was_received_counts() -> None:
    accelerator = machine()
    accelerator.state.dynamo_plugin.backend = DynamoBackend.INDUCTOR
    assert wants_compile(PretrainConfig(), accelerator, pays=False)


@pytest.mark.parametrize(
    ("device", "does_pay", "compiled"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_by_default_a_gpu_compiles_where_it_pays(device: str, does_pay: bool, compiled: bool) -> None:
    assert wants_compile(PretrainConfig(), machine(device), pays=does_pay) == compiled


@pytest.mark.parametrize(
    ("limits", "tokens"),
    [
        ({"epochs": 3}, 30_000),
        ({"epochs": 3, "max_steps": 10}, 10 * 4 * 128),
        ({"epochs": 3, "max_tokens": 777}, 777),
        ({"epochs": 1, "max_steps": 1000, "max_tokens": 10**9}, 10_000),
    ],
)
def test_the_tightest_limit_tells_how_long_a_run_is(limits: dict[str, Any], tokens: int) -> None:
    config = dataclasses.replace(PretrainConfig(), max_seq_len=128, **limits)
    assert max_training_tokens(config, BatchPlan(2, 2, 1), 10_000) == tokens


@pytest.mark.parametrize(
    ("model", "compiled", "captured"),
    [
        (MiniMindForCausalLM, True, True),
        (MiniMindForCausalLM, False, True),
        (Subclass, True, True),
        (Subclass, False, False),
        (torch.nn.Flatten, True, False),
    ],
)
def test_a_model_that_is_not_known_has_a_graph_only_where_it_compiled(
    model: type, compiled: bool, captured: bool
) -> None:
    built = model(SHAPE) if issubclass(model, MiniMindForCausalLM) else model()
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters())
    graphs = build_graphs(
        PretrainConfig(), SHAPE, built, optimizer, machine(), compiled=compiled, note=pytest.fail
    )
    assert (graphs is not None) == captured


def test_on_a_gpu_whose_speed_is_not_known_short_runs_compile_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "peak_flops_of", lambda device: None)
    assert pays(1000, machine())


def test_without_cuda_graphs_there_is_none() -> None:
    config = PretrainConfig(cuda_graphs=False)
    model = MiniMindForCausalLM(SHAPE)
    optimizer = build_optimizer(model, config, "cpu")
    assert build_graphs(config, SHAPE, model, optimizer, machine(), compiled=True) is None


def test_only_an_optimizer_whose_rates_are_on_the_device_is_captured() -> None:
    model = MiniMindForCausalLM(SHAPE)
    for name, captured in (("normuon", True), ("adamw", False)):
        config = PretrainConfig(optimizer=name)
        optimizer = build_optimizer(model, config, "cpu")
        graphs = build_graphs(config, SHAPE, model, optimizer, machine(), compiled=True)
        assert graphs is not None
        assert (graphs.update is not None) == captured


@pytest.mark.parametrize(
    ("compiled", "precision", "kernels"),
    [(True, "no", True), (False, "bf16", True), (False, "no", False)],
)
def test_muon_builds_kernels_where_anything_else_does(
    monkeypatch: pytest.MonkeyPatch, compiled: bool, precision: str, kernels: bool
) -> None:
    class ReachedError(Exception):
        pass

    def muon(*arguments: Any, kernels: bool, **options: Any) -> None:
        raise ReachedError(kernels)

    monkeypatch.setattr(optim, "Muon", muon)
    monkeypatch.setattr(prepared_model, "cast_weights_only", lambda accelerator: None)
    config = PretrainConfig(compile=compiled)
    with pytest.raises(ReachedError) as reached:
        compile_and_wrap(
            config, SHAPE, BatchPlan(2, 1, 1), machine(precision=precision), MiniMindForCausalLM(SHAPE)
        )
    assert reached.value.args == (kernels,)


@pytest.mark.parametrize("answer", [True, False])
def test_a_run_asks_by_its_length_whether_to_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bool
) -> None:
    asked: list[int] = []
    received: list[bool] = []

    def pays_or_not(*arguments: Any) -> bool:
        asked.append(arguments[-1])
        return answer

    def received_so(*arguments: Any, pays: bool) -> bool:
        received.append(pays)
        return False

    monkeypatch.setattr(prepared_model, "compiling_pays", pays_or_not)
    monkeypatch.setattr(prepared_model, "wants_compile", received_so)
    config = preset_config(
        "tiny",
        hidden_size=32,
        num_hidden_layers=1,
        max_seq_len=64,
        batch_size=2,
        max_steps=3,
        eval_interval=None,
        val_fraction=0,
        tracker=("none",),
        output_dir=str(tmp_path / "run"),
        data=(str(write_corpus(tmp_path / "corpus.jsonl")),),
        cache_dir=str(tmp_path / "cache"),
    )
    pretrain(config)
    assert (asked, received) == ([3 * 2 * 64], [answer])
