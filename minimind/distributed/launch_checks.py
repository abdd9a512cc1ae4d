"""Refuse launches that Accelerate would silently carry out differently."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from ..launch_env import FALSE_VALUES, TRUE_VALUES, is_set

_LAUNCH = "accelerate launch --multi_gpu --num_processes {n} -m minimind_cli pretrain ..."

_FSDP2_LAUNCH = (
    "accelerate launch --use_fsdp --fsdp_version 2 --num_processes {n} -m minimind_cli pretrain ..."
)

# Programs that start several processes without setting up torch.distributed, by their variable for how many.
UNSUPPORTED_LAUNCHERS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
}

# Variables that a distributed process needs besides WORLD_SIZE.
_RENDEZVOUS_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# Kinds of parallelism that gain little below a billion parameters.
_UNSUPPORTED_PARALLELISM = {"TP": "tensor", "CP": "context", "SP": "sequence"}


def launch_problems(
    accumulation_steps: int | None, num_devices: int, env: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Yield a sentence for each part of the launch that Accelerate would carry out differently.

    Args:
        num_devices: accelerators that processes can be distributed over; 0 for CPUs or MPS.
        env: environment variables, by default those of this process.
    """
    env = os.environ if env is None else env
    on_cpu = is_set("ACCELERATE_USE_CPU", env) or not num_devices
    yield from _unsupported(env, on_cpu)
    if "WORLD_SIZE" not in env:
        yield from _single_process(env, num_devices)
    elif env["WORLD_SIZE"] != "1" and (
        missing := [name for name in _RENDEZVOUS_VARIABLES if name not in env]
    ):
        lacking = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set"
        yield (
            f"WORLD_SIZE={env['WORLD_SIZE']} requests several processes, but {lacking}, so they cannot "
            "connect; unset WORLD_SIZE to train in one process, or let a launcher set all of them: "
            f"{_LAUNCH.format(n='N')}"
        )
    elif not on_cpu and (local := int(env.get("LOCAL_WORLD_SIZE", "1"))) > num_devices:
        devices = "1 GPU" if num_devices == 1 else f"{num_devices} GPUs"
        yield (
            f"{local} processes were launched on this machine, which has {devices}; launch as many as there "
            "are GPUs (--num_processes counts all machines)."
        )
    if "WORLD_SIZE" in env and env.get("MASTER_PORT") == "0":
        yield "processes cannot connect to port 0; use torchrun --standalone instead of --master_port 0."
    if is_set("ACCELERATE_USE_FSDP", env):
        if env.get("FSDP_VERSION", "1") != "2":
            yield "the launcher requests FSDP version 1; add --fsdp_version 2."
        if on_cpu:
            launch = _LAUNCH.format(n=env.get("WORLD_SIZE", "N"))
            yield f"FSDP needs GPUs and none is used here; train with DDP instead: {launch}"
    if (use_cpu := env.get("ACCELERATE_USE_CPU", "true")).lower() not in TRUE_VALUES + FALSE_VALUES:
        yield f"ACCELERATE_USE_CPU={use_cpu} is neither true nor false; correct or unset it."
    steps = env.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") or "1"
    if steps not in ("1", str(accumulation_steps)):
        yield (
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={steps} of the launcher differs from the options; "
            f"unset it, and pass --accumulation-steps {steps} if you want that."
        )


def _unsupported(env: Mapping[str, str], on_cpu: bool) -> Iterator[str]:
    """Yield a sentence for each unsupported feature, with what to use instead."""
    for name, title in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
    ):
        if is_set(name, env):
            instead = "train with DDP" if on_cpu else "FSDP2 also shards weights and optimizer states"
            launch = (_LAUNCH if on_cpu else _FSDP2_LAUNCH).format(n=env.get("WORLD_SIZE", "N"))
            yield f"{title} is not supported; {instead}: {launch}"
    if is_set("ACCELERATE_USE_PARALLELISM_CONFIG", env):
        for short, title in _UNSUPPORTED_PARALLELISM.items():
            size = env.get(f"PARALLELISM_CONFIG_{short}_SIZE", "1")
            if size != "1":
                yield (
                    f"{title} parallelism ({short.lower()}_size {size}) is not supported; "
                    "use dp_replicate_size x dp_shard_size instead."
                )


def _single_process(env: Mapping[str, str], num_devices: int) -> Iterator[str]:
    """Yield why this process, launched without others, was probably meant to have some."""
    # With --cpu or MULTI_CPU Accelerate starts one process, whatever number was requested.
    if "MASTER_ADDR" in env and "ACCELERATE_MIXED_PRECISION" in env:
        prefix = "ACCELERATE_USE_CPU=true " if num_devices else ""
        yield (
            "the launcher was asked for several processes but started one, as it does with --cpu or "
            f"MULTI_CPU; launch with {prefix}{_LAUNCH.format(n='N')}"
        )
    for name, program in UNSUPPORTED_LAUNCHERS.items():
        if int(env.get(name) or 1) > 1:
            yield (
                f"{program} started {env[name]} processes that are not connected, so each would train by "
                f"itself; let {program} start one accelerate launch per machine (docs/distributed.md)."
            )
            return
