"""Plans a run before it starts, from its options, its data and a few real steps."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import torch

from ..checkpoint.checkpointer import check_settings
from ..checkpoint.compatibility import settings_of_run
from ..checkpoint.files import StoredCheckpoint, latest_checkpoint, open_checkpoint, stored_checkpoints
from ..config.checks import run_notes
from ..config.naming import errors_for_caller, for_caller
from ..config.options import CONFIG_SCHEMA, PretrainConfig
from ..data.batch_plan import BatchPlan, plan_batches
from ..data.loader import Loader
from ..data.prepare import PreparedData, cache_folder, prepare_data
from ..data.shards import token_dtype
from ..distributed.accelerator import choose_precision
from ..formats.transformers_folder import stored_dtype
from ..formats.transformers_model import matrices_of
from ..formatting import parse_duration, size
from ..launch_env import device_type, is_main_process, is_set, world_size
from ..modeling.config import MiniMindConfig
from ..modeling.kernels.dispatch import unsupported_reason
from ..modeling.parameter_count import count_parts
from ..modeling.transformers_config import TransformersConfig
from ..run_folder import RunFolder
from ..schedule import warmup_problem, warmup_steps
from ..tracking.console import Progress
from ..tracking.trackers import check_trackers
from ..training.compilation import compile_mode
from ..training.setup import RunInputs, resolve_batch_size_alone, resolve_run
from .benchmark import BenchmarkResult, TooLargeError, benchmark, micro_batch_flops
from .memory import Compiled, MemoryEstimate, estimate_memory, optimizer_bytes
from .plan_report import RunPlan
from .scaled_run import ScaleRequest, empty_model, scale_run

# Seconds of measuring whole steps.
SECONDS = 4.0
# A step with more micro-batches than this is measured with this many: the others take as long.
_ROUNDS = 2
# Bytes per weight of the final model, which is in half precision.
_FINAL_MODEL_BYTES = 2


@errors_for_caller(CONFIG_SCHEMA)
def plan_run(
    config: PretrainConfig,
    *,
    price_per_hour: float | None = None,
    scale: ScaleRequest | None = None,
    seconds: float = SECONDS,
    quiet: bool = False,
) -> RunPlan:
    """Plan a run, and measure a few of its steps on this machine.

    Nothing is written to the output folder. The data is tokenized into the cache, where the run finds it.
    Under `accelerate launch` every rank calls this.

    Args:
        config: of the run.
        price_per_hour: of all machines together.
        scale: GPUs to predict the run on, besides planning it for this machine.
        seconds: how long to measure whole steps.
        quiet: show no progress.

    Raises:
        UserError: what the run itself would raise before its first step.
    """
    if scale is not None:
        scale.check()
    check_trackers(config)
    inputs, batches, data = _resolve(config, quiet=quiet)
    model_config = inputs.model_config
    loader = inputs.loader(data.train, batches, weights=data.weights)
    total_steps = inputs.total_steps(loader, batches)
    warmup = warmup_steps(inputs.config, total_steps)
    damaged: list[str] = []
    first_step = _first_step(inputs, batches, data, total_steps, damaged.append)
    measured, too_large = _measure(inputs.config, batches, seconds)
    memory = _estimate(inputs.config, _estimated_sizes(model_config), batches, measured)
    device_memory = _device_memory()
    times = step_seconds, micro_batch_seconds = _times(inputs.config, model_config, batches, measured)
    scaled = None
    if scale is not None:
        scaled = scale_run(scale, inputs, data, batches, first_step, measured, times, _evaluation_batches)
    evaluation_batches = _evaluation_batches(inputs.config, data, batches, first_step, total_steps)
    checkpoint = 4 * model_config.num_parameters() + _optimizer_bytes(model_config, inputs.config.optimizer)
    disk, free = _disk(inputs.config, data, checkpoint, _final_model_bytes(model_config), total_steps)
    plan = RunPlan(
        config=inputs.config,
        batches=batches,
        parts=_count_parts(model_config),
        flops_per_token=model_config.flops_per_token(config.max_seq_len),
        data=data,
        tokens_per_epoch=loader.tokens_per_epoch,
        steps_per_epoch=loader.steps_per_epoch,
        first_step=first_step,
        total_steps=total_steps,
        total_tokens=_total_tokens(loader, inputs.config, batches, total_steps),
        cache_folder=cache_folder(config),
        cache_bytes=_cache_bytes(data),
        memory=memory,
        device_memory=device_memory,
        measured=measured,
        step_seconds=step_seconds,
        evaluation_seconds=None if micro_batch_seconds is None else micro_batch_seconds * evaluation_batches,
        checkpoint_bytes=checkpoint,
        disk_bytes=disk,
        disk_free=free,
        price_per_hour=price_per_hour,
        scaled=scaled,
        problems=(
            *damaged,
            *([too_large] if too_large else []),
            *_problems(inputs.config, disk, free, memory, device_memory),
            *run_notes(inputs.config, total_steps, loader.steps_per_epoch, warmup),
        ),
    )
    sentences = tuple(_time_problems(plan, warmup))
    return dataclasses.replace(plan, problems=(*plan.problems, *sentences))


def _time_problems(plan: RunPlan, warmup: int) -> Iterator[str]:
    """Yield what --max-time does not allow."""
    config = plan.config
    if config.max_time is None or plan.measured is None or plan.step_seconds is None or plan.seconds is None:
        return
    limit = parse_duration(config.max_time)
    if plan.seconds <= limit:
        return
    yield for_caller(f"--max-time {config.max_time} ends the run before its last step.", CONFIG_SCHEMA)
    short = warmup_problem(
        config,
        warmup=warmup,
        steps_done=plan.first_step,
        seconds_left=limit - plan.measured.start_seconds,
        seconds_per_step=plan.step_seconds,
    )
    if short is not None:
        yield for_caller(short, CONFIG_SCHEMA)


def _total_tokens(loader: Loader, config: PretrainConfig, batches: BatchPlan, total_steps: int) -> int:
    """Return the input tokens of the run.

    Inside an epoch they are less than a sequence off with packing, since one shorter sequence is somewhere in
    it, and otherwise those of sequences of mean length.
    """
    epochs, steps = divmod(total_steps, loader.steps_per_epoch)
    sequences = steps * batches.global_batch_size
    length = config.max_seq_len if config.packing else loader.tokens_per_epoch / loader.sequences_per_epoch
    return epochs * loader.tokens_per_epoch + round(sequences * length)


def _resolve(config: PretrainConfig, *, quiet: bool) -> tuple[RunInputs, BatchPlan, PreparedData]:
    """Resolve the options and tokenize the data."""
    with closing(Progress(enabled=is_main_process() and not quiet)) as progress:
        inputs = resolve_batch_size_alone(resolve_run(config, progress.note))
        batches = plan_batches(inputs.config, world_size())
        data = prepare_data(inputs.config, inputs.tokenizer, progress.data_build)
        inputs = inputs.with_learning_rate(data.train, world_size(), progress.note)
        return inputs, batches, data


def _first_step(
    inputs: RunInputs,
    batches: BatchPlan,
    data: PreparedData,
    total_steps: int,
    on_damaged: Callable[[str], None],
) -> int:
    """Return the step that the run resumes from, 0 for a new run; reads the checkpoint as the run would."""
    config = inputs.config
    if config.resume is None:
        return 0
    checkpoint: StoredCheckpoint | None
    if config.resume != "auto":
        checkpoint = open_checkpoint(Path(config.resume), on_damaged)
    else:
        checkpoint = latest_checkpoint(RunFolder(Path(config.output_dir)).checkpoints, on_damaged)
    if checkpoint is None:
        return 0
    settings = settings_of_run(config, inputs.model_config, batches, inputs.tokenizer, data)
    check_settings(checkpoint, settings)
    return min(checkpoint.step, total_steps)


def _optimizer_bytes(model_config: MiniMindConfig, optimizer: str) -> int:
    """Return the bytes of optimizer state in a checkpoint."""
    if not isinstance(model_config, TransformersConfig):
        return optimizer_bytes(model_config, optimizer)
    both = 2 * 4 * model_config.num_parameters()
    matrices = sum(matrix.numel() for matrix in matrices_of(empty_model(model_config)))
    return both if optimizer == "adamw" else both - 4 * matrices


def _final_model_bytes(model_config: MiniMindConfig) -> int:
    """Return the bytes of the weights that the run writes at its end."""
    weight = _FINAL_MODEL_BYTES
    if isinstance(model_config, TransformersConfig):
        weight = stored_dtype(model_config).itemsize
    return weight * model_config.num_parameters()


def _count_parts(model_config: MiniMindConfig) -> dict[str, int]:
    """Return the parameters of the model by part."""
    model = empty_model(model_config)
    return count_parts({name: p.shape for name, p in model.named_parameters()})


def _cache_bytes(data: PreparedData) -> int:
    """Return about how many bytes the tokens take in the cache."""
    token_bytes = token_dtype(data.report.vocab_size).itemsize
    splits = [split for split in (data.train, data.validation) if split is not None]
    return sum(split.num_tokens * token_bytes + 8 * split.num_documents for split in splits)


def _measure(
    config: PretrainConfig, batches: BatchPlan, seconds: float
) -> tuple[BenchmarkResult | None, str | None]:
    """Measure a few real steps; return None and the reason where they do not fit."""
    rounds = min(batches.accumulation_steps, _ROUNDS)
    smaller = dataclasses.replace(config, accumulation_steps=rounds, global_batch_size=None)
    try:
        return benchmark(smaller, seconds), None
    except TooLargeError as error:
        return None, str(error)


def _times(
    config: PretrainConfig, model_config: MiniMindConfig, batches: BatchPlan, measured: BenchmarkResult | None
) -> tuple[float | None, float | None]:
    """Return the seconds of a whole step of the run, and of the forward pass of a micro-batch."""
    if measured is None:
        return None, None
    rounds = min(batches.accumulation_steps, _ROUNDS)
    asked = micro_batch_flops(model_config, batches.micro_batch_size, config.max_seq_len)
    work = asked / micro_batch_flops(model_config, measured.batch_size, measured.max_seq_len)
    forward = measured.forward_seconds / rounds * work
    backward = measured.backward_seconds / rounds * work
    step = measured.scaled(work)
    return step + (batches.accumulation_steps - rounds) * (forward + backward), forward


def _estimated_sizes(model_config: MiniMindConfig) -> MiniMindConfig:
    """Return the configuration with typical values for sizes that a model of transformers does not name."""
    if not isinstance(model_config, TransformersConfig):
        return model_config
    heads = model_config.num_attention_heads or 1
    return dataclasses.replace(
        model_config,
        num_attention_heads=heads,
        num_key_value_heads=model_config.num_key_value_heads or heads,
        head_dim=model_config.head_dim or model_config.hidden_size // heads,
        intermediate_size=model_config.intermediate_size or 4 * model_config.hidden_size,
    )


def _estimate(
    config: PretrainConfig, model_config: MiniMindConfig, batches: BatchPlan, measured: BenchmarkResult | None
) -> MemoryEstimate:
    own = not isinstance(model_config, TransformersConfig)
    on_gpu = own and device_type() == "cuda"
    precision = choose_precision(config)
    fused = on_gpu and unsupported_reason(precision, model_config.head_dim, config.dropout) is None
    compiled: Compiled = "no"
    if own and (measured.compiled if measured is not None else config.compile is not False):
        compiled = compile_mode(config, batches.num_processes, fused=fused)
    estimate = estimate_memory(
        model_config,
        sequences=batches.micro_batch_size,
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
    if own:
        return estimate
    # transformers computes all logits: in half precision if used, in float32, and the gradient of both.
    logits = batches.micro_batch_size * config.max_seq_len * model_config.vocab_size
    bytes_each = 2 * 4 + (0 if precision == "no" else 2 * 2)
    return dataclasses.replace(estimate, working=max(estimate.working, logits * bytes_each))


def _shards(num_processes: int) -> int:
    """Return the number of FSDP shards of the model; 1 without FSDP."""
    if not is_set("ACCELERATE_USE_FSDP"):
        return 1
    if is_set("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return int(os.environ.get("PARALLELISM_CONFIG_DP_SHARD_SIZE", num_processes))
    return num_processes


def _device_memory() -> int | None:
    if device_type() != "cuda":
        return None
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def _evaluation_batches(
    config: PretrainConfig, data: PreparedData, batches: BatchPlan, first_step: int, total_steps: int
) -> int:
    """Return the micro-batches that each rank evaluates over the whole run."""
    if data.validation is None:
        return 0
    sequences = data.validation.num_documents
    if config.packing:
        sequences = math.ceil(data.validation.num_tokens / config.max_seq_len)
    once = math.ceil(sequences / (batches.micro_batch_size * batches.num_processes))
    interval = config.evaluation_interval
    # A new run also evaluates before its first step.
    times = math.ceil(total_steps / interval) - first_step // interval + (first_step == 0)
    sample = once if config.eval_batches is None else config.eval_batches * batches.accumulation_steps
    return times * min(once, sample)


def _disk(
    config: PretrainConfig, data: PreparedData, checkpoint: int, final_model: int, total_steps: int
) -> tuple[int, int]:
    """Return the bytes that the run needs in addition to those it has, and those that are free."""
    folder = RunFolder(Path(config.output_dir))
    kept = config.keep_checkpoints + (1 if data.validation is not None else 0)
    permanent = set() if config.keep_every is None else set(_multiples(config.keep_every, total_steps))
    rotated = {*_multiples(config.save_interval, total_steps), total_steps} - permanent
    # A checkpoint is complete before an older one is deleted.
    at_once = len(permanent) + min(kept + 1, len(rotated))
    present = 0
    if config.resume is not None:
        present = sum(entry.num_bytes for entry in stored_checkpoints(folder.checkpoints))
    needed = max(at_once * checkpoint - present, 0) + final_model
    return needed, shutil.disk_usage(_existing(folder.path)).free


def _multiples(interval: int, total_steps: int) -> range:
    return range(interval, total_steps + 1, interval)


def _existing(path: Path) -> Path:
    """Return the path, or its nearest parent that exists."""
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
        yield f"--output-dir {config.output_dir} cannot be written, because {place} cannot; use another one."
    if config.resume is None and (occupied := RunFolder(Path(config.output_dir)).occupied()) is not None:
        yield occupied
    if device_memory is not None and memory.peak > 0.95 * device_memory:
        yield (
            f"the estimate of {size(memory.peak)} is almost all of the GPU's {size(device_memory)}; lower "
            "--batch-size, or give --activation-checkpointing."
        )
