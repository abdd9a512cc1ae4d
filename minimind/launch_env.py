"""What `accelerate launch` and `torchrun` set in the environment, and how to launch alike. No torch."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Variables of the launcher that are set by flags of the same name.
_LAUNCHER_VARIABLES = (
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE",
    "FSDP_ACTIVATION_CHECKPOINTING",
    "FSDP_CPU_RAM_EFFICIENT_LOADING",
    "FSDP_RESHARD_AFTER_FORWARD",
)
# The values that Accelerate accepts; it raises for any other.
TRUE_VALUES, FALSE_VALUES = ("1", "true", "yes", "y", "t", "on"), ("0", "false", "no", "n", "f", "off")


def rank() -> int:
    """Return the rank of this process, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes on all machines, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is rank 0; known before the process group exists."""
    return rank() == 0


def restarts() -> int:
    """Return how often the launcher has restarted the processes after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def was_launched() -> bool:
    """Whether `accelerate launch` or `torchrun` started this process."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def num_machines() -> int:
    """Return the number of launchers, one on each machine."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def launcher_has_store() -> bool:
    """Whether the launcher holds the rendezvous store, so that it exists before the processes."""
    return is_set("TORCHELASTIC_USE_AGENT_STORE")


def is_set(name: str, env: Mapping[str, str] | None = None) -> bool:
    """Whether a variable is true, in any of the spellings that launchers use."""
    return (os.environ if env is None else env).get(name, "").lower() in TRUE_VALUES


def device_type() -> str:
    """Return the type of device that a run uses here: `cuda`, `mps` or `cpu`. Imports torch."""
    import torch

    if is_set("ACCELERATE_USE_CPU"):
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def launcher_args(launch: Mapping[str, Any]) -> Iterator[str]:
    """Yield the arguments before the command that launch as recorded in `environment.json`."""
    processes, machines = launch.get("processes", 1), launch.get("machines", 1)
    if processes == 1:
        yield "minimind-train"
        return
    yield from ("accelerate", "launch")
    if launch.get("kind") == "FSDP2":
        yield from ("--use_fsdp", "--fsdp_version", "2")
        variables = launch.get("variables", {})
        if any(name.startswith("PARALLELISM_") for name in variables):
            yield "--use_parallelism_config"
        for name in _LAUNCHER_VARIABLES:
            if name in variables:
                yield from ("--" + name.lower(), variables[name])
    else:
        yield "--multi_gpu"
    yield from ("--num_processes", str(processes))
    if machines > 1:
        yield from ("--num_machines", str(machines))
    yield from ("-m", "minimind_cli")


def resume_command(folder: Path, launch: Mapping[str, Any]) -> str:
    """Return the shell command that resumes the run in a folder, launched as recorded."""
    on_cpu = launch.get("on_cpu") and (launch.get("processes", 1) > 1 or is_set("ACCELERATE_USE_CPU"))
    arguments = [*launcher_args(launch), "pretrain", "--resume", "--output-dir", str(folder)]
    return ("ACCELERATE_USE_CPU=true " if on_cpu else "") + shlex.join(arguments)
