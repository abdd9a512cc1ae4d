"""A run in a few lines: what it is, said at its start, and what came of it, said at its end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from ..data.prepare import PreparedData
from ..formatting import count, duration
from ..modeling.kernels.dispatch import unsupported_reason
from .setup import RunInputs, TrainingParts


@dataclass(frozen=True)
class PretrainResult:
    """What a run has to show.

    Attributes:
        model_dir: folder that Hugging Face transformers loads; not written by a run that was stopped early.
        steps: optimizer steps done.
        tokens: real input tokens trained.
        loss: mean training loss of the last report, in nats per token.
        val_loss: last validation loss, None without validation text.
        bits_per_byte: last validation bits per byte, None without validation text.
        tokens_per_second: speed after warm-up.
        seconds: wall time of the whole call.
        sample: a short text written by the model, empty on all processes but the main one.
        stopped: why the run ended early (`SIGTERM`, `SIGINT`, `--max-time`), None where it did not.
    """

    model_dir: Path
    steps: int
    tokens: int
    loss: float
    val_loss: float | None
    bits_per_byte: float | None
    tokens_per_second: float
    seconds: float
    sample: str
    stopped: str | None


def banner(
    inputs: RunInputs, parts: TrainingParts, data: PreparedData, accelerator: Accelerator, total_steps: int
) -> list[tuple[str, str]]:
    """Return what a run is, as pairs of a key and a value."""
    config, model_config, plan = inputs.config, inputs.model_config, parts.plan
    epochs = total_steps / parts.loader.steps_per_epoch
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    precision = {"no": "float32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    kernels = ""
    if device.type == "cuda" and parts.custom_model is None:
        reason = unsupported_reason(accelerator.mixed_precision, model_config.head_dim, config.dropout)
        kernels = f", no fused attention: {reason}" if reason else ", fused kernels"
    tokens = plan.global_batch_size * config.max_seq_len
    validation = f", {count(data.validation.num_tokens)} for validation" if data.validation else ""
    active = f" ({count(model_config.num_active_parameters())} active)" if model_config.use_moe else ""
    experts = (
        f", {model_config.num_experts} experts, {model_config.num_experts_per_tok} a token"
        if model_config.use_moe
        else ""
    )
    return [
        (
            "model",
            parts.custom_model
            or f"{count(model_config.num_parameters())} parameters{active}: "
            f"{model_config.num_hidden_layers} layers, hidden size {model_config.hidden_size}, "
            f"{model_config.num_attention_heads} heads, "
            f"{model_config.num_key_value_heads} key/value heads{experts}",
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
            f"accumulation {plan.accumulation_steps} x processes {plan.num_processes}, rows of "
            f"{config.max_seq_len})",
        ),
        (
            "device",
            f"{name} x {accelerator.num_processes}, {precision}, "
            f"{'' if parts.compiled else 'not '}compiled{kernels}",
        ),
        ("folder", config.output_dir),
    ]


def summary(
    result: PretrainResult,
    totals: dict[str, float],
    bottleneck: str,
    skipped_steps: int,
    rewinds: int = 0,
) -> list[tuple[str, str]]:
    """Return what came of a run, in rows of a key and a value."""
    if result.stopped is not None:
        end = f"stopped by {result.stopped} after step {result.steps:,}; go on with --resume"
        rows = [("end", end)]
    else:
        rows = [("model", str(result.model_dir))]
    loss = f"{result.loss:.4f}" if math.isfinite(result.loss) else "not measured"
    if result.val_loss is not None:
        loss += f", validation {result.val_loss:.4f} ({result.bits_per_byte:.4f} bits/byte)"
    phases = [
        f"{name.replace('_', ' ')} {duration(totals[name])}"
        for name in ("training", "first_steps", "data", "evaluation", "saving", "compile")
        if totals.get(name, 0.0) >= 0.5
    ]
    rows += [
        ("loss", loss),
        ("trained", f"{result.steps:,} steps, {count(result.tokens)} tokens"),
        ("speed", f"{count(result.tokens_per_second)} tokens/s"),
        ("time", f"{duration(result.seconds)}" + (f": {', '.join(phases)}" if phases else "")),
        ("bottleneck", bottleneck),
    ]
    if skipped_steps:
        rows.append(
            ("skipped", f"{skipped_steps:,} updates, for a loss or gradient that was not finite or jumped")
        )
    if rewinds:
        rows.append(
            ("rewound", f"{rewinds} times, leaving rows out; see {result.model_dir.parent / 'spikes'}")
        )
    if result.sample:
        rows.append(("sample", " ".join(result.sample.split())))
    return rows
