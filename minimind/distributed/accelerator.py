"""Devices, processes and precision: one Accelerator, and refusal of launches that would go wrong silently."""

from __future__ import annotations

import dataclasses
import os
import warnings
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    DynamoBackend,
    InitProcessGroupKwargs,
)
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel

from ..config.options import PretrainConfig
from ..errors import ConfigError, RankError
from ..formatting import parse_duration
from ..launch_env import is_set, met_before, rank, restarts, was_launched, world_size
from .launch_checks import launch_problems

# A CPU that multiplies bf16 twice as fast as float32 spends some of that on conversions: little in wide
# models, most of it in one of 128.
SMALLEST_BF16_WIDTH_ON_CPU = 512


def check_launch(config: PretrainConfig) -> str | None:
    """Look at how this process was launched, before any work is done.

    Several processes on a machine without a GPU are led to the CPU, where Accelerate by itself would let each
    train alone.

    Returns:
        A sentence on what was done about the launch, None where there was nothing to do.

    Raises:
        ConfigError: for a launch that would go wrong silently, or a precision that the device has not.
    """
    devices = _num_devices()
    if problems := [*launch_problems(config, devices)]:
        raise ConfigError(problems)
    choose_precision(config)
    threads = "" if devices and not is_set("ACCELERATE_USE_CPU") else _idle_cores()
    if world_size() > 1 and not devices and not is_set("ACCELERATE_USE_CPU"):
        # A variable rather than an argument: whatever else asks Accelerate for its state must agree.
        os.environ["ACCELERATE_USE_CPU"] = "true"
        return f"no GPU here: {world_size()} processes train together on CPUs.{threads}"
    if world_size() == 1 and devices > 1 and not is_set("ACCELERATE_USE_CPU"):
        return (
            f"one of {devices} GPUs is used; for all: "
            f"accelerate launch --multi_gpu --num_processes {devices} -m minimind_cli pretrain ..."
        )
    return threads.strip() or None


def _idle_cores() -> str:
    """Return a sentence where a launcher left most cores of a machine idle, which it does by default."""
    if not was_launched():
        return ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes, threads = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.get_num_threads()
    if 2 * threads * processes > cores:
        return ""
    return (
        f" {threads * processes} of {cores} cores are used, for launchers give each process one thread; "
        f"put OMP_NUM_THREADS={cores // processes} before the command for all."
    )


def start_accelerator(config: PretrainConfig) -> Accelerator:
    """Join the processes and choose the precision; call `check_launch` first.

    Raises:
        ConfigError: for a precision that the device has not, or processes that were not joined.
        RankError: when not all processes came.
    """
    timeout = timedelta(seconds=parse_duration(config.dist_timeout))
    handlers = [
        DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        InitProcessGroupKwargs(timeout=timeout),
    ]
    try:
        if met_before():
            _meet_anew(timeout)
        accelerator = Accelerator(mixed_precision=choose_precision(config), kwargs_handlers=handlers)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RankError(
            f"not all {world_size()} processes met at {where} within --dist-timeout {config.dist_timeout} "
            f"({str(error).splitlines()[0]}); see that all machines were launched and reach that address, "
            "and prepare large data beforehand by minimind-train tokenize."
        ) from error
    _refuse_broken_launch(accelerator)
    if config.activation_checkpointing and accelerator.is_fsdp2:
        raise ConfigError(
            "--activation-checkpointing is done by FSDP itself where that shards the model; launch with "
            "--fsdp_activation_checkpointing true instead."
        )
    if accelerator.is_fsdp2:
        configure_fsdp2(accelerator)
    return accelerator


def choose_precision(config: PretrainConfig) -> str:
    """Return `no`, `bf16` or `fp16`: what was asked for, or the best that the device computes natively."""
    wanted: str = config.mixed_precision
    if wanted == "auto":
        # What `accelerate config` or `accelerate launch --mixed_precision` set counts as asked for.
        wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "auto").lower()
        wanted = "auto" if wanted == "no" else wanted
    on_gpu = torch.cuda.is_available() and not is_set("ACCELERATE_USE_CPU")
    if wanted == "auto":
        if not on_gpu:
            wide = config.hidden_size >= SMALLEST_BF16_WIDTH_ON_CPU
            return "bf16" if wide and _cpu_multiplies_bf16() else "no"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if wanted not in ("no", "bf16", "fp16"):
        raise ConfigError(
            f"mixed precision {wanted} of the launcher is not supported; use --mixed-precision bf16."
        )
    if wanted == "fp16" and not on_gpu:
        raise ConfigError("--mixed-precision fp16 needs a GPU; use --mixed-precision no or bf16 here.")
    if wanted == "bf16" and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            "--mixed-precision bf16 is not computed natively by this GPU; use --mixed-precision fp16."
        )
    return wanted


def _cpu_multiplies_bf16() -> bool:
    """Whether this CPU multiplies bf16 by instructions of their own: AMX, or AVX-512 with bf16 products."""
    # Told by the CPU and the operating system; there are no public names for it yet.
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def wants_compile(config: PretrainConfig, accelerator: Accelerator, *, pays: bool = True) -> bool:
    """Whether to compile: as asked, as the launcher was told, or by default on CUDA where it pays.

    Accelerate would compile again on top of our own compilation, so its plug-in is switched off.
    """
    plugin = accelerator.state.dynamo_plugin
    launcher_wants = plugin.backend != DynamoBackend.NO
    plugin.backend = DynamoBackend.NO
    if config.compile is not None:
        return config.compile
    return launcher_wants or (pays and accelerator.device.type == "cuda")


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    tied: bool,
    accumulation_steps: int,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Have Accelerate wrap model and optimizer, and check that it made of them what was asked for.

    Args:
        accelerator: of this run.
        model: bare; every process has the same weights.
        optimizer: over its parameters.
        tied: embedding and output are one parameter.
        accumulation_steps: micro-batches in a step.

    Raises:
        ConfigError: when the model is wrapped otherwise than the launch said, or was untied.
    """
    accelerator.gradient_accumulation_steps = accumulation_steps
    with warnings.catch_warnings():
        # Accelerate has no name yet for what DDP would rather have it called.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        model, optimizer = accelerator.prepare(model, optimizer)
    wanted: type = nn.Module
    if accelerator.is_fsdp2:
        wanted = FSDPModule
    elif accelerator.num_processes > 1:
        wanted = DistributedDataParallel
    if not isinstance(model, wanted):
        raise ConfigError(
            f"Accelerate made the model a {type(model).__name__} instead of {wanted.__name__}; "
            "see what accelerate config says, or launch with --multi_gpu alone."
        )
    bare: Any = model.module if isinstance(model, DistributedDataParallel) else model
    if tied and bare.get_output_embeddings().weight is not bare.get_input_embeddings().weight:
        raise ConfigError(
            "FSDP parted the embedding from the output, which were one matrix; launch with "
            "--fsdp_cpu_ram_efficient_loading false, or give --no-tie-word-embeddings."
        )
    if accelerator.gradient_accumulation_steps != accumulation_steps:
        raise ConfigError(
            f"Accelerate accumulates over {accelerator.gradient_accumulation_steps} micro-batches instead of "
            f"{accumulation_steps}; take gradient_accumulation_steps out of its configuration."
        )
    return model, optimizer


def _meet_anew(timeout: timedelta) -> None:
    """Join the processes of a restart; Accelerate takes over a group that is there.

    The launcher keeps the store in which they meet, with the addresses of the processes that are gone. By
    themselves they would try those, and fail or wait in vain, whenever one is quicker than another.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    dist.init_process_group(
        "gloo" if is_set("ACCELERATE_USE_CPU") else None,
        store=dist.PrefixStore(f"restart-{restarts()}", store),
        rank=rank(),
        world_size=world_size(),
        timeout=timeout,
    )


def _num_devices() -> int:
    """Return how many accelerators of this machine processes can be spread over."""
    device = torch.accelerator.current_accelerator(check_available=True)
    # There is one MPS device, and no way for processes to exchange gradients on it.
    return 0 if device is None or device.type == "mps" else torch.accelerator.device_count()


def _refuse_broken_launch(accelerator: Accelerator) -> None:
    """Raise ConfigError where Accelerate came up as something else than the launcher was asked for."""
    if world_size() != accelerator.num_processes:
        raise ConfigError(
            f"{world_size()} processes were launched and {accelerator.num_processes} joined, so each would "
            "train alone; launch with ACCELERATE_USE_CPU=true to train on CPUs."
        )
    if is_set("ACCELERATE_USE_FSDP") and not accelerator.is_fsdp2:
        raise ConfigError(
            "FSDP was asked for but is not in force as version 2; launch on GPUs with "
            "--use_fsdp --fsdp_version 2."
        )
    if accelerator.distributed_type in (
        DistributedType.DEEPSPEED,
        DistributedType.MEGATRON_LM,
        DistributedType.XLA,
    ):
        name = accelerator.distributed_type.value
        raise ConfigError(
            f"{name} is not supported; launch with --multi_gpu, or --use_fsdp --fsdp_version 2."
        )


def configure_fsdp2(accelerator: Accelerator) -> None:
    """Set what the launcher leaves open: what is sharded together, and in which precision it is computed.

    Raises:
        ConfigError: for fp16, whose scaling does not know of shards.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.auto_wrap_policy is None:
        # Otherwise the whole model is one unit, gathered at once: nothing would be saved.
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
    if accelerator.mixed_precision == "fp16":
        raise ConfigError(
            "--mixed-precision fp16 does not go with FSDP2; use bf16, or launch without --use_fsdp."
        )
    if accelerator.mixed_precision == "bf16":
        # Accelerate would also sum the gradients of all processes in bf16, and round the loss to it.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
        )


def cast_weights_only(accelerator: Accelerator) -> torch.dtype | None:
    """Have FSDP2 leave what passes between the units it shards as it is; call it before `prepare`.

    For a model whose modules agree on dtypes among themselves. Of any other, what goes into each unit is
    rounded to bf16, tables of angles too, and what comes out is made float32 again.

    Returns:
        The dtype that weights are gathered in; None where FSDP2 is not in force or does not cast.
    """
    if not accelerator.is_fsdp2 or accelerator.mixed_precision != "bf16":
        return None
    plugin = accelerator.state.fsdp_plugin
    plugin.mixed_precision_policy = dataclasses.replace(
        plugin.mixed_precision_policy, output_dtype=None, cast_forward_inputs=False
    )
    return plugin.mixed_precision_policy.param_dtype


def close_accelerator(accelerator: Accelerator) -> None:
    """Leave the processes and forget their state, so that the same program can start another run."""
    accelerator.free_memory()
    if accelerator.num_processes > 1:
        accelerator.end_training()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
