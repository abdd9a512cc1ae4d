"""Several processes as one run: found to be alike at the start, and named when one of them fails."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import distributed as dist
from torch import nn

from . import __version__
from .config import PretrainConfig
from .errors import RankError
from .launch_environment import restarts
from .settings import settings_of

# What machines may have in different places; what they find there is compared by its content.
_OF_THE_MACHINE = frozenset(
    {
        "data",
        "val_data",
        "cache_dir",
        "tokenizer",
        "from_weight",
        "output_dir",
        "run_name",
        "tracker",
        "project",
    }
)

# A process that failed tells the others in this time. The launcher kills 30 s after its SIGTERM.
SECONDS_TO_TELL = 3.0


def refuse_differences(accelerator: Accelerator, facts: Mapping[str, Any]) -> None:
    """Compare something that must be the same in all processes; every process must call this.

    Args:
        accelerator: joins the processes.
        facts: values by the name under which a difference is reported.

    Raises:
        RankError: on every process, naming the rank and both values.
    """
    if accelerator.num_processes == 1:
        return
    everyone: list[dict[str, Any]] = gather_object([dict(facts)])
    first = everyone[0]
    problems = [
        f"rank {rank} has {name} {theirs.get(name)} where rank 0 has {first.get(name)}"
        for rank, theirs in enumerate(everyone)
        for name in first.keys() | theirs.keys()
        if theirs.get(name) != first.get(name)
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise RankError(f"the processes are not alike: {shown}. Give all of them the same.")


def facts_of(config: PretrainConfig, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """Return what must be the same in all processes: options, versions, and what the run reads."""
    options = {
        settings_of(PretrainConfig)[name].flag: value
        for name, value in asdict(config).items()
        if name not in _OF_THE_MACHINE
    }
    versions = {
        "minimind": __version__,
        "Python": ".".join(platform.python_version_tuple()[:2]),
        **{name: version(name) for name in ("torch", "accelerate", "numpy")},
    }
    return {**options, **versions, **fingerprints}


def weights_fingerprint(model: nn.Module) -> str:
    """Return a short text that tells the weights of a model on this process from any others."""
    parts = [int(torch.hash_tensor(tensor.detach()).item()) for tensor in model.parameters()]
    return f"{hash(tuple(parts)) & 0xFFFFFFFFFFFF:012x}"


@contextmanager
def failures_named(accelerator: Accelerator) -> Iterator[None]:
    """Turn the loss of another process inside this block into an error that says which one, and why.

    A process that fails by itself leaves a note where the processes met, and its error goes on as it is. One
    that lost touch with the others looks there: who left a note failed, who left none no longer runs.

    Raises:
        RankError: instead of the error of a collective operation.
    """
    try:
        yield
    except Exception as error:
        if accelerator.num_processes == 1:
            raise
        lost = _is_lost_touch(error)
        note = "" if lost else f"{type(error).__name__}: {error}".splitlines()[0]
        others = _exchange(accelerator, note, wait=lost)
        if not lost:
            raise
        raise RankError(_what_happened(accelerator, others, error)) from error


def _is_lost_touch(error: Exception) -> bool:
    """Whether an error comes from a collective operation. Gloo raises no type of its own."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )


def _exchange(accelerator: Accelerator, note: str, *, wait: bool) -> dict[int, str]:
    """Leave a note and, with `wait`, return those of the others by rank: empty where one lost touch too."""
    found: dict[int, str] = {}
    prefix = f"minimind/{os.environ.get('TORCHELASTIC_RUN_ID')}/{restarts()}"
    others = set(range(accelerator.num_processes)) - {accelerator.process_index}
    # The store may have gone down with the process or machine that held it: then nobody can tell anything.
    with suppress(RuntimeError, KeyError):
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=SECONDS_TO_TELL),
        )
        store.set(f"{prefix}/{accelerator.process_index}", note)
        deadline = time.monotonic() + SECONDS_TO_TELL
        while wait and others - found.keys() and time.monotonic() < deadline:
            for rank in others - found.keys():
                if store.check([f"{prefix}/{rank}"]):
                    found[rank] = store.get(f"{prefix}/{rank}").decode()
            time.sleep(0.05)
    return found


def _what_happened(accelerator: Accelerator, others: Mapping[int, str], error: Exception) -> str:
    mine = f"rank {accelerator.process_index} went on no further"
    failed = [f"rank {rank} failed with {note}" for rank, note in sorted(others.items()) if note]
    if failed:
        return f"{'; '.join(failed)}; {mine}."
    ranks = set(range(accelerator.num_processes)) - {accelerator.process_index} - others.keys()
    if ranks:
        names = "rank " + ", ".join(map(str, sorted(ranks)))
        what = "was killed, hangs, or its machine cannot be reached"
        return f"{names} no longer answers: it {what}; {mine} ({_short(error)})."
    return f"the processes lost touch with each other; {mine} ({_short(error)})."


def _short(error: Exception) -> str:
    """Return the part of an error of gloo after the place in its source."""
    return str(error).splitlines()[0].rpartition("] ")[2].strip(" .")
