"""`--batch-size auto`: benchmarks micro-batch sizes on this machine and caches the fastest.

The global batch does not change, only its division into micro-batches: losses differ by rounding alone.
"""

from __future__ import annotations

import dataclasses
import gc
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
from ..data.loader import Loader, MicroBatch
from ..data.prepare import cache_folder
from ..data.shards import TokenShards, random_shards
from ..distributed.accelerator import shown_precision
from ..distributed.collectives import run_on_main_and_broadcast
from ..errors import ConfigError
from ..formatting import count
from ..io.atomic import write_text
from ..io.reading import read_json
from ..modeling.config import MiniMindConfig
from ..optim.muon import Muon
from ..version import __version__
from .build_model import compile_and_wrap
from .load_balancing import expert_balance
from .step import forward_loss
from .step_timer import StepTimer

FILE = "batch_sizes.json"

# A larger micro-batch must save this share of the time to be worth its memory.
WORTHWHILE = 0.03
# Tokens of the micro-batch tried first: a GPU is near its best there, and each further size compiles again.
FIRST_TOKENS = {"cuda": 32768}
FIRST_TOKENS_ELSEWHERE = 1024
# No further size is tried that would probably end later than this, in seconds.
TIME_LIMIT = {"cuda": 240.0}
TIME_LIMIT_ELSEWHERE = 30.0
# Share of a GPU's memory that may be used: evaluation and communication need some as well.
USABLE_MEMORY = 0.92
# Each size is timed this often, but at most for so many seconds; the fastest time counts.
ROUNDS = 5
ROUNDS_LIMIT = 3.0
# In the messages of out-of-memory errors, by device.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")


def resolve_batch_size(
    config: PretrainConfig,
    model_config: MiniMindConfig,
    accelerator: Accelerator,
    note: Callable[[str], object] = lambda sentence: None,
) -> PretrainConfig:
    """Return the configuration with a number for `--batch-size auto`; every rank must call this.

    Args:
        config: returned unchanged where it has a number.
        note: gets one sentence with the result.

    Raises:
        ConfigError: for a global batch that the ranks cannot share equally, for FSDP, and where not even one
            sequence fits into the memory of the device.
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
        raise ConfigError("--batch-size auto benchmarks unsharded models, not FSDP; give a number.")
    sequences = total // processes
    key = _cache_key(config, model_config, accelerator, sequences)
    file = cache_folder(config) / FILE
    size = run_on_main_and_broadcast(accelerator, lambda: load_size(file, key))
    if size is None:
        speeds = _measure(config, model_config, accelerator, sequences)
        size = max(speeds, key=speeds.__getitem__)
        run_on_main_and_broadcast(accelerator, lambda: store_size(file, key, size))
        listed = ", ".join(
            f"{n}: {count(speed) if speed else 'too large'}" for n, speed in sorted(speeds.items())
        )
        how = f"tokens/s of one process measured: {listed}"
    else:
        how = "as measured before"
    note(f"--batch-size auto: {size} sequences x accumulation {sequences // size} ({how}).")
    return dataclasses.replace(config, batch_size=size, global_batch_size=total, accumulation_steps=None)


def search_upwards(
    sizes: Sequence[int],
    first: int,
    seconds_per_sequence: Callable[[int], float],
    *,
    look_below: bool,
    time_for: Callable[[int], bool] = lambda size: True,
) -> dict[int, float]:
    """Measure micro-batch sizes upwards, until one is not worthwhile or does not fit.

    Args:
        sizes: to choose from, ascending.
        first: measured first; smaller ones follow while it does not fit.
        seconds_per_sequence: measures a size; infinite where it does not fit.
        look_below: try smaller ones too where the next larger one is no better.
        time_for: whether there is time to measure a size.

    Returns:
        The measured times by size.
    """
    measured: dict[int, float] = {}
    best = sizes.index(first)
    while math.isinf(measured.setdefault(sizes[best], seconds_per_sequence(sizes[best]))) and best:
        best -= 1
    start = best

    def better(index: int) -> bool:
        if not 0 <= index < len(sizes) or sizes[index] in measured or not time_for(sizes[index]):
            return False
        measured[sizes[index]] = seconds_per_sequence(sizes[index])
        return measured[sizes[index]] < measured[sizes[best]] * (1 - WORTHWHILE)

    while better(best + 1):
        best += 1
    while look_below and best <= start and better(best - 1):
        best -= 1
    return measured


def load_size(file: Path, key: dict[str, Any]) -> int | None:
    """Return the cached micro-batch size of a key, None where there is none."""
    size = _read(file).get(json.dumps(key, sort_keys=True))
    return size if isinstance(size, int) and size >= 1 and key["rows"] % size == 0 else None


def store_size(file: Path, key: dict[str, Any], size: int) -> None:
    """Cache a micro-batch size. Where the cache cannot be written, the next run measures again."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        entries = {**_read(file), json.dumps(key, sort_keys=True): size}
        write_text(file, json.dumps(entries, indent=1) + "\n")


def _read(file: Path) -> dict[str, Any]:
    try:
        entries = read_json(file)
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _cache_key(
    config: PretrainConfig, model_config: MiniMindConfig, accelerator: Accelerator, sequences: int
) -> dict[str, Any]:
    """Return everything that the fastest micro-batch may depend on, the same on every rank."""
    device = accelerator.device
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory >> 30
        name = f"{torch.cuda.get_device_name(device)}, {memory} GiB"
    else:
        name = f"{device.type}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return {
        "devices": sorted(set(gather_object([name]))),
        "processes": accelerator.num_processes,
        "rows": sequences,
        "model": dataclasses.asdict(model_config),
        "precision": shown_precision(config, accelerator),
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
    config: PretrainConfig, model_config: MiniMindConfig, accelerator: Accelerator, sequences: int
) -> dict[int, float]:
    """Return tokens per second by micro-batch size, 0 for one that does not fit; the same on every rank."""
    device = accelerator.device
    sizes = candidate_micro_batches(sequences)
    tokens = FIRST_TOKENS.get(device.type, FIRST_TOKENS_ELSEWHERE)
    first = max((size for size in sizes if size * config.max_seq_len <= tokens), default=1)
    limit = TIME_LIMIT.get(device.type, TIME_LIMIT_ELSEWHERE)
    took: dict[int, float] = {}
    # The launcher's choice of compilation, which the run itself reads again.
    launcher_compiles = accelerator.state.dynamo_plugin.backend
    plan = BatchPlan(1, 1, accelerator.num_processes)
    model, optimizer, compiled = compile_and_wrap(config, model_config, plan, accelerator)
    trial = SpeedTrial(config, model_config, accelerator, model, optimizer, compiled=compiled)
    del model, optimizer

    def seconds_per_sequence(size: int) -> float:
        start = time.perf_counter()
        seconds = trial.seconds(size) / size
        took[size] = time.perf_counter() - start
        # The slowest rank counts, and all must continue with the same numbers.
        everyone = zip(*gather_object([(seconds, took[size])]), strict=True)
        seconds, took[size] = map(max, everyone)
        return seconds

    def time_for(size: int) -> bool:
        last = list(took)[-1]
        # The time of compilation does not depend on the size.
        share = 1.0 if compiled else size / last
        return sum(took.values()) + took[last] * share < limit

    try:
        with tempfile.TemporaryDirectory() as folder:
            trial.shards = random_shards(Path(folder) / "tokens", model_config.vocab_size)
            found = search_upwards(
                sizes, first, seconds_per_sequence, look_below=not compiled, time_for=time_for
            )
    finally:
        accelerator.state.dynamo_plugin.backend = launcher_compiles
        trial.close()
    if all(map(math.isinf, found.values())):
        raise ConfigError(
            f"--batch-size auto: not even {min(found)} sequence of --max-seq-len {config.max_seq_len} fits "
            "into the memory of the device; lower it, or give --activation-checkpointing."
        )
    return {size: config.max_seq_len / seconds for size, seconds in found.items()}


class SpeedTrial:
    """Times forward and backward passes of micro-batches on this rank.

    Gradients are not exchanged: a rank that runs out of memory must not leave the others waiting.

    Attributes:
        shards: random tokens; set before the first measurement.
    """

    shards: TokenShards

    def __init__(
        self,
        config: PretrainConfig,
        model_config: MiniMindConfig,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        compiled: bool,
    ) -> None:
        self._config, self._model_config, self._accelerator = config, model_config, accelerator
        self._compiled = compiled
        self._model: Any = model.train()
        # Not the wrapper of Accelerate: these steps must not change the scale of fp16.
        self._optimizer: Any = getattr(optimizer, "optimizer", optimizer)
        if isinstance(self._optimizer, Muon):
            self._optimizer.shared = None  # ranks may take different numbers of steps

    def seconds(self, size: int) -> float:
        """Return the time of a micro-batch of `size` sequences; infinite where it does not fit."""
        try:
            return self._seconds(size)
        except RuntimeError as error:
            if not any(message in str(error).lower() for message in OUT_OF_MEMORY):
                raise
            return math.inf
        finally:
            self._optimizer.zero_grad()
            if self._compiled:
                # Every size compiles again, and Dynamo allows `recompile_limit` times.
                torch.compiler.reset()
            if self._accelerator.device.type == "cuda":
                torch.cuda.empty_cache()

    def _seconds(self, size: int) -> float:
        device = self._accelerator.device
        loader = Loader(
            self.shards,
            seq_len=self._config.max_seq_len,
            packing=self._config.packing,
            plan=BatchPlan(size, 1, 1),
            seed=0,
            process_index=0,
            device=device,
        )
        (batch,) = loader.step(0, 0).micro_batches
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        # Compiles, and allocates the optimizer's state.
        self._timed_round(batch)
        self._optimizer.step()
        times = [self._timed_round(batch)]
        while len(times) < ROUNDS and sum(times) < ROUNDS_LIMIT:
            times.append(self._timed_round(batch))
        if device.type == "cuda":
            memory = torch.cuda.get_device_properties(device).total_memory
            if torch.cuda.max_memory_reserved(device) > USABLE_MEMORY * memory:
                return math.inf
        return min(times)

    def _timed_round(self, batch: MicroBatch) -> float:
        timer = StepTimer(self._accelerator.device)
        timer.synchronize()
        timer.start()
        with self._accelerator.no_sync(self._model):
            # Without the load-balancing loss, whose counts are exchanged: ranks may do different rounds.
            loss = forward_loss(self._model, batch, expert_balance(self._accelerator, self._model_config))
            self._accelerator.backward(loss / batch.shift_labels.numel())
        timer.mark("round")
        return timer.seconds()["round"][0]

    def close(self) -> None:
        """Free memory, so that the run starts as if there had been no trial."""
        self._model = self._optimizer = None
        self._accelerator.free_memory()
        gc.collect()
        if self._accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._accelerator.device)
