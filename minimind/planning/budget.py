"""Follow `--budget`: measure text and machine, choose the options that are not set, and train."""

from __future__ import annotations

import dataclasses
import gc
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil  # a dependency of Accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..checkpoint.resume import containing_run
from ..config.budget import BUDGET_OPTIONS, Budget, parse_budget
from ..config.options import AUTO, CONFIG_SCHEMA, FROM_WEIGHT_RATE, ModelConfig, PretrainConfig
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
from ..training.result import PretrainResult
from ..training.setup import RunInputs, build_training
from .benchmark import matmul_flops, measure_steps
from .budget_report import BudgetPlan
from .candidates import Candidate, Machine, TextSize, chosen_options
from .choice import Chooser, search
from .text_sample import TextSample, read_sample, text_size, trained_tokenizer

# Seconds to measure the steps of a candidate, and all candidates: a share of a time budget, within limits.
_MEASURE_SECONDS = 0.4
_SEARCH_SHARE, _SEARCH_SECONDS = 0.1, (4.0, 40.0)
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
    return train(
        follow_budget(config, quiet=quiet),
        callbacks=callbacks,
        trackers=trackers,
        optimizer=optimizer,
        schedule=schedule,
        data=data,
        model_factory=model_factory,
        quiet=quiet,
        handle_signals=handle_signals,
        stop_after=stop_after,
        branch=branch,
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
    plan = plan_budget(config)
    progress = Progress(enabled=is_main_process(), quiet=quiet)
    progress.banner(plan.rows())
    progress.close()
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
    progress = Progress(enabled=is_main_process() and not quiet)
    try:
        check_launch(config)  # its remark is the run's
        if config.resume is None and not restarts() and RunFolder(Path(config.output_dir)).holds_a_run():
            raise ConfigError(
                f"--output-dir {config.output_dir} already holds a run; continue it with --resume, or name "
                "another folder."
            )
        progress.note(f"--budget {config.budget}: measuring text and machine.")
        return _Decision(config).make()
    finally:
        progress.close()


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


@dataclass(frozen=True)
class _Outcome:
    """What the main process decided, for all ranks."""

    ranked: tuple[Candidate, ...]
    text: TextSize
    machine: Machine


class _Decision:
    """The main process decides; all ranks measure."""

    def __init__(self, config: PretrainConfig) -> None:
        assert config.budget is not None
        self._budget: Budget = parse_budget(config.budget)
        self._config = config
        self._kept = _kept_options(config)
        self._sample: TextSample | None = None
        self._search: Generator[Candidate, float | None, list[Candidate]] | None = None
        self._text: TextSize | None = None
        self._machine: Machine | None = None

    def make(self) -> BudgetPlan:
        """Return the plan, the same on all ranks."""
        action = self._session(128, self._first_action)
        while isinstance(action, Candidate):
            action = self._session(action.shape.hidden_size, partial(self._measured_action, action))
        return self._plan(action)

    def _session(self, hidden_size: int, work: Any) -> Candidate | _Outcome:
        """Call `work` with an Accelerator in the precision of a hidden size."""
        accelerator = start_accelerator(dataclasses.replace(self._config, **_sizes_for(hidden_size)))
        try:
            return work(accelerator)
        finally:
            close_accelerator(accelerator)

    def _first_action(self, accelerator: Accelerator) -> Candidate | _Outcome:
        machine = measure_machine(accelerator, self._config)

        def begin() -> Candidate | _Outcome:
            self._machine = machine
            sample = self._read()
            choose = "tokenizer" not in self._kept and self._config.vocab_size is None
            self._text = text_size(self._config, sample, choose_tokenizer=choose)
            chooser = Chooser(
                self._budget,
                self._text,
                machine,
                packaged_law(),
                self._kept,
                self._config.optimizer,
                self._config.activation_checkpointing,
            )
            low, high = _SEARCH_SECONDS
            seconds = min(max(_SEARCH_SHARE * (self._budget.seconds or 3600.0), low), high)
            end = time.monotonic() + seconds
            self._search = search(chooser, lambda: end - time.monotonic())
            return self._advance(None)

        return run_on_main_and_broadcast(accelerator, begin)

    def _measured_action(self, candidate: Candidate, accelerator: Accelerator) -> Candidate | _Outcome:
        seconds = measure_candidate(self._config, candidate, accelerator)
        # The slowest rank counts; one that runs out of memory counts for all.
        times = gather_object([seconds]) if accelerator.num_processes > 1 else [seconds]
        slowest = None if None in times else max(times)
        return run_on_main_and_broadcast(accelerator, partial(self._advance, slowest))

    def _advance(self, seconds: float | None) -> Candidate | _Outcome:
        assert self._search is not None
        assert self._text is not None
        assert self._machine is not None
        try:
            return self._search.send(seconds)
        except StopIteration as end:
            return _Outcome(_with_alternatives(end.value), self._text, self._machine)

    def _read(self) -> TextSample:
        if self._sample is None:
            self._sample = read_sample(self._config)
        return self._sample

    def _plan(self, outcome: _Outcome) -> BudgetPlan:
        best = outcome.ranked[0]
        options = chosen_options(
            best,
            outcome.text,
            self._budget,
            self._kept,
            optimizer=self._config.optimizer,
            processes=outcome.machine.processes,
        )
        if self._config.from_weight is not None and "learning_rate" in options:
            options["learning_rate"] *= FROM_WEIGHT_RATE
        if best.tokenizer.trained:
            options["tokenizer"] = trained_tokenizer(self._config, self._read(), best.tokenizer.vocab_size)
        if "compile" not in self._kept and outcome.machine.device == "cuda":
            alone = outcome.machine.fused and outcome.machine.processes == 1
            options["compile"] = (self._budget.seconds or best.seconds) > _COMPILE_AFTER[alone]
        if self._config.val_data:
            options.pop("val_fraction", None)
        if self._kept.get("lr_schedule", "wsd") != "wsd":
            for name in ("decay_ratio", "decay_shape"):
                options.pop(name, None)
        config = dataclasses.replace(self._config, **options, budget_keeps=BUDGET_OPTIONS)
        kept = tuple(name for name in self._config.budget_keeps if name in BUDGET_OPTIONS)
        return BudgetPlan(config, self._budget, outcome.text, outcome.machine, outcome.ranked, kept)


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
    """Return what a run trains on; every rank must call this.

    Args:
        accelerator: of the run.
        config: of the run.
    """
    device = accelerator.device
    flops = matmul_flops(device, accelerator.mixed_precision)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        limit = total * torch.cuda.get_per_process_memory_fraction(device)
        memory = float(min(free, limit))
        name = torch.cuda.get_device_name(device)
    else:
        memory = psutil.virtual_memory().available / accelerator.num_processes
        name = device.type.upper()
    facts = gather_object([(flops, memory)]) if accelerator.num_processes > 1 else [(flops, memory)]
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


def measure_candidate(config: PretrainConfig, candidate: Candidate, accelerator: Accelerator) -> float | None:
    """Return the seconds of a step of a candidate; None where it does not fit into memory.

    One micro-batch per step is measured; further ones take as long as its forward and backward pass.
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
    with tempfile.TemporaryDirectory() as folder:
        try:
            shards = random_shards(Path(folder) / "tokens", model_config.vocab_size)
            parts = build_training(inputs, shards, accelerator)
            times = measure_steps(inputs, parts, accelerator, _MEASURE_SECONDS)
        except torch.OutOfMemoryError:
            return None
        finally:
            parts = None  # type: ignore[assignment]
            gc.collect()
            if accelerator.device.type == "cuda":
                torch.cuda.empty_cache()
    micro_batches = candidate.global_batch_size / candidate.micro_batch_size / max(world_size(), 1)
    return times.step_seconds + (micro_batches - 1) * (times.forward_seconds + times.backward_seconds)
