"""Collective operations on Python values and sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..errors import CheckpointError, UserError

Result = TypeVar("Result")


def run_on_main_and_broadcast(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Call `work` on the main process; return its result, or raise its error, on every process.

    Raises:
        UserError: what `work` raised; a CheckpointError with the same message on the other processes.
    """
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except Exception as error:
            # Broadcast any error: the other processes would otherwise wait for this one for ever.
            failure = error
            outcome[1] = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome, from_process=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise CheckpointError(outcome[1])
    return outcome[0]


def any_process(flag: bool, accelerator: Accelerator) -> bool:
    """Whether `flag` is true on any process; every process must call this."""
    return sum_over_processes(torch.tensor([float(flag)]), accelerator)[0] > 0


def sum_over_processes(values: torch.Tensor, accelerator: Accelerator) -> list[float]:
    """Return the sums over all processes of a (N,) tensor on the host; every process must call this."""
    if accelerator.num_processes == 1:
        return values.tolist()
    # MPS has no float64, but only one process either.
    return accelerator.reduce(values.to(accelerator.device), reduction="sum").tolist()
