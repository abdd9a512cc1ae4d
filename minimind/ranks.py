"""Several processes as one run: found to be alike at the start, and named when one of them fails."""

from __future__ import annotations

import os
import platform
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import distributed as dist
from torch import nn

from . import __version__
from .config import PretrainConfig
from .errors import RankError
from .launch_environment import meets_at_launcher, restarts, world_size
from .roll_call import RollCall, Watch, launcher_store, leave_note, no_answer, note_key, reasons, told
from .settings import settings_of
from .stopping import StopRequest

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

# Where the launcher's store tells its later processes that earlier ones have begun the run.
_BEGUN = "minimind/begun"

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


def facts_of(
    accelerator: Accelerator, config: PretrainConfig, fingerprints: Mapping[str, str]
) -> dict[str, Any]:
    """Return what must be the same in all processes: options, versions, launch, and what the run reads."""
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
    # Each machine has its own configuration of Accelerate, and chooses a precision by its own device.
    launch = {"precision": accelerator.mixed_precision, "FSDP2": "on" if accelerator.is_fsdp2 else "off"}
    if accelerator.is_fsdp2:
        divided = ("FSDP_", "PARALLELISM_CONFIG_")
        launch |= {name: value for name, value in os.environ.items() if name.startswith(divided)}
    return {**options, **versions, **launch, **fingerprints}


def weights_fingerprint(model: nn.Module) -> str:
    """Return a short text that tells the weights of a model on this process from any others."""
    parts = [int(torch.hash_tensor(tensor.detach()).item()) for tensor in model.parameters()]
    return f"{hash(tuple(parts)) & 0xFFFFFFFFFFFF:012x}"


def begun_before() -> bool:
    """Whether earlier processes of this launch have begun the run: what lies in its folder is its own then.

    A launcher also starts processes anew that were refused, such as for a folder that holds another run.
    """
    if not restarts():
        return False
    if meets_at_launcher():
        with suppress(RuntimeError):
            return launcher_store().check([_BEGUN])
    return True


def note_begun() -> None:
    """Have `begun_before` be true for the processes that the launcher may start after these."""
    if meets_at_launcher():
        with suppress(RuntimeError):
            launcher_store().set(_BEGUN, "")


def first_choice(name: str, choice: str) -> str:
    """Return what the first process of this launch that asked had chosen; `choice` where there is one only.

    For what may look otherwise to another process, or to those that the launcher starts anew.

    Args:
        name: of what is chosen.
        choice: of this process.
    """
    if world_size() > 1 and meets_at_launcher():
        with suppress(RuntimeError):
            return launcher_store().compare_set(f"minimind/{name}", "", choice).decode()
    return choice


@contextmanager
def failures_named(accelerator: Accelerator) -> Iterator[str]:
    """Turn the loss of another process inside this block into an error that says which one, and why.

    A process that fails by itself leaves a note where the processes met, and its error goes on as it is. One
    that lost touch with the others looks there: who left a note failed, who left none no longer runs.

    Yields the place in the launcher's store where the notes of this run are, for `others_watched`.

    Raises:
        RankError: instead of the error of a collective operation.
    """
    if accelerator.num_processes == 1:
        yield ""
        return
    place = f"minimind/{os.environ.get('TORCHELASTIC_RUN_ID')}/{restarts()}"
    try:
        # Agreed upon: machines may count restarts differently, and notes of earlier processes are kept.
        place = broadcast_object_list([f"minimind/{uuid.uuid4().hex}"])[0]
        yield place
    except Exception as error:
        lost = _is_lost_touch(error)
        leave_note(place, accelerator.process_index, "" if lost else told(error))
        if not lost:
            raise
        raise RankError(_what_happened(accelerator, _notes(accelerator, place), error)) from error


@contextmanager
def others_watched(
    accelerator: Accelerator, place: str, patience: float, stop: StopRequest, last: Callable[[], object]
) -> Iterator[None]:
    """End this process when another one is lost while the main thread is stuck inside this block.

    An operation over NCCL that a process is missing from neither returns nor raises.

    Args:
        accelerator: of this run.
        place: from `failures_named`.
        patience: seconds of a collective operation; a process that is silent for 0.9 of them is lost, and one
            that is silent while this one was asked to stop, as a launcher does when a process died, sooner.
        stop: tells whether this process was asked to stop.
        last: done before the end, such as waiting for a checkpoint that is being written.
    """
    if accelerator.num_processes == 1:
        yield
        return

    def end(what: str) -> None:
        last()
        prefix = "" if accelerator.is_main_process else f"rank {accelerator.process_index}: "
        print(f"{prefix}error: {what}", file=sys.stderr, flush=True)
        os._exit(1)

    with RollCall(place, accelerator.process_index, accelerator.num_processes) as roll:
        with Watch(roll, 0.9 * patience, end, hurried=lambda: stop.reason is not None):
            yield


def _is_lost_touch(error: Exception) -> bool:
    """Whether an error comes from a collective operation. Gloo raises no type of its own."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )


def _notes(accelerator: Accelerator, place: str) -> dict[int, str]:
    """Return the notes of the others by rank, waiting a while: empty where one lost touch too."""
    found: dict[int, str] = {}
    others = set(range(accelerator.num_processes)) - {accelerator.process_index}
    # The store may have gone down with the process or machine that held it: then nobody can tell anything.
    with suppress(RuntimeError, KeyError):
        store = launcher_store()
        deadline = time.monotonic() + SECONDS_TO_TELL
        while others - found.keys() and time.monotonic() < deadline:
            for rank in others - found.keys():
                if store.check([note_key(place, rank)]):
                    found[rank] = store.get(note_key(place, rank)).decode()
            time.sleep(0.05)
    return found


def _what_happened(accelerator: Accelerator, others: Mapping[int, str], error: Exception) -> str:
    mine = f"rank {accelerator.process_index} went on no further"
    if failed := {rank: note for rank, note in others.items() if note}:
        return f"{reasons(failed)}; {mine}."
    if ranks := set(range(accelerator.num_processes)) - {accelerator.process_index} - others.keys():
        return f"{no_answer(ranks)}; {mine} ({_short(error)})."
    return f"the processes lost touch with each other; {mine} ({_short(error)})."


def _short(error: Exception) -> str:
    """Return the part of an error of gloo after the place in its source."""
    return str(error).splitlines()[0].rpartition("] ")[2].strip(" .")
