"""Refuse launches that Accelerate would silently run differently from what was asked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from ..config.options import PretrainConfig
from ..launch_env import _NO, _YES, is_set

_LAUNCH = "accelerate launch --multi_gpu --num_processes {n} -m minimind_cli pretrain ..."

_FSDP2_LAUNCH = (
    "accelerate launch --use_fsdp --fsdp_version 2 --num_processes {n} -m minimind_cli pretrain ..."
)

# Programs that start several processes without telling torch.distributed, by where they tell their number.
UNSUPPORTED_LAUNCHERS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
}

# What a process of several has to know besides their number.
_MEETING = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# Ways to divide a model that bring little below a billion parameters.
_DIVISIONS = {"TP": "tensor", "CP": "context", "SP": "sequence"}


def launch_problems(
    config: PretrainConfig, num_devices: int, env: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Yield a sentence for each thing that Accelerate would do otherwise than the launcher was asked to.

    Args:
        config: the options of the run.
        num_devices: accelerators of this machine that processes can share work over; 0 where there are CPUs
            only, or one that works alone (MPS).
        env: instead of the process's own.
    """
    env = os.environ if env is None else env
    on_cpu = is_set("ACCELERATE_USE_CPU", env) or not num_devices
    yield from _unsupported(env, on_cpu)
    if "WORLD_SIZE" not in env:
        yield from _not_told(env, num_devices)
    elif env["WORLD_SIZE"] != "1" and (missing := [name for name in _MEETING if name not in env]):
        lacking = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set"
        yield (
            f"WORLD_SIZE={env['WORLD_SIZE']} says that so many processes train together, but {lacking}, so "
            "they cannot meet; unset WORLD_SIZE to train alone, or let a launcher set all: "
            f"{_LAUNCH.format(n='N')}"
        )
    elif not on_cpu and (local := int(env.get("LOCAL_WORLD_SIZE", "1"))) > num_devices:
        devices = "1 GPU" if num_devices == 1 else f"{num_devices} GPUs"
        yield (
            f"{local} processes were launched on this machine, which has {devices}; launch as many as there "
            "are GPUs (--num_processes counts those of all machines)."
        )
    if "WORLD_SIZE" in env and env.get("MASTER_PORT") == "0":
        yield "processes cannot meet at port 0; give torchrun --standalone instead of --master_port 0."
    if is_set("ACCELERATE_USE_FSDP", env):
        if env.get("FSDP_VERSION", "1") != "2":
            yield "the launcher asks for FSDP version 1; add --fsdp_version 2."
        if on_cpu:
            launch = _LAUNCH.format(n=env.get("WORLD_SIZE", "N"))
            yield f"FSDP shards over GPUs and none is in use here; train with DDP instead: {launch}"
    if (use_cpu := env.get("ACCELERATE_USE_CPU", "true")).lower() not in _YES + _NO:
        yield f"ACCELERATE_USE_CPU={use_cpu} is neither true nor false; write one of the two, or unset it."
    steps = env.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") or "1"
    if steps not in ("1", str(config.accumulation_steps)):
        yield (
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={steps} of the launcher is not what this run was told; "
            f"unset it, and give --accumulation-steps {steps} if that is meant."
        )


def _unsupported(env: Mapping[str, str], on_cpu: bool) -> Iterator[str]:
    """Yield what this trainer does not do, and what to use instead."""
    for name, title in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
    ):
        if is_set(name, env):
            instead = "train with DDP" if on_cpu else "FSDP2 divides weights and optimizer states as well"
            launch = (_LAUNCH if on_cpu else _FSDP2_LAUNCH).format(n=env.get("WORLD_SIZE", "N"))
            yield f"{title} is not supported; {instead}: {launch}"
    if is_set("ACCELERATE_USE_PARALLELISM_CONFIG", env):
        for short, title in _DIVISIONS.items():
            size = env.get(f"PARALLELISM_CONFIG_{short}_SIZE", "1")
            if size != "1":
                yield (
                    f"{title} parallelism ({short.lower()}_size {size}) is not supported; "
                    "divide the processes into dp_replicate_size x dp_shard_size."
                )


def _not_told(env: Mapping[str, str], num_devices: int) -> Iterator[str]:
    """Yield why this process, which knows of no others, is probably meant to have some."""
    # With --cpu, or a configuration of MULTI_CPU, Accelerate starts one process however many were asked for.
    if "MASTER_ADDR" in env and "ACCELERATE_MIXED_PRECISION" in env:
        prefix = "ACCELERATE_USE_CPU=true " if num_devices else ""
        yield (
            "the launcher was asked for several processes but started this one only, as it does with --cpu "
            f"or MULTI_CPU; launch with {prefix}{_LAUNCH.format(n='N')}"
        )
    for name, program in UNSUPPORTED_LAUNCHERS.items():
        if int(env.get(name) or 1) > 1:
            yield (
                f"{program} started {env[name]} processes that do not know of each other, so each would "
                f"train alone; let {program} start one accelerate launch per machine (docs/distributed.md)."
            )
            return
