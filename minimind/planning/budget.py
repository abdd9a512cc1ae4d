"""Follow `--budget`: measure text and machine, choose the options that are not set, and train."""

from __future__ import annotations

import dataclasses
import functools
import gc
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil  # a dependency of Accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..checkpoint.resume import containing_run
from ..config.budget import BUDGET_OPTIONS, Budget, parse_budget
from ..config.options import AUTO, CONFIG_SCHEMA, ModelConfig, PretrainConfig
from ..config.schema import parse_values, read_toml, schema_of
from ..data.documents import Documents
from ..data.shards import random_shards
from ..distributed.accelerator import check_launch, close_accelerator, start_accelerator
from ..distributed.collectives import run_on_main_and_broadcast
from ..errors import ConfigError
from ..evaluation.scaling_law import packaged_law
from ..formats.open_model import open_model
from ..launch_env import is_main_process, restarts, world_size
from ..modeling.config import MiniMindConfig
from ..modeling.kernels.dispatch import unsupported_reason
from ..modeling.transformer import MiniMindForCausalLM
from ..modeling.transformers_config import TransformersConfig
from ..optim.build import OptimizerFactory
from ..run_folder import RunFolder
from ..schedule import Schedule
from ..tokenizer import load_tokenizer
from ..tracking.console import Progress
from ..tracking.plugins import Tracker
from ..training.build_model import ModelFactory
from ..training.callbacks import Callback
from ..training.custom_parts import CustomParts
from ..training.result import PretrainResult
from ..training.setup import RunInputs, TrainingParts, build_training
from .benchmark import matmul_flops, measure_steps
from .budget_report import BudgetPlan
from .candidates import Candidate, Machine, TextSize, chosen_options
from .choice import Chooser, search
from .text_sample import TextSample, read_sample, text_size, trained_tokenizer

# Seconds to measure the steps of a candidate, and all candidates: a share of a time budget, within limits.
_MEASURE_SECONDS = 0.4
_SEARCH_SHARE, _SEARCH_SECONDS = 0.1, 40.0
# A short budget has as many candidates to measure: 8 s, or a larger share where that is too much.
_SHORT_SEARCH_SHARE, _SHORT_SEARCH_SECONDS = 0.4, 8.0
# Compiling takes 10 to 20 s. With fused kernels in a CUDA graph it gains little, elsewhere much.
_COMPILE_AFTER = {True: 1200.0, False: 300.0}


def pretrain(
    config: PretrainConfig,
    *,
    callbacks: Sequence[Callback] = (),
    trackers: Sequence[Tracker] = (),
    optimizer: OptimizerFactory | None = None,
    schedule: Schedule | None = None,
    data: Documents | None = None,
    model_factory: ModelFactory = MiniMindForCausalLM,
    quiet: bool = True,
    handle_signals: bool = False,
    stop_after: int | None = None,
    branch: bool = False,
) -> PretrainResult:
    """Train a model as the configuration says, from text files to a model folder.

    With `budget` the options that are not set are chosen first. Under `accelerate launch` every rank calls
    this. A checkpoint names the parts that it was trained with: a run with an optimizer, schedule, documents
    or model of the caller resumes only where they are passed again.

    Args:
        config: all options.
        callbacks: called at the events of the run; see `Callback`.
        trackers: get the metrics besides those of the option `tracker`; see `Tracker`.
        optimizer: called with the model, before Accelerate wraps it, and the options; returns the
            optimizer. Each step sets the learning rate of its groups, times the `lr_scale` of a group if
            it has one. Its state must be tensors.
        schedule: learning rate of each step; see `Schedule`.
        data: training documents in place of the option `data`; see `Documents`.
        model_factory: builds the model in place of `MiniMindForCausalLM`, given the sizes of the options, in
            float32 on the CPU. The model is called with the keywords `input_ids`, `document_ids` and
            `position_ids`, of which the last two are None without packing. With `shift_labels` and
            `num_items_in_batch` as well, the `loss` of its output is the sum of the cross-entropy over the
            labels that are not -100, divided by the latter; otherwise its `logits` are used. Unless it is
            exactly a `MiniMindForCausalLM`, its weights are saved without a config, nothing is sampled, and
            model FLOPs are not reported.
        quiet: write nothing to the terminal; warnings and notes go to the logger `minimind`.
        handle_signals: end the run on SIGINT and SIGTERM after the current step, with a checkpoint; see
            `PretrainResult.stopped`. Otherwise they do what they did before.
        stop_after: end the run after this step as a signal would, to be resumed later.
        branch: the checkpoint to resume belongs to another run, which this one branches off: it gets its own
            folder and charts.

    Raises:
        UserError: for anything the caller can fix: options, data, checkpoints, a loss that diverges.
        Exception: what a callback raised, after the run has ended with a checkpoint.
    """
    from ..training.pretrain import pretrain as train

    if config.budget_chooses and model_factory is not MiniMindForCausalLM:
        raise ConfigError("--budget chooses the sizes of minimind's own model only; remove it.")
    custom = CustomParts(model_factory, optimizer, schedule, data, tuple(callbacks), tuple(trackers))
    chosen = follow_budget(config, quiet=quiet)
    return train(
        chosen, custom, quiet=quiet, handle_signals=handle_signals, stop_after=stop_after, branch=branch
    )


def follow_budget(config: PretrainConfig, *, quiet: bool = True) -> PretrainConfig:
    """Return the configuration with the choice of its budget, which is shown; unchanged without one.

    A run that is resumed keeps its choice. Every rank must call this.

    Raises:
        UserError: for data, a launch or options that a run cannot use.
    """
    if not config.budget_chooses:
        return config
    recorded = _recorded_choice(config)
    if recorded is not None:
        return recorded
    if (occupied := _occupied(config)) is not None:
        raise ConfigError(occupied)
    plan = plan_budget(config)
    with closing(Progress(enabled=is_main_process(), quiet=quiet)) as progress:
        progress.banner(plan.rows())
    return plan.config


def plan_budget(config: PretrainConfig, *, quiet: bool = False) -> BudgetPlan:
    """Choose what a budget leaves open, by measuring a few steps on this machine.

    Nothing is written to the output folder; a trained tokenizer is written to the cache. Under a launcher
    every rank calls this.

    Args:
        config: of the run, with a budget.
        quiet: show no notes.

    Raises:
        UserError: for data, a launch or options that a run cannot use.
    """
    with closing(Progress(enabled=is_main_process() and not quiet)) as progress:
        check_launch(config)  # its remark is the run's
        progress.note(f"--budget {config.budget}: measuring text and machine.")
        occupied = _occupied(config)
        problems = () if occupied is None else (occupied,)
        return dataclasses.replace(_choose(config), problems=problems)


def _occupied(config: PretrainConfig) -> str | None:
    """Return why a new run cannot be in --output-dir, None where it can or a run is resumed."""
    new = config.resume is None and not restarts()
    return RunFolder(Path(config.output_dir)).occupied() if new else None


def _recorded_choice(config: PretrainConfig) -> PretrainConfig | None:
    """Return the options with the choice of the run that is resumed; None for a new run."""
    if config.resume is None and not restarts():
        return None
    named = config.resume if config.resume not in (None, AUTO) else config.output_dir
    folder = containing_run(Path(str(named)))
    if folder is None:
        return None
    values, _ = parse_values(PretrainConfig, read_toml(folder.config))
    chosen = {name: values.get(name) for name in config.budget_chooses}
    # An unset option is not in the file.
    defaults = {name: CONFIG_SCHEMA[name].default for name, value in chosen.items() if value is None}
    return dataclasses.replace(config, **{**chosen, **defaults}, budget_keeps=BUDGET_OPTIONS)


class _Outcome(NamedTuple):
    """What the main process decided, for all ranks."""

    ranked: tuple[Candidate, ...]
    text: TextSize
    machine: Machine


def _choose(config: PretrainConfig) -> BudgetPlan:
    """Return the plan, the same on all ranks: the main process decides, all ranks measure."""
    assert config.budget is not None
    budget, kept = parse_budget(config.budget), _kept_options(config)
    # Once per rank: it may take seconds.
    sample = functools.cache(partial(read_sample, config))
    deciding = _decide(config, budget, kept, sample)
    next(deciding)
    found: Candidate | _Outcome | None = None
    while not isinstance(found, _Outcome):
        # In the precision of that width.
        width = found.shape.hidden_size if found else 128
        accelerator = start_accelerator(dataclasses.replace(config, **_sizes_for(width)))
        try:
            if found is None:
                measured: Any = measure_machine(accelerator, config)
            else:
                lengths = sample().document_lengths(found.tokenizer.bytes_per_token)
                times = gather_object([measure_candidate(config, found, accelerator, lengths)])
                # The slowest rank counts; one that runs out of memory counts for all.
                measured = None if None in times else max(times)
            found = run_on_main_and_broadcast(accelerator, partial(deciding.send, measured))
        finally:
            close_accelerator(accelerator)
    return _plan(config, budget, kept, found, sample)


def _decide(
    config: PretrainConfig, budget: Budget, kept: dict[str, Any], sample: Callable[[], TextSample]
) -> Generator[Candidate | _Outcome | None, Any, None]:
    """Yield what to measure, first the machine (None), then candidates, and at last the outcome."""
    machine = yield None
    choose_tokenizer = "tokenizer" not in kept and config.vocab_size is None
    val_fraction = kept.get("val_fraction")
    text = text_size(config, sample(), choose_tokenizer=choose_tokenizer, val_fraction=val_fraction)
    recompute = config.activation_checkpointing
    chooser = Chooser(budget, text, machine, packaged_law(), kept, config.optimizer, recompute)
    seconds = budget.seconds or 3600.0
    least = min(_SHORT_SEARCH_SHARE * seconds, _SHORT_SEARCH_SECONDS)
    end = time.monotonic() + min(max(_SEARCH_SHARE * seconds, least), _SEARCH_SECONDS)
    ranked = yield from search(chooser, lambda: end - time.monotonic())
    yield _Outcome(_with_alternatives(ranked), text, machine)


def _plan(
    config: PretrainConfig,
    budget: Budget,
    kept: dict[str, Any],
    outcome: _Outcome,
    sample: Callable[[], TextSample],
) -> BudgetPlan:
    best, machine = outcome.ranked[0], outcome.machine
    options = chosen_options(
        best,
        outcome.text,
        budget,
        kept,
        optimizer=config.optimizer,
        processes=machine.processes,
        trained=config.from_weight is not None,
    )
    if best.tokenizer.trained:
        options["tokenizer"] = trained_tokenizer(config, sample(), best.tokenizer.vocab_size)
    if "compile" not in kept and machine.device == "cuda":
        long = (budget.seconds or best.seconds) > _COMPILE_AFTER[machine.fused]
        options["compile"] = long or config.mixed_precision == "fp8"
    if config.val_data:
        options.pop("val_fraction", None)
    if kept.get("lr_schedule", "wsd") != "wsd":
        for name in ("decay_ratio", "decay_shape"):
            options.pop(name, None)
    kept_names = tuple(name for name in config.budget_keeps if name in BUDGET_OPTIONS)
    chosen = dataclasses.replace(config, **options, budget_keeps=BUDGET_OPTIONS)
    return BudgetPlan(chosen, budget, outcome.text, machine, outcome.ranked, kept_names)


def _with_alternatives(ranked: list[Candidate]) -> tuple[Candidate, ...]:
    """Return the best candidate and two alternatives, at least one with another shape if there is one."""
    first, *others = ranked
    shown = others[:2]
    if all(other.shape == first.shape for other in shown):
        shown[1:] = [other for other in others if other.shape != first.shape][:1] or shown[1:]
    return first, *shown


def _kept_options(config: PretrainConfig) -> dict[str, Any]:
    """Return the options that the choice must respect, by name."""
    kept = {name: getattr(config, name) for name in BUDGET_OPTIONS if name in config.budget_keeps}
    names = [*schema_of(ModelConfig), "accumulation_steps"]
    kept |= {
        name: value
        for name in names
        if name not in BUDGET_OPTIONS and (value := getattr(config, name)) is not None
    }
    if config.from_weight is not None:
        # The sizes are those of the weights.
        model_config = open_model(config.from_weight).config
        if isinstance(model_config, TransformersConfig):
            raise ConfigError(
                f"--budget knows the speed of minimind's own models, not of a {model_config.architecture} of "
                "transformers; give --max-steps or --max-time."
            )
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
        kept |= {name: getattr(model_config, name) for name in (*sizes, "intermediate_size", "vocab_size")}
        kept["tokenizer"] = config.tokenizer
    return kept


def _sizes_for(hidden_size: int) -> dict[str, Any]:
    """Return options of a model of some width, which may decide the precision."""
    return {"hidden_size": hidden_size, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2}


def measure_machine(accelerator: Accelerator, config: PretrainConfig) -> Machine:
    """Return what a run trains on; every rank must call this."""
    device = accelerator.device
    flops = matmul_flops(device, accelerator.mixed_precision)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        limit = total * torch.cuda.get_per_process_memory_fraction(device.index)
        memory = float(min(free, limit))
        name = torch.cuda.get_device_name(device)
    else:
        memory = psutil.virtual_memory().available / accelerator.num_processes
        name = device.type.upper()
    facts = gather_object([(flops, memory)])
    fused = device.type == "cuda" and not unsupported_reason(
        accelerator.mixed_precision, head_dim=64, dropout=config.dropout
    )
    return Machine(
        device=device.type,
        name=name,
        processes=accelerator.num_processes,
        matmul_flops=min(flops for flops, _ in facts),
        memory=min(memory for _, memory in facts),
        precision=accelerator.mixed_precision,
        fused=fused,
    )


def measure_candidate(
    config: PretrainConfig, candidate: Candidate, accelerator: Accelerator, lengths: Sequence[int]
) -> float | None:
    """Return the seconds of a step of a candidate; None where it does not fit into memory.

    One micro-batch per step is measured; further ones take as long as its forward and backward pass.

    Args:
        lengths: of documents of the text, in tokens: attention takes longer in longer documents.
    """
    shape = candidate.shape
    sizes = {
        **shape.options(),
        "max_seq_len": candidate.seq_len,
        "batch_size": candidate.micro_batch_size,
        "global_batch_size": None,
        "accumulation_steps": 1,
        "epochs": 1,
        "compile": False,
        # Without compiling, FP8 would be slow.
        "mixed_precision": "bf16" if config.mixed_precision == "fp8" else config.mixed_precision,
        "tokenizer": None,
        "from_weight": None,
        "resume": None,
        "budget": None,
        "budget_keeps": (),
        "vocab_size": max(config.vocab_size or 0, candidate.tokenizer.vocab_size),
    }
    small = dataclasses.replace(config, **sizes)
    names = {field.name for field in dataclasses.fields(MiniMindConfig)} & schema_of(ModelConfig).keys()
    model_config = MiniMindConfig(**{name: getattr(small, name) for name in names})
    inputs = RunInputs(small, model_config, load_tokenizer())
    parts: TrainingParts | None = None
    with tempfile.TemporaryDirectory() as folder:
        try:
            shards = random_shards(Path(folder) / "tokens", model_config.vocab_size, lengths)
            parts = build_training(inputs, shards, accelerator)
            times = measure_steps(inputs, parts, accelerator, _MEASURE_SECONDS)
        except torch.OutOfMemoryError:
            return None
        finally:
            if parts is not None:
                parts.release()
            parts = None
            gc.collect()
            if accelerator.device.type == "cuda":
                torch.cuda.empty_cache()
                # A run that follows decides about its CUDA graphs by its own memory.
                torch.cuda.reset_peak_memory_stats(accelerator.device)
    micro_batches = candidate.global_batch_size / candidate.micro_batch_size / max(world_size(), 1)
    return times.step_seconds + (micro_batches - 1) * (times.forward_seconds + times.backward_seconds)
