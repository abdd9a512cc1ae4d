"""Set up Accelerate: device, process group, precision, DDP and FSDP2."""

from __future__ import annotations

import dataclasses
import itertools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    DynamoBackend,
    InitProcessGroupKwargs,
    is_bf16_available,
)
from torch import distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel

from ..config.options import PretrainConfig
from ..errors import ConfigError, RankError
from ..formatting import parse_duration
from ..launch_env import (
    device_type,
    is_set,
    launcher_has_store,
    num_machines,
    rank,
    restarts,
    was_launched,
    world_size,
)
from ..modeling import float8
from .launch_checks import launch_problems

# On CPUs with bf16 instructions conversions cost little in wide models, but most of the gain at width 128.
SMALLEST_BF16_WIDTH_ON_CPU = 512

# Of the process groups of this process; every rank creates as many.
_GROUP_NUMBERS = itertools.count()


def check_launch(config: PretrainConfig) -> str | None:
    """Check how this process was launched, before any work is done.

    On a machine without a GPU several processes are set to train on CPUs; Accelerate would let each train
    separately.

    Returns:
        A remark on the launch for the user, None if there is nothing to say.

    Raises:
        ConfigError: for a launch that would silently do something else, or an unsupported precision.
    """
    devices = _num_devices()
    if problems := [*launch_problems(config.accumulation_steps, devices)]:
        raise ConfigError(problems)
    choose_precision(config)
    cpu_requested = is_set("ACCELERATE_USE_CPU")
    threads = "" if devices and not cpu_requested else _idle_cores()
    if world_size() > 1 and not devices and not cpu_requested:
        # A variable rather than an argument, so that all code that reads Accelerate's state agrees.
        os.environ["ACCELERATE_USE_CPU"] = "true"
        return f"no GPU here: {world_size()} processes train together on CPUs.{threads}"
    if world_size() == 1 and devices > 1 and not cpu_requested:
        return (
            f"one of {devices} GPUs is used; for all: "
            f"accelerate launch --multi_gpu --num_processes {devices} -m minimind_cli pretrain ..."
        )
    return threads.strip() or None


def _idle_cores() -> str:
    """Return a sentence if the launcher's thread setting, by default 1, leaves most cores idle."""
    if not was_launched():
        return ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes, threads = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.get_num_threads()
    if 2 * threads * processes > cores:
        return ""
    return (
        f" {threads * processes} of {cores} cores are used: launchers set 1 thread per process; set "
        f"OMP_NUM_THREADS={cores // processes} to use all cores."
    )


def start_accelerator(config: PretrainConfig) -> Accelerator:
    """Create the process group and the Accelerator; call `check_launch` first.

    Raises:
        ConfigError: for an unsupported precision, or if Accelerate did not join the processes.
        RankError: if not all processes joined in time.
    """
    timeout = timedelta(seconds=parse_duration(config.dist_timeout))
    handlers = [
        DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        InitProcessGroupKwargs(timeout=timeout),
    ]
    try:
        if world_size() > 1 and launcher_has_store() and not dist.is_initialized():
            _init_process_group(timeout)
        accelerator = Accelerator(mixed_precision=choose_precision(config), kwargs_handlers=handlers)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RankError(
            f"not all {world_size()} processes connected to {where} within --dist-timeout "
            f"{config.dist_timeout} ({str(error).splitlines()[0]}); check that all machines were launched "
            "and can reach that address, and tokenize large data beforehand with minimind-train tokenize."
        ) from error
    _refuse_broken_launch(accelerator)
    if config.activation_checkpointing and accelerator.is_fsdp2:
        raise ConfigError(
            "--activation-checkpointing is not supported with FSDP2, which has its own; launch with "
            "--fsdp_activation_checkpointing true instead."
        )
    if accelerator.is_fsdp2 and config.reduce_dtype != "float32":
        raise ConfigError(
            "--reduce-dtype bf16 is for DDP; FSDP2 reduces gradients in float32: omit the option."
        )
    if accelerator.is_fsdp2:
        configure_fsdp2(accelerator)
    return accelerator


def choose_precision(config: PretrainConfig) -> str:
    """Return `no`, `bf16` or `fp16`: the requested precision, or the best that the device has natively.

    It is bf16 for fp8, which replaces some products of a bf16 run; see `shown_precision`.
    """
    requested: str = config.mixed_precision
    if requested == "fp8":
        if device_type() != "cuda" or not float8.available():
            raise ConfigError(
                "--mixed-precision fp8 needs an NVIDIA GPU of compute capability 8.9 or more (Ada, Hopper, "
                "Blackwell); use --mixed-precision auto."
            )
        return "bf16"
    if requested == "auto":
        # A precision from `accelerate config` or `accelerate launch --mixed_precision` counts as requested.
        requested = os.environ.get("ACCELERATE_MIXED_PRECISION", "auto").lower()
        requested = "auto" if requested == "no" else requested
    device = device_type()
    on_gpu = device == "cuda"
    if requested == "auto":
        if device == "mps":
            # bf16 needs no loss scaling; Macs before macOS 14 have fp16 only.
            return next((name for name in ("bf16", "fp16") if _trains_in(device, name)), "no")
        if not on_gpu:
            # Not known before the model of --from-weight is read.
            wide = config.hidden_size is not None and config.hidden_size >= SMALLEST_BF16_WIDTH_ON_CPU
            return "bf16" if wide and _cpu_multiplies_bf16() else "no"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if requested not in ("no", "bf16", "fp16"):
        raise ConfigError(
            f"mixed precision {requested} of the launcher is not supported; use --mixed-precision "
            f"{'fp8' if requested == 'fp8' else 'bf16'}."
        )
    if device == "mps" and requested != "no" and not _trains_in(device, requested):
        raise ConfigError(f"--mixed-precision {requested} is not supported by this GPU; omit the option.")
    if requested == "fp16" and device == "cpu":
        raise ConfigError("--mixed-precision fp16 needs a GPU; use --mixed-precision no or bf16 here.")
    if requested == "bf16" and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError("--mixed-precision bf16 is not native to this GPU; use --mixed-precision fp16.")
    return requested


def shown_precision(config: PretrainConfig, accelerator: Accelerator) -> str:
    """Return the precision of a run by the name that users know: fp8, else that of Accelerate."""
    precision: str = accelerator.mixed_precision
    return "fp8" if config.mixed_precision == "fp8" else precision


def _trains_in(device: str, precision: str) -> bool:
    """Whether a forward and backward pass in a precision works on a device: tried with a small matrix."""
    if precision == "bf16" and not is_bf16_available(True):  # Accelerate would refuse it
        return False
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    try:
        with warnings.catch_warnings(), torch.autocast(device, dtype):
            # Autocast that does not support a dtype warns, and computes in float32.
            warnings.simplefilter("ignore")
            weight = torch.ones(8, 8, device=device, requires_grad=True)
            product = weight @ weight
            product.float().sum().backward()
            assert weight.grad is not None
            return product.dtype == dtype and weight.grad.tolist() == [[16.0] * 8] * 8
    except (RuntimeError, TypeError):
        return False


def _cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 matrix instructions: AMX or AVX-512 BF16."""
    # torch has no public names for these checks yet.
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def wants_compile(config: PretrainConfig, accelerator: Accelerator, *, pays: bool = True) -> bool:
    """Whether to compile: --compile, else the launcher's setting, else yes on CUDA if it `pays`.

    Disables Accelerate's own plug-in, which would compile the compiled model once more.
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
    reduce_dtype: str = "float32",
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Wrap model and optimizer with Accelerate, and check the result.

    Args:
        model: not wrapped yet; every process has the same weights.
        optimizer: over its parameters.
        tied: embedding and output layer share one parameter.
        accumulation_steps: micro-batches per step.
        reduce_dtype: in which DDP sums gradients, `float32` or `bf16`.

    Raises:
        ConfigError: if the model was wrapped in an unexpected class, or was untied.
    """
    accelerator.gradient_accumulation_steps = accumulation_steps
    with warnings.catch_warnings():
        # Accelerate still passes the old name of the option.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        with _on_capture_stream(accelerator):
            model, optimizer = accelerator.prepare(model, optimizer)
    expected: type = nn.Module
    if accelerator.is_fsdp2:
        expected = FSDPModule
    elif accelerator.num_processes > 1:
        expected = DistributedDataParallel
    if not isinstance(model, expected):
        raise ConfigError(
            f"Accelerate wrapped the model as {type(model).__name__} instead of {expected.__name__}; "
            "check accelerate config, or launch with --multi_gpu only."
        )
    if reduce_dtype == "bf16" and isinstance(model, DistributedDataParallel):
        # torch and Accelerate refuse the hook by its name unless the backend is NCCL; gloo reduces bf16 too.
        model.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
    unwrapped: Any = model.module if isinstance(model, DistributedDataParallel) else model
    if tied and unwrapped.get_output_embeddings().weight is not unwrapped.get_input_embeddings().weight:
        raise ConfigError(
            "FSDP untied the embedding from the output layer; launch with "
            "--fsdp_cpu_ram_efficient_loading false, or pass --no-tie-word-embeddings."
        )
    if accelerator.gradient_accumulation_steps != accumulation_steps:
        raise ConfigError(
            f"Accelerate accumulates over {accelerator.gradient_accumulation_steps} micro-batches instead of "
            f"{accumulation_steps}; remove gradient_accumulation_steps from its configuration."
        )
    return model, optimizer


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which steps are captured in CUDA graphs, the same on every call."""
    return torch.cuda.Stream(device)


@contextmanager
def _on_capture_stream(accelerator: Accelerator) -> Iterator[None]:
    """Wrap the model in DDP on the stream of later captures.

    DDP keeps the nodes that accumulate gradients, and they keep the stream of their creation: on another one
    a backward pass could not be captured. Passes on other streams synchronize with it.
    """
    if accelerator.device.type != "cuda" or accelerator.num_processes == 1 or accelerator.is_fsdp2:
        yield
        return
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    stream, current = capture_stream(accelerator.device), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def _init_process_group(timeout: timedelta) -> None:
    """Create the process group unless it is the first one in the launcher's store; Accelerate uses it then.

    The store still holds the addresses of earlier groups: of the processes before a restart, or of these
    processes, which join once for each measurement. Without another prefix they may connect to those, and
    fail or wait for the timeout.
    """
    # Launchers of several machines may count restarts differently.
    restart, number = restarts() if num_machines() == 1 else 0, next(_GROUP_NUMBERS)
    if not restart and not number:
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    dist.init_process_group(
        "gloo" if is_set("ACCELERATE_USE_CPU") else None,
        store=dist.PrefixStore(f"restart-{restart}-group-{number}", store),
        rank=rank(),
        world_size=world_size(),
        timeout=timeout,
    )


def _num_devices() -> int:
    """Return the number of accelerators that processes can be distributed over."""
    device = torch.accelerator.current_accelerator(check_available=True)
    # MPS has a single device and no collective operations.
    return 0 if device is None or device.type == "mps" else torch.accelerator.device_count()


def _refuse_broken_launch(accelerator: Accelerator) -> None:
    """Raise ConfigError if Accelerate's state differs from what the launcher was asked for."""
    if world_size() != accelerator.num_processes:
        raise ConfigError(
            f"{world_size()} processes were launched and {accelerator.num_processes} joined, so each would "
            "train alone; launch with ACCELERATE_USE_CPU=true to train on CPUs."
        )
    if is_set("ACCELERATE_USE_FSDP") and not accelerator.is_fsdp2:
        raise ConfigError(
            "FSDP was requested but FSDP2 is not active; launch on GPUs with --use_fsdp --fsdp_version 2."
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
    """Set the wrap policy and mixed precision of FSDP2 where the launcher left them open.

    Raises:
        ConfigError: for fp16, whose gradient scaler does not support shards.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.auto_wrap_policy is None:
        # Without a policy the whole model is one unit, gathered at once, which saves no memory.
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
    if accelerator.mixed_precision == "fp16":
        raise ConfigError(
            "--mixed-precision fp16 is not supported with FSDP2; use bf16, or launch without --use_fsdp."
        )
    if accelerator.mixed_precision == "bf16":
        # Accelerate's default also reduces gradients in bf16 and casts the loss to it.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
        )


def cast_weights_only(accelerator: Accelerator) -> torch.dtype | None:
    """Let FSDP2 cast weights but not activations; call it before `prepare`.

    For models whose modules agree on dtypes among themselves. By default FSDP2 casts the inputs of each unit
    to bf16, rotary tables included, and the outputs back to float32.

    Returns:
        The dtype in which weights are gathered; None without FSDP2 or without casting.
    """
    if not accelerator.is_fsdp2 or accelerator.mixed_precision != "bf16":
        return None
    plugin = accelerator.state.fsdp_plugin
    plugin.mixed_precision_policy = dataclasses.replace(
        plugin.mixed_precision_policy, output_dtype=None, cast_forward_inputs=False
    )
    return plugin.mixed_precision_policy.param_dtype


def close_accelerator(accelerator: Accelerator) -> None:
    """Destroy the process group and reset Accelerate's state, so that the program can start another run."""
    accelerator.free_memory()
    if accelerator.num_processes > 1:
        accelerator.end_training()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
