"""Devices, processes and precision: one Accelerator, and refusal of launches that would go wrong silently."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, DynamoBackend

from .config import PretrainConfig
from .errors import ConfigError


def is_main_process() -> bool:
    """Whether this process speaks for all, known from the launcher before any Accelerator exists."""
    return int(os.environ.get("RANK", "0")) == 0


def start_accelerator(config: PretrainConfig) -> Accelerator:
    """Join the processes and choose the precision.

    Raises:
        ConfigError: for a precision that the device has not, or processes that were not joined.
    """
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
    accelerator = Accelerator(mixed_precision=choose_precision(config), kwargs_handlers=handlers)
    _refuse_broken_launch(accelerator)
    if config.optimizer == "muon" and accelerator.is_fsdp2:
        raise ConfigError(
            "--optimizer muon needs whole matrices, which FSDP cuts into shards; use --optimizer adamw, or "
            "launch without --use_fsdp."
        )
    if config.activation_checkpointing and accelerator.is_fsdp2:
        raise ConfigError(
            "--activation-checkpointing is done by FSDP itself where that shards the model; launch with "
            "--fsdp_activation_checkpointing true instead."
        )
    return accelerator


def choose_precision(config: PretrainConfig) -> str:
    """Return `no`, `bf16` or `fp16`: what was asked for, or the best that the device computes natively."""
    wanted: str = config.mixed_precision
    if wanted == "auto":
        # What `accelerate config` or `accelerate launch --mixed_precision` set counts as asked for.
        wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "auto").lower()
        wanted = "auto" if wanted == "no" else wanted
    on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"
    if wanted == "auto":
        if not on_gpu:
            return "no"
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


def wants_compile(config: PretrainConfig, accelerator: Accelerator) -> bool:
    """Whether to compile: as asked, as the launcher was told, or by default on CUDA.

    Accelerate would compile again on top of our own compilation, so its plug-in is switched off.
    """
    plugin = accelerator.state.dynamo_plugin
    launcher_wants = plugin.backend != DynamoBackend.NO
    plugin.backend = DynamoBackend.NO
    if config.compile is not None:
        return config.compile
    return launcher_wants or accelerator.device.type == "cuda"


def _refuse_broken_launch(accelerator: Accelerator) -> None:
    """Raise ConfigError where Accelerate came up as something else than the launcher was asked for."""
    world = os.environ.get("WORLD_SIZE")
    if world is not None and int(world) != accelerator.num_processes:
        raise ConfigError(
            f"{world} processes were launched but they were not joined (each would train alone); on a "
            "machine without a GPU launch with ACCELERATE_USE_CPU=true accelerate launch --multi_gpu "
            f"--num_processes {world} -m minimind_cli pretrain ..."
        )
    if world is None and "MASTER_ADDR" in os.environ:
        raise ConfigError(
            "the launcher started one process only; launch several with ACCELERATE_USE_CPU=true "
            "accelerate launch --multi_gpu --num_processes N -m minimind_cli pretrain ..."
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not accelerator.is_fsdp2:
        raise ConfigError(
            "FSDP was asked for but is not in force as version 2; launch on GPUs with "
            "--use_fsdp --fsdp_version 2."
        )


def close_accelerator(accelerator: Accelerator) -> None:
    """Leave the processes and forget their state, so that the same program can start another run."""
    accelerator.free_memory()
    if accelerator.num_processes > 1:
        accelerator.end_training()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
