"""Works out what a run will be before it costs anything, from its options, its text and a few real steps."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..checkpoint.checkpointer import refuse_other_settings
from ..checkpoint.compatibility import settings_of_run
from ..checkpoint.files import StoredCheckpoint, latest_checkpoint, open_checkpoint, stored_checkpoints
from ..config.options import PretrainConfig, evaluation_interval
from ..data.batch_plan import BatchPlan, plan_batches
from ..data.loader import Loader, steps_in_all
from ..data.prepare import PreparedData, cache_folder, prepare_data
from ..data.shards import token_dtype
from ..distributed.accelerator import check_launch, choose_precision
from ..formats.open_model import training_tokenizer
from ..formatting import parse_duration, size
from ..launch_env import is_main_process, is_set, world_size
from ..modeling.config import MiniMindConfig
from ..modeling.kernels.dispatch import unsupported_reason
from ..modeling.parameter_count import count_parts
from ..modeling.transformer import MiniMindForCausalLM
from ..run_folder import RunFolder
from ..tracking.console import Progress
from ..tracking.trackers import check_trackers
from ..training.build_model import resolve_model_config
from ..training.prepared_model import compile_mode
from .benchmark import (
    BenchmarkResult,
    TooLargeError,
    benchmark,
    micro_batch_flops,
    seconds_of_step,
    with_batch_size,
)
from .memory import Compiled, MemoryEstimate, estimate_memory, optimizer_bytes
from .plan_report import RunPlan

# How long whole steps are measured.
SECONDS = 4.0
# With more micro-batches than this, a step is measured with this many: the others are like them.
_ROUNDS = 2
# Weights of the delivered model are of half precision.
_DELIVERED = 2


def plan_run(
    config: PretrainConfig,
    *,
    price_per_hour: float | None = None,
    seconds: float = SECONDS,
    quiet: bool = False,
) -> RunPlan:
    """Work out what a run will be, and measure a few of its steps on this machine.

    Nothing is written to the output folder. The text is tokenized into the cache as the run itself would do
    and then find done. Under `accelerate launch` every process calls this.

    Args:
        config: of the run.
        price_per_hour: of all machines together.
        seconds: how long to measure whole steps.
        quiet: show no progress.

    Raises:
        UserError: what the run itself would raise before its first step.
    """
    check_trackers(config)
    progress = Progress(enabled=is_main_process() and not quiet)
    try:
        if (remark := check_launch(config)) is not None:
            progress.note(remark)
        tokenizer = training_tokenizer(config.tokenizer, config.from_weight)[0]
        config, shape = resolve_model_config(config, tokenizer)
        config = dataclasses.replace(config, learning_rate=config.peak_learning_rate)
        config = with_batch_size(config, shape)
        batches = plan_batches(config, world_size())
        data = prepare_data(config, tokenizer, progress.data_build)
    finally:
        progress.close()
    loader = Loader(
        data.train,
        seq_len=config.max_seq_len,
        packing=config.packing,
        plan=batches,
        seed=config.seed,
        process_index=0,
        device="cpu",
        weights=data.weights,
    )
    total_steps = steps_in_all(config, loader, batches)
    total_tokens = round(total_steps / loader.steps_per_epoch * loader.tokens_per_epoch)
    damaged: list[str] = []
    checkpoint_to_resume = _checkpoint(config, damaged.append)
    if checkpoint_to_resume is not None:
        refuse_other_settings(checkpoint_to_resume, settings_of_run(config, shape, batches, tokenizer, data))
    first_step = 0 if checkpoint_to_resume is None else min(checkpoint_to_resume.step, total_steps)
    with torch.device("meta"):
        model = MiniMindForCausalLM(shape)
    measured, too_large = _measure(config, batches, seconds)
    memory = _estimate(config, shape, batches, measured)
    device_memory = _device_memory()
    step_seconds, micro_batch_seconds = _times(config, shape, batches, measured)
    checkpoint = 4 * shape.num_parameters() + optimizer_bytes(shape, config.optimizer)
    disk, free = _disk(config, data, checkpoint, shape.num_parameters(), total_steps)
    problems = [
        *damaged,
        *([too_large] if too_large else []),
        *_problems(config, disk, free, memory, device_memory),
    ]
    vocabulary = data.report.vocab_size
    splits = [split for split in (data.train, data.validation) if split is not None]
    plan = RunPlan(
        config=config,
        batches=batches,
        parts=count_parts({name: p.shape for name, p in model.named_parameters()}),
        flops_per_token=shape.flops_per_token(config.max_seq_len),
        data=data,
        tokens_per_epoch=loader.tokens_per_epoch,
        steps_per_epoch=loader.steps_per_epoch,
        first_step=first_step,
        total_steps=total_steps,
        total_tokens=total_tokens,
        cache_folder=cache_folder(config),
        cache_bytes=sum(
            split.num_tokens * token_dtype(vocabulary).itemsize + 8 * split.num_documents for split in splits
        ),
        memory=memory,
        device_memory=device_memory,
        measured=measured,
        step_seconds=step_seconds,
        evaluation_seconds=None
        if micro_batch_seconds is None
        else micro_batch_seconds * _evaluation_batches(config, data, batches, first_step, total_steps),
        checkpoint_bytes=checkpoint,
        disk_bytes=disk,
        disk_free=free,
        price_per_hour=price_per_hour,
        problems=tuple(problems),
    )
    late = plan.seconds is not None and config.max_time is not None
    if late and plan.seconds > parse_duration(config.max_time):  # type: ignore[arg-type, operator]
        sentence = f"--max-time {config.max_time} ends the run before its last step."
        plan = dataclasses.replace(plan, problems=(*plan.problems, sentence))
    return plan


def _measure(
    config: PretrainConfig, batches: BatchPlan, seconds: float
) -> tuple[BenchmarkResult | None, str | None]:
    """Return a few real steps, or None and why they do not fit."""
    rounds = min(batches.accumulation_steps, _ROUNDS)
    smaller = dataclasses.replace(config, accumulation_steps=rounds, global_batch_size=None)
    try:
        return benchmark(smaller, seconds), None
    except TooLargeError as error:
        return None, str(error)


def _times(
    config: PretrainConfig, shape: MiniMindConfig, batches: BatchPlan, measured: BenchmarkResult | None
) -> tuple[float | None, float | None]:
    """Return the seconds of a whole step of the run, and of a micro-batch forward."""
    if measured is None:
        return None, None
    rounds = min(batches.accumulation_steps, _ROUNDS)
    asked = micro_batch_flops(shape, batches.micro_batch_size, config.max_seq_len)
    work = asked / micro_batch_flops(shape, measured.batch_size, measured.max_seq_len)
    forward = measured.forward_seconds / rounds * work
    backward = measured.backward_seconds / rounds * work
    step = seconds_of_step(dataclasses.asdict(measured), work)
    return step + (batches.accumulation_steps - rounds) * (forward + backward), forward


def _estimate(
    config: PretrainConfig, shape: MiniMindConfig, batches: BatchPlan, measured: BenchmarkResult | None
) -> MemoryEstimate:
    on_gpu = torch.cuda.is_available() and not is_set("ACCELERATE_USE_CPU")
    precision = choose_precision(config) if measured is None else measured.precision
    fused = on_gpu and unsupported_reason(precision, shape.head_dim, config.dropout) is None
    compiled: Compiled = "no"
    if measured.compiled if measured is not None else config.compile is not False:
        compiled = compile_mode(config, batches.num_processes, fused=fused)
    return estimate_memory(
        shape,
        rows=batches.micro_batch_size,
        seq_len=config.max_seq_len,
        precision=precision,
        compiled=compiled,
        optimizer=config.optimizer,
        accumulation_steps=batches.accumulation_steps,
        num_processes=batches.num_processes,
        shards=_shards(batches.num_processes),
        fused=fused,
        recompute=config.activation_checkpointing or is_set("FSDP_ACTIVATION_CHECKPOINTING"),
    )


def _shards(num_processes: int) -> int:
    """Return into how many parts the launcher has FSDP divide the model; 1 without FSDP."""
    if not is_set("ACCELERATE_USE_FSDP"):
        return 1
    if is_set("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return int(os.environ.get("PARALLELISM_CONFIG_DP_SHARD_SIZE", num_processes))
    return num_processes


def _device_memory() -> int | None:
    if is_set("ACCELERATE_USE_CPU") or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def _checkpoint(config: PretrainConfig, on_damaged: Callable[[str], None]) -> StoredCheckpoint | None:
    """Return the checkpoint that the run would go on from, None at a start; reads it as the run would."""
    if config.resume is None:
        return None
    if config.resume != "auto":
        return open_checkpoint(Path(config.resume), on_damaged)
    return latest_checkpoint(RunFolder(Path(config.output_dir)).checkpoints, on_damaged)


def _evaluation_batches(
    config: PretrainConfig, data: PreparedData, batches: BatchPlan, first_step: int, total_steps: int
) -> int:
    """Return the batches that one process runs in all evaluations."""
    if data.validation is None:
        return 0
    rows = data.validation.num_documents
    if config.packing:
        rows = math.ceil(data.validation.num_tokens / config.max_seq_len)
    once = math.ceil(rows / (batches.micro_batch_size * batches.num_processes))
    interval = evaluation_interval(config)
    times = math.ceil(total_steps / interval) - first_step // interval
    return times * min(once, config.eval_batches or once)


def _disk(
    config: PretrainConfig, data: PreparedData, checkpoint: int, parameters: int, total_steps: int
) -> tuple[int, int]:
    """Return the bytes that the run will need beyond those it has, and those that are free."""
    folder = RunFolder(Path(config.output_dir))
    kept = config.keep_checkpoints + (1 if data.validation is not None else 0)
    stay = set() if config.keep_every is None else set(_multiples(config.keep_every, total_steps))
    go = {*_multiples(config.save_interval, total_steps), total_steps} - stay
    # A checkpoint is whole before an older one goes.
    at_once = len(stay) + min(kept + 1, len(go))
    there = 0
    if config.resume is not None:
        there = sum(entry.num_bytes for entry in stored_checkpoints(folder.checkpoints))
    needed = max(at_once * checkpoint - there, 0) + _DELIVERED * parameters
    return needed, shutil.disk_usage(_existing(folder.path)).free


def _multiples(interval: int, total_steps: int) -> range:
    return range(interval, total_steps + 1, interval)


def _existing(path: Path) -> Path:
    """Return a path, or the nearest one above it that exists."""
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def _problems(
    config: PretrainConfig, disk: int, free: int, memory: MemoryEstimate, device_memory: int | None
) -> Iterator[str]:
    if disk > free:
        fewer = "lower --keep-checkpoints" + ("" if config.keep_every is None else ", raise --keep-every")
        yield (
            f"the checkpoints need {size(disk)} and {size(free)} are free in {config.output_dir}; free "
            f"some, {fewer}, or name another --output-dir."
        )
    place = _existing(Path(config.output_dir))
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        yield f"--output-dir {config.output_dir} cannot be written, for {place} cannot; name another folder."
    if config.resume is None and RunFolder(Path(config.output_dir)).holds_a_run():
        yield (
            f"--output-dir {config.output_dir} already holds a run; go on with it by --resume, or name "
            "another folder."
        )
    if device_memory is not None and memory.peak > 0.95 * device_memory:
        yield (
            f"the estimate of {size(memory.peak)} is about all of the GPU's {size(device_memory)}; lower "
            "--batch-size, or give --activation-checkpointing."
        )
