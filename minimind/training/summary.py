"""The banner at the start of a run and the summary at its end."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..config.options import CONFIG_SECTIONS, PretrainConfig
from ..config.schema import schema_of
from ..data.prepare import PreparedData
from ..distributed.accelerator import shown_precision
from ..formats.model_card import model_card
from ..formatting import count, duration, option_text
from ..launch_env import is_main_process, resume_command
from ..modeling.kernels.dispatch import unsupported_reason
from ..modeling.transformers_config import TransformersConfig
from ..run_folder import RunFolder
from ..tracking.environment import describe_launch
from ..tracking.metrics_file import read_metrics
from ..tracking.report_page import RunFacts
from .result import History, PretrainResult
from .setup import RunInputs, TrainingParts
from .trainer import Trainer


def banner(
    inputs: RunInputs, parts: TrainingParts, data: PreparedData, accelerator: Accelerator, total_steps: int
) -> list[tuple[str, str]]:
    """Return what a run is, as pairs of a key and a value."""
    config, model_config, plan = inputs.config, inputs.model_config, parts.plan
    epochs = total_steps / parts.loader.steps_per_epoch
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    precision = shown_precision(config, accelerator)
    precision = {"no": "float32"}.get(precision, precision)
    kernels = ""
    own = parts.custom_model is None and not isinstance(model_config, TransformersConfig)
    if device.type == "cuda" and own:
        reason = unsupported_reason(accelerator.mixed_precision, model_config.head_dim, config.dropout)
        kernels = f", no fused attention: {reason}" if reason else ", fused kernels"
    tokens = plan.global_batch_size * config.max_seq_len
    validation = f", {count(data.validation.num_tokens)} for validation" if data.validation else ""
    architecture = active = experts = heads = ""
    if model_config.use_moe:
        active = f" ({count(model_config.num_active_parameters())} active)"
        experts = f", {model_config.num_experts} experts, {model_config.num_experts_per_tok} a token"
    if isinstance(model_config, TransformersConfig):
        architecture = f"{model_config.architecture} of transformers, "
    if model_config.num_attention_heads is not None:
        heads = (
            f", {model_config.num_attention_heads} heads, {model_config.num_key_value_heads} key/value heads"
        )
    return [
        (
            "model",
            parts.custom_model
            or f"{count(model_config.num_parameters())} parameters{active}: {architecture}"
            f"{model_config.num_hidden_layers} layers, hidden size {model_config.hidden_size}"
            f"{heads}{experts}",
        ),
        (
            "data",
            f"{count(data.train.num_tokens)} tokens in {data.train.num_documents:,} documents{validation}",
        ),
        *(
            (
                "mixture",
                f"{entry.name}: {entry.weight:.1%} of the tokens, {entry.passes * epochs:.3g} of its epochs",
            )
            for entry in data.report.mixture
        ),
        (
            "steps",
            f"{total_steps:,} of up to {count(tokens)} tokens (micro-batch {plan.micro_batch_size} x "
            f"accumulation {plan.accumulation_steps} x processes {plan.num_processes}, sequences "
            f"of {config.max_seq_len} tokens)",
        ),
        (
            "optimizer",
            f"{parts.custom_names['optimizer'] or config.optimizer}, learning rate "
            f"{config.peak_learning_rate:g}, weight decay {config.matrix_weight_decay:g}",
        ),
        (
            "device",
            f"{name} x {accelerator.num_processes}, {precision}, "
            f"{'' if parts.compiled else 'not '}compiled{kernels}",
        ),
        ("folder", config.output_dir),
    ]


def run_facts(
    config: PretrainConfig,
    folder: RunFolder,
    rows: list[tuple[str, str]],
    data: PreparedData,
    environment: Mapping[str, Any],
    total_steps: int,
) -> RunFacts:
    """Return what report.html shows of a run from its start; `rows` are those of the banner."""
    defaults = PretrainConfig()  # sizes filled in
    options = {
        section.__doc__ or section.__name__: [
            (field.flag, option_text(getattr(config, name)), getattr(config, name) == getattr(defaults, name))
            for name, field in schema_of(section).items()
        ]
        for section in CONFIG_SECTIONS
    }
    name = config.run_name or folder.path.resolve().name
    return RunFacts(name, total_steps, rows, data.report.lines(), options, environment)


def finished_result(folder: RunFolder, state: dict[str, Any], seconds: float) -> PretrainResult:
    """Return the result of a run that has nothing left to train."""
    last: dict[str, Any] = {}
    lines = read_metrics(folder.metrics)
    for line in lines:
        last |= {name: value for name, value in line.items() if value is not None}
    return PretrainResult(
        model_dir=folder.model,
        steps=state["step"],
        tokens=state["tokens"],
        loss=last.get("loss", math.nan),
        val_loss=last.get("val_loss"),
        bits_per_byte=last.get("val_bits_per_byte"),
        tokens_per_second=last.get("total_tokens_per_second", 0.0),
        seconds=seconds,
        sample="",
        stopped=None,
        history=History.of(lines) if is_main_process() else History(),
    )


def card_of_run(trainer: Trainer, custom_model: str | None) -> str:
    """Return the model card of a run that ends now; `custom_model` describes a model that is not ours."""
    state, reports = trainer.state, trainer.reports
    numbers = {"tokens": state.tokens, "step": state.step, "loss": reports.last_loss}
    if (result := reports.last_evaluation) is not None:
        numbers |= {"val_loss": result.loss, "val_bits_per_byte": result.bits_per_byte}
    return model_card(
        custom_model or trainer.model_config, settings=trainer.checkpointer.settings, numbers=numbers
    )


def summarize(
    trainer: Trainer, parts: TrainingParts, folder: RunFolder, started: float, sample: str
) -> PretrainResult:
    """Log the totals, show a summary and how to resume a stopped run, and return the result."""
    state, totals = trainer.state, trainer.meter.totals()
    trainer.outputs.trackers.log({f"total_{name}": value for name, value in totals.items()}, state.step)
    evaluation = trainer.reports.last_evaluation
    result = PretrainResult(
        model_dir=folder.model,
        steps=state.step,
        tokens=state.tokens,
        loss=trainer.reports.last_loss,
        val_loss=evaluation.loss if evaluation else None,
        bits_per_byte=evaluation.bits_per_byte if evaluation else None,
        tokens_per_second=totals["tokens_per_second"],
        seconds=time.monotonic() - started,
        sample=sample,
        stopped=_stop_reason(trainer) if state.stopping else None,
        history=_history(trainer),
    )
    page = _finish_report(trainer)
    bottleneck = trainer.meter.bottleneck(compiled=parts.compiled)
    rows = summary_rows(result, totals, bottleneck, state.skipped_steps, state.rewinds, page)
    trainer.progress.summary(rows)
    if result.stopped is not None:
        precision = shown_precision(trainer.config, trainer.accelerator)
        launch = describe_launch(trainer.accelerator, precision=precision, compiled=parts.compiled)
        command = resume_command(folder.path, launch)
        if parts.custom_model is not None:
            command = "pretrain() with the same arguments and resume='auto'"
        trainer.progress.note(f"Resume with:\n{command}")
    return result


def _history(trainer: Trainer) -> History:
    """Return the history of the run, read on the main process."""
    if not trainer.accelerator.is_main_process:
        return History()
    with suppress(OSError):
        trainer.outputs.trackers.flush()
        return History.of(read_metrics(trainer.outputs.metrics_path))
    return History()


def _finish_report(trainer: Trainer) -> Path | None:
    """Write report.html with everything that was logged, and return its path."""
    if trainer.outputs.report is None:
        return None
    with suppress(OSError):  # the tracker warns of a full disk
        trainer.outputs.trackers.flush()
    if trainer.state.stopping:
        return trainer.outputs.report.finish(f"Stopped by {_stop_reason(trainer)}.", problem=True)
    return trainer.outputs.report.finish("The model is saved.")


def _stop_reason(trainer: Trainer) -> str:
    if trainer.stop.reason is not None:
        return trainer.stop.reason
    return "the step asked for" if trainer.state.step == trainer.stop_after else "another process"


def summary_rows(
    result: PretrainResult,
    totals: dict[str, float],
    bottleneck: str | None,
    skipped_steps: int,
    rewinds: int = 0,
    report: Path | None = None,
) -> list[tuple[str, str]]:
    """Return the result of a run as pairs of a key and a value."""
    if result.stopped is not None:
        rows = [("end", f"stopped by {result.stopped} after step {result.steps:,}, checkpoint saved")]
    else:
        rows = [("model", str(result.model_dir))]
    losses = [f"{result.loss:.4f}"] if math.isfinite(result.loss) else []
    if result.val_loss is not None:
        losses.append(f"validation {result.val_loss:.4f} ({result.bits_per_byte:.4f} bits/byte)")
    phases = [
        f"{name.replace('_', ' ')} {duration(totals[name])}"
        for name in ("training", "first_steps", "data", "evaluation", "saving", "compile")
        if totals.get(name, 0.0) >= 0.5
    ]
    rows += [
        *([("loss", ", ".join(losses))] if losses else []),
        ("trained", f"{result.steps:,} steps, {count(result.tokens)} tokens"),
        ("speed", f"{count(result.tokens_per_second)} tokens/s"),
        ("time", f"{duration(result.seconds)}" + (f": {', '.join(phases)}" if phases else "")),
        *([("bottleneck", bottleneck)] if bottleneck else []),
    ]
    if skipped_steps:
        rows.append(
            ("skipped", f"{skipped_steps:,} updates, for a loss or gradient that was not finite or jumped")
        )
    if rewinds:
        rows.append(
            ("rewound", f"{rewinds} times, excluding sequences; see {result.model_dir.parent / 'spikes'}")
        )
    if report is not None:
        rows.append(("report", str(report)))
    if result.sample:
        rows.append(("sample", " ".join(result.sample.split())))
    return rows
