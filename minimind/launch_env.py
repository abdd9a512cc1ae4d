"""Read what `accelerate launch` or `torchrun` set in the environment; imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping

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


def restarted_with_store() -> bool:
    """Whether earlier processes of this launch used the store that these ones will use.

    False with several machines, whose launchers may count restarts differently.
    """
    return restarts() > 0 and launcher_has_store() and num_machines() == 1


def is_set(name: str, env: Mapping[str, str] | None = None) -> bool:
    """Whether a variable is true, in any of the spellings that launchers use."""
    return (os.environ if env is None else env).get(name, "").lower() in TRUE_VALUES


def device_type() -> str:
    """Return the type of device that a run uses here: `cuda`, `mps` or `cpu`. Imports torch."""
    import torch

    if is_set("ACCELERATE_USE_CPU"):
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
