"""Consistency checks across ranks."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from ..config.naming import flag_of
from ..errors import RankError
from ..version import __version__

# Options whose values may differ between machines: the content of data and tokenizer is compared instead.
# fmt: off
MACHINE_LOCAL_OPTIONS = frozenset((
    "data", "val_data", "cache_dir", "tokenizer", "from_weight",
    "output_dir", "run_name", "tracker", "project",
))
# fmt: on


def check_same_on_all_ranks(accelerator: Accelerator, values: Mapping[str, Any]) -> None:
    """Check that values are equal on all ranks; every process must call this.

    Args:
        values: by the name under which a difference is reported.

    Raises:
        RankError: on every process, naming the rank and both values.
    """
    if accelerator.num_processes == 1:
        return
    everyone: list[dict[str, Any]] = gather_object([dict(values)])
    first = everyone[0]
    problems = [
        f"rank {rank} has {name} {theirs.get(name)} where rank 0 has {first.get(name)}"
        for rank, theirs in enumerate(everyone)
        for name in first.keys() | theirs.keys()
        if theirs.get(name) != first.get(name)
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise RankError(f"ranks disagree: {shown}. Give all of them the same values.")


def run_signature(
    accelerator: Accelerator, options: Mapping[str, Any], fingerprints: Mapping[str, str]
) -> dict[str, Any]:
    """Return what must be equal on all ranks: options, versions, launch settings and input fingerprints."""
    shared = {flag_of(name): value for name, value in options.items() if name not in MACHINE_LOCAL_OPTIONS}
    versions = {
        "minimind": __version__,
        "Python": ".".join(platform.python_version_tuple()[:2]),
        **{name: version(name) for name in ("torch", "accelerate", "numpy")},
    }
    # Each machine has its own Accelerate configuration, and chooses the precision by its own device.
    launch = {"precision": accelerator.mixed_precision, "FSDP2": "on" if accelerator.is_fsdp2 else "off"}
    if accelerator.is_fsdp2:
        prefixes = ("FSDP_", "PARALLELISM_CONFIG_")
        launch |= {name: value for name, value in os.environ.items() if name.startswith(prefixes)}
    return {**shared, **versions, **launch, **fingerprints}


def weights_fingerprint(model: nn.Module) -> str:
    """Return a short hash of the weights of a model on this process."""
    parts = [int(torch.hash_tensor(tensor.detach()).item()) for tensor in model.parameters()]
    return f"{hash(tuple(parts)) & 0xFFFFFFFFFFFF:012x}"
