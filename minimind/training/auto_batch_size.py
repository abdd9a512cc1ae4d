"""`--batch-size auto`: the micro-batch that trains fastest on this machine, measured once and remembered.

Only how a step is cut into micro-batches is chosen. Which rows it holds is not, so that the loss is that of
any other micro-batch but for rounding.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from ..config.options import AUTO, PretrainConfig
from ..data.batch_plan import BatchPlan, candidate_micro_batches, sequences_per_step
from ..data.prepare import default_cache_dir
from ..data.random_tokens import random_shards
from ..distributed.collectives import run_on_main_and_broadcast
from ..errors import ConfigError
from ..formatting import count
from ..io.atomic import write_text
from ..modeling.config import MiniMindConfig
from ..version import __version__
from .speed_trial import SpeedTrial

FILE = "batch_sizes.json"

# A larger micro-batch has to save this share of the time to be worth its memory.
WORTHWHILE = 0.03
# Tokens of the micro-batch tried first. A GPU is near its best there, and each further one is compiled.
FIRST_TOKENS = {"cuda": 32768}
FIRST_TOKENS_ELSEWHERE = 1024
# No further micro-batch is tried that would probably end later than this, in seconds.
TIME_LIMIT = {"cuda": 240.0}
TIME_LIMIT_ELSEWHERE = 30.0

Prepare = Callable[[BatchPlan, Accelerator], tuple[nn.Module, torch.optim.Optimizer, bool]]


def resolve_batch_size(
    config: PretrainConfig,
    shape: MiniMindConfig,
    accelerator: Accelerator,
    prepare: Prepare,
    note: Callable[[str], object] = lambda text: None,
) -> PretrainConfig:
    """Return the configuration with a number for `--batch-size auto`; every process must call this.

    Args:
        config: returned as it is where it has a number already.
        shape: of the model.
        accelerator: of the run.
        prepare: makes model and optimizer as the run will; called only where nothing is remembered.
        note: told in one sentence what was found.

    Raises:
        ConfigError: for a global batch that the processes cannot share equally, for FSDP, and where not even
            one row fits into the memory of the device.
    """
    if config.batch_size != AUTO:
        return config
    processes = accelerator.num_processes
    total = sequences_per_step(config, processes)
    if total % processes:
        raise ConfigError(
            f"--global-batch-size {total} cannot be shared equally by {processes} processes; give a multiple "
            f"of {processes}."
        )
    if accelerator.is_fsdp2:
        raise ConfigError("--batch-size auto measures whole models, which FSDP cuts; give a number.")
    rows = total // processes
    facts = _facts(config, shape, accelerator, rows)
    file = (default_cache_dir() if config.cache_dir is None else Path(config.cache_dir).expanduser()) / FILE
    size = run_on_main_and_broadcast(accelerator, lambda: recall(file, facts))
    if size is None:
        speeds = _measure(config, shape, accelerator, prepare, rows)
        size = max(speeds, key=speeds.__getitem__)
        run_on_main_and_broadcast(accelerator, lambda: remember(file, facts, size))
        told = ", ".join(
            f"{n}: {count(speed) if speed else 'too large'}" for n, speed in sorted(speeds.items())
        )
        how = f"tokens/s of one process measured: {told}"
    else:
        how = "as measured before"
    note(f"--batch-size auto: {size} rows x accumulation {rows // size} ({how}).")
    return dataclasses.replace(config, batch_size=size, global_batch_size=total, accumulation_steps=None)


def search_upwards(
    sizes: Sequence[int],
    first: int,
    seconds_per_row: Callable[[int], float],
    *,
    look_below: bool,
    time_for: Callable[[int], bool] = lambda size: True,
) -> dict[int, float]:
    """Measure micro-batches upwards from one of them, until one is not worthwhile or does not fit.

    Args:
        sizes: to choose from, ascending.
        first: measured first; smaller ones follow while one does not fit.
        seconds_per_row: measures; infinite for what does not fit.
        look_below: try smaller ones too where the next larger one is no better.
        time_for: whether there is time to measure a further one.

    Returns:
        What was measured by size.
    """
    measured: dict[int, float] = {}
    best = sizes.index(first)
    while math.isinf(measured.setdefault(sizes[best], seconds_per_row(sizes[best]))) and best:
        best -= 1
    start = best

    def better(index: int) -> bool:
        if not 0 <= index < len(sizes) or sizes[index] in measured or not time_for(sizes[index]):
            return False
        measured[sizes[index]] = seconds_per_row(sizes[index])
        return measured[sizes[index]] < measured[sizes[best]] * (1 - WORTHWHILE)

    while better(best + 1):
        best += 1
    while look_below and best <= start and better(best - 1):
        best -= 1
    return measured


def recall(file: Path, facts: dict[str, Any]) -> int | None:
    """Return the micro-batch remembered for these facts, None where there is none."""
    size = _read(file).get(_key(facts))
    return size if isinstance(size, int) and size >= 1 and facts["rows"] % size == 0 else None


def remember(file: Path, facts: dict[str, Any], size: int) -> None:
    """Write a micro-batch down; a cache that cannot be written only means to measure again."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({**_read(file), _key(facts): size}, indent=1) + "\n")


def _read(file: Path) -> dict[str, Any]:
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _key(facts: dict[str, Any]) -> str:
    return json.dumps(facts, sort_keys=True)


def _facts(
    config: PretrainConfig, shape: MiniMindConfig, accelerator: Accelerator, rows: int
) -> dict[str, Any]:
    """Return all that the fastest micro-batch may depend on, the same on every process."""
    device = accelerator.device
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory >> 30
        name = f"{torch.cuda.get_device_name(device)}, {memory} GiB"
    else:
        name = f"{device.type}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    names = gather_object([name]) if accelerator.num_processes > 1 else [name]
    return {
        "devices": sorted(set(names)),
        "processes": accelerator.num_processes,
        "rows": rows,
        "model": dataclasses.asdict(shape),
        "precision": accelerator.mixed_precision,
        "compile": config.compile
        if config.compile is not None
        else str(accelerator.state.dynamo_plugin.backend),
        **{
            option: getattr(config, option)
            for option in ("max_seq_len", "packing", "optimizer", "activation_checkpointing")
        },
        "torch": torch.__version__,
        "minimind": __version__,
    }


def _measure(
    config: PretrainConfig, shape: MiniMindConfig, accelerator: Accelerator, prepare: Prepare, rows: int
) -> dict[int, float]:
    """Return tokens per second by micro-batch, 0 for what does not fit; the same on every process.

    Raises:
        ConfigError: where nothing fits.
    """
    device = accelerator.device
    sizes = candidate_micro_batches(rows)
    tokens = FIRST_TOKENS.get(device.type, FIRST_TOKENS_ELSEWHERE)
    first = max((size for size in sizes if size * config.max_seq_len <= tokens), default=1)
    limit = TIME_LIMIT.get(device.type, TIME_LIMIT_ELSEWHERE)
    took: dict[int, float] = {}
    # What the launcher wants compiled is asked for again when the run itself is prepared.
    launcher_compiles = accelerator.state.dynamo_plugin.backend
    model, optimizer, compiled = prepare(BatchPlan(1, 1, accelerator.num_processes), accelerator)
    trial = SpeedTrial(config, accelerator, model, optimizer)
    del model, optimizer

    def seconds_per_row(size: int) -> float:
        start = time.perf_counter()
        seconds = trial.seconds(size) / size
        took[size] = time.perf_counter() - start
        # The slowest process sets the pace, and all have to go on alike.
        everyone = gather_object([(seconds, took[size])]) if accelerator.num_processes > 1 else []
        for other, spent in everyone:
            seconds, took[size] = max(seconds, other), max(took[size], spent)
        return seconds

    def time_for(size: int) -> bool:
        last = list(took)[-1]
        # Compiling takes as long whatever the size.
        share = 1.0 if compiled else size / last
        return sum(took.values()) + took[last] * share < limit

    try:
        with tempfile.TemporaryDirectory() as folder:
            trial.shards = random_shards(Path(folder) / "tokens", shape.vocab_size)
            found = search_upwards(sizes, first, seconds_per_row, look_below=not compiled, time_for=time_for)
    finally:
        accelerator.state.dynamo_plugin.backend = launcher_compiles
        trial.close(compiled=compiled)
    if all(map(math.isinf, found.values())):
        raise ConfigError(
            f"--batch-size auto: not even {min(found)} row of --max-seq-len {config.max_seq_len} fits into "
            "the memory of the device; lower it, or give --activation-checkpointing."
        )
    return {size: config.max_seq_len / seconds for size, seconds in found.items()}
