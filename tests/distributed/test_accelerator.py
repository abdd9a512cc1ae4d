"""Launches that Accelerate would silently carry out differently are refused, with the command that works."""

from __future__ import annotations

import itertools
import re
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from minimind.config.options import PretrainConfig
from minimind.data.shards import random_shards
from minimind.distributed import accelerator as module
from minimind.distributed.accelerator import check_launch, choose_precision, prepare, start_accelerator
from minimind.distributed.launch_checks import launch_problems
from minimind.errors import ConfigError
from minimind.launch_env import is_main_process, is_set, restarts, world_size
from minimind.training.setup import build_training, resolve_run

LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no"}
TWO = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
TWO |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
FSDP2 = {**TWO, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
HSDP = {
    **FSDP2,
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_TP_SIZE": "1",
}


def problems(env: dict[str, str], devices: int = 0, **options: Any) -> list[str]:
    return list(launch_problems(PretrainConfig(**options).accumulation_steps, devices, env))


@pytest.mark.parametrize(
    ("env", "devices"),
    [
        ({}, 0),
        ({}, 8),
        (LAUNCHED, 0),
        (TWO, 0),
        (TWO, 2),
        (FSDP2, 2),
        (HSDP, 2),
        ({**TWO, "ACCELERATE_USE_CPU": "true"}, 1),
        ({"WORLD_SIZE": "1"}, 2),
        ({"MASTER_ADDR": "node0"}, 2),  # as a script of a cluster may export it
        ({"SLURM_STEP_NUM_TASKS": "2", **TWO}, 2),
        ({"SLURM_STEP_NUM_TASKS": "1"}, 2),
        ({**TWO, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, 2),
    ],
)
def test_a_valid_launch_is_accepted(env: dict[str, str], devices: int) -> None:
    assert problems(env, devices) == []


@pytest.mark.parametrize(
    ("env", "devices", "answer"),
    [
        (
            {**LAUNCHED, "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "True"},
            0,
            "started one.*launch with accelerate launch --multi_gpu --num_processes N -m minimind_cli",
        ),
        (
            # Alone it meets nobody, at no port.
            {**LAUNCHED, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "True"},
            4,
            "launch with ACCELERATE_USE_CPU=true accelerate launch --multi_gpu",
        ),
        ({"SLURM_STEP_NUM_TASKS": "4"}, 1, "^srun started 4 processes that are not connected"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 0, "^mpirun started 2 processes"),
        (TWO, 1, "2 processes were launched on this machine, which has 1 GPU;"),
        ({**TWO, "MASTER_PORT": "0"}, 2, "--standalone"),
        # As scripts of clusters export them.
        ({"WORLD_SIZE": "8", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "1"}, 0, "MASTER_ADDR is not"),
        ({"WORLD_SIZE": "2"}, 4, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set.*unset WORLD_SIZE"),
        ({**FSDP2, "FSDP_VERSION": "1"}, 2, "FSDP version 1; add --fsdp_version 2"),
        (
            FSDP2,
            0,
            "none is used.*DDP instead: accelerate launch --multi_gpu --num_processes 2",
        ),
        ({**FSDP2, "ACCELERATE_USE_CPU": "1"}, 2, "none is used here"),
        (
            {**TWO, "ACCELERATE_USE_DEEPSPEED": "true"},
            2,
            "^DeepSpeed is not supported; FSDP2.*: accelerate launch --use_fsdp --fsdp_version 2 "
            "--num_processes 2 -m minimind_cli pretrain",
        ),
        (
            {**TWO, "ACCELERATE_USE_DEEPSPEED": "true"},
            0,
            "^DeepSpeed is not supported; train with DDP: accelerate launch --multi_gpu --num_processes 2",
        ),
        ({**TWO, "ACCELERATE_USE_MEGATRON_LM": "true"}, 2, "^Megatron-LM is not supported"),
        ({**HSDP, "PARALLELISM_CONFIG_TP_SIZE": "2"}, 2, r"^tensor parallelism \(tp_size 2\).*dp_shard_size"),
        ({**HSDP, "PARALLELISM_CONFIG_CP_SIZE": "2"}, 2, "^context parallelism"),
        ({**HSDP, "PARALLELISM_CONFIG_SP_SIZE": "2"}, 2, "^sequence parallelism"),
        ({**TWO, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, 2, "pass --accumulation-steps 4"),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "x"},
            2,
            "STEPS=x of the launcher differs from",
        ),
        ({"ACCELERATE_USE_CPU": ""}, 0, "^ACCELERATE_USE_CPU= is neither true nor false"),
        ({"ACCELERATE_USE_CPU": "maybe"}, 2, "^ACCELERATE_USE_CPU=maybe is neither"),
    ],
)
def test_an_unsupported_launch_is_refused_with_the_fix(
    env: dict[str, str], devices: int, answer: str
) -> None:
    (problem,) = problems(env, devices)
    assert re.search(answer, problem), problem


def test_equal_accumulation_of_launcher_and_options_is_accepted() -> None:
    env = {**TWO, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    assert problems(env, 2, accumulation_steps=4) == []


@pytest.fixture
def _launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    # Registered, so that monkeypatch undoes what check_launch sets.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.usefixtures("_launched")
def test_several_processes_without_a_gpu_train_on_the_cpu() -> None:
    remark = check_launch(PretrainConfig())
    assert remark == "no GPU here: 2 processes train together on CPUs."
    assert is_set("ACCELERATE_USE_CPU")
    assert check_launch(PretrainConfig()) is None
    assert (world_size(), restarts(), is_main_process()) == (2, 0, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.parametrize(
    ("threads", "launched", "idle"), [(1, True, True), (8, True, False), (1, False, False)]
)
def test_cores_that_a_launcher_leaves_idle_are_reported(
    monkeypatch: pytest.MonkeyPatch, threads: int, launched: bool, idle: bool
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for name in ("WORLD_SIZE", "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    message = "1 of 8 cores are used: launchers set 1 thread per process; set OMP_NUM_THREADS=8"
    assert (message in (check_launch(PretrainConfig()) or "")) == idle


def test_all_problems_are_reported_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ConfigError) as caught:
        check_launch(PretrainConfig())
    assert len(caught.value.problems) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.parametrize(
    ("units", "width", "options", "precision"),
    [
        ({"_is_amx_tile_supported": True}, 512, {}, "bf16"),
        ({"_is_avx512_bf16_supported": True}, 512, {}, "bf16"),
        ({"_is_amx_tile_supported": False, "_is_avx512_bf16_supported": False}, 512, {}, "no"),
        ({}, 512, {}, "no"),  # a torch that cannot tell
        ({"_is_amx_tile_supported": True}, 128, {}, "no"),
        ({"_is_amx_tile_supported": True}, 512, {"mixed_precision": "no"}, "no"),
        ({}, 128, {"mixed_precision": "bf16"}, "bf16"),
    ],
)
def test_a_cpu_defaults_to_bf16_only_with_bf16_instructions(
    monkeypatch: pytest.MonkeyPatch,
    units: dict[str, bool],
    width: int,
    options: dict[str, Any],
    precision: str,
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    for name, there in units.items():
        monkeypatch.setattr(torch.cpu, name, lambda there=there: there, raising=False)
    assert choose_precision(PretrainConfig(hidden_size=width, **options)) == precision


@pytest.mark.parametrize(
    ("precision", "remedy"), [("fp8", "use --mixed-precision fp8"), ("fp16", "needs a GPU")]
)
def test_an_unsupported_precision_is_refused_early(
    monkeypatch: pytest.MonkeyPatch, precision: str, remedy: str
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    with pytest.raises(ConfigError, match=remedy):
        check_launch(PretrainConfig())


@pytest.mark.parametrize(("hip", "capability"), [(None, (8, 6)), (None, (8, 9)), ("7.0", (9, 4))])
def test_fp8_is_bf16_to_accelerate_and_needs_a_gpu_that_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, hip: str | None, capability: tuple[int, int]
) -> None:
    config = PretrainConfig(mixed_precision="fp8")
    refused = pytest.raises(
        ConfigError, match=r"NVIDIA GPU of compute capability 8\.9 .* --mixed-precision auto"
    )
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    with refused:
        check_launch(config)
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    # What a launcher asks for does not count.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with nullcontext() if hip is None and capability == (8, 9) else refused:
        assert choose_precision(config) == "bf16"


class Tied(nn.Module):
    def __init__(self, tie: bool) -> None:
        super().__init__()
        self.inner, self.outer = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        if tie:
            self.outer.weight = self.inner.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.inner

    def get_output_embeddings(self) -> nn.Module:
        return self.outer


@pytest.mark.parametrize("tie", [True, False])
def test_untied_embeddings_are_refused(tie: bool) -> None:
    # The state of an earlier test in this process.
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    try:
        accelerator = start_accelerator(PretrainConfig())
        model = Tied(tie)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        if tie:
            prepare(accelerator, model, optimizer, tied=True, accumulation_steps=3)
            assert accelerator.gradient_accumulation_steps == 3
        else:
            with pytest.raises(ConfigError, match="cpu_ram_efficient_loading false"):
                prepare(accelerator, model, optimizer, tied=True, accumulation_steps=3)
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


def test_reducing_gradients_in_bf16_is_for_ddp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "is_fsdp2", True)
    monkeypatch.setattr(module, "configure_fsdp2", lambda accelerator: None)
    try:
        start_accelerator(PretrainConfig())
        with pytest.raises(ConfigError, match="--reduce-dtype bf16 is for DDP"):
            start_accelerator(PretrainConfig(reduce_dtype="bf16"))
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


def test_one_process_says_that_it_reduces_no_gradients(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    for dtype, notes in (("float32", 0), ("bf16", 1)):
        inputs = resolve_run(PretrainConfig(reduce_dtype=dtype, num_key_value_heads=1, batch_size=2, **shape))
        said: list[str] = []
        try:
            accelerator = start_accelerator(inputs.config)
            shards = random_shards(tmp_path / dtype, inputs.model_config.vocab_size)
            build_training(inputs, shards, accelerator, note=said.append)
        finally:
            AcceleratorState._reset_state(True)
            GradientState._reset_state()
        assert [sentence.split(":")[0] for sentence in said] == ["--reduce-dtype bf16 has no effect"] * notes


def test_a_launcher_without_a_precision_leaves_the_choice_to_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr("minimind.distributed.accelerator.device_type", lambda: "cuda")
    for bf16, precision in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda bf16=bf16, **_: bf16)
        assert choose_precision(PretrainConfig()) == precision
        assert choose_precision(PretrainConfig(mixed_precision="no")) == "no"


@pytest.mark.parametrize(
    ("works", "precision"), [({"bf16", "fp16"}, "bf16"), ({"fp16"}, "fp16"), (set(), "no")]
)
def test_an_apple_gpu_trains_in_the_best_precision_that_it_shows_to_have(
    works: set[str], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def trains_in(device: str, name: str) -> bool:
        asked.append(device)
        return name in works

    monkeypatch.setattr(module, "device_type", lambda: "mps")
    monkeypatch.setattr(module, "_trains_in", trains_in)
    # Narrow models too, unlike on a CPU.
    assert choose_precision(PretrainConfig(hidden_size=32, num_attention_heads=2)) == precision
    assert choose_precision(PretrainConfig(mixed_precision="no")) == "no"
    assert set(asked) == {"mps"}
    for name in ("bf16", "fp16"):
        config = PretrainConfig(mixed_precision=name)  # type: ignore[arg-type]
        if name in works:
            assert choose_precision(config) == name
            continue
        with pytest.raises(ConfigError, match=f"--mixed-precision {name} is not supported by this GPU; omit"):
            choose_precision(config)


def test_a_device_is_asked_by_a_forward_and_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    # A CPU stands in for the Apple GPU.
    assert module._trains_in("cpu", "bf16")
    assert module._trains_in("cpu", "fp16")
    # macOS 13: Accelerate would refuse bf16, which PyTorch emulates there at best.
    monkeypatch.setattr(module, "is_bf16_available", lambda ignore_tpu: False)
    assert not module._trains_in("cpu", "bf16")
    assert module._trains_in("cpu", "fp16")
    # Autocast without support for the dtype leaves the matrix product in float32.
    monkeypatch.setattr(torch, "autocast", lambda device, dtype: nullcontext())
    assert not module._trains_in("cpu", "fp16")

    def refuses(device: str, dtype: torch.dtype) -> None:
        raise RuntimeError("no such dtype on this device")

    monkeypatch.setattr(torch, "autocast", refuses)
    assert not module._trains_in("cpu", "fp16")


def test_each_process_group_has_keys_in_the_launchers_store_that_no_earlier_one_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise a rank may connect to the closed address of an earlier group."""
    prefixes: list[str] = []
    monkeypatch.setattr(module.dist, "TCPStore", lambda *_, **__: None)
    monkeypatch.setattr(module.dist, "PrefixStore", lambda prefix, _: prefixes.append(prefix))
    monkeypatch.setattr(module.dist, "init_process_group", lambda *_, **__: None)
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    for restart, created_by_accelerate in (("0", 1), ("1", 0)):
        monkeypatch.setattr(module, "_GROUP_NUMBERS", itertools.count())
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart)
        before = len(prefixes)
        for _ in range(3):
            module._init_process_group(timedelta(seconds=1))
        assert len(prefixes) - before == 3 - created_by_accelerate
    assert len(set(prefixes)) == len(prefixes)
