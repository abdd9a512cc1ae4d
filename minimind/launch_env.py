"""What a launcher told this process through its environment, and what would silently go wrong with it.

`accelerate launch`, `torchrun` and the launchers of clusters speak to a process through variables only. Read
here, without torch, so that a launch that cannot work is refused before any work is done.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

# The words that Accelerate reads; it raises at any other.
_YES, _NO = ("1", "true", "yes", "y", "t", "on"), ("0", "false", "no", "n", "f", "off")


def rank() -> int:
    """Return this process's number among all that were launched, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return how many processes were launched, over all machines; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process speaks for all, known before they are joined."""
    return rank() == 0


def restarts() -> int:
    """Return how often the launcher has started the processes anew after one of them failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def was_launched() -> bool:
    """Whether `accelerate launch` or `torchrun` started this process."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def num_machines() -> int:
    """Return how many launchers started the processes together, one on each machine."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def meets_at_launcher() -> bool:
    """Whether the launcher keeps the store in which the processes meet, so that it is there before them."""
    return is_set("TORCHELASTIC_USE_AGENT_STORE")


def met_before() -> bool:
    """Whether earlier processes of this launch met at the place where these ones are to meet.

    Told by the number of restarts, which every process of one machine knows alike. The launchers of several
    machines may count differently, so there torch is left to itself.
    """
    return restarts() > 0 and meets_at_launcher() and num_machines() == 1


def is_set(name: str, env: Mapping[str, str] | None = None) -> bool:
    """Whether a variable says yes, in any of the spellings that launchers use."""
    value = (os.environ if env is None else env).get(name, "")
    return value.lower() in _YES
