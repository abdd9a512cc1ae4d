"""Conflicts between options, and options that a run cannot follow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..formatting import parse_duration
from .budget import parse_budget
from .naming import flag_of, for_caller
from .schema import schema_of, suggestion


def conflicts(config: Any) -> Iterator[str]:
    """Yield a sentence for each conflict between the options of a `PretrainConfig`."""
    # Sizes that are not given come from the weights, which are compared with those given when they are read.
    if config.from_weight is None:
        yield from _size_conflicts(config)
        yield from _expert_conflicts(config)
    if config.accumulation_steps and config.global_batch_size:
        yield "--accumulation-steps and --global-batch-size both set the global batch; give only one of them."
    if config.val_data and not config.data:
        yield "--val-data needs --data; give the training data too."
    for flag, text in (("--max-time", config.max_time), ("--dist-timeout", config.dist_timeout)):
        try:
            parse_duration(text if text is not None else "1s")
        except ValueError:
            yield f"{flag} {text} is not a time; write for example 3h30m, 90m or 45s."
    yield from _budget_conflicts(config)
    if "none" in config.tracker and len(config.tracker) > 1:
        yield "--tracker none cannot be combined with another tracker; remove one of them."


def _budget_conflicts(config: Any) -> Iterator[str]:
    if config.budget is None:
        if config.budget_keeps:
            yield "--budget-keeps needs --budget; add it."
        return
    try:
        parse_budget(config.budget)
    except ValueError as error:
        yield f"--budget {error}; write one of these forms."
    for flag, value in (("--max-steps", config.max_steps), ("--max-tokens", config.max_tokens)):
        if value is not None:
            yield f"--budget and {flag} both set the length of the run; give only one of them."
    for name in sorted(set(config.budget_keeps) - schema_of(config.__class__).keys()):
        yield f"--budget-keeps {name} is not an option{suggestion(name, schema_of(config.__class__))}"


def _size_conflicts(config: Any) -> Iterator[str]:
    hidden_size, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        yield (
            f"--num-key-value-heads {kv_heads} does not divide --num-attention-heads {heads}; "
            f"use one of {_divisors(heads)}."
        )
    if config.head_dim is None and hidden_size % heads:
        yield (
            f"--hidden-size {hidden_size} is not a multiple of --num-attention-heads {heads}; "
            "change one of them or set --head-dim."
        )
    elif (config.head_dim or hidden_size // heads) % 2:
        yield "rotary position embeddings need an even head dimension; set --head-dim to an even number."


def _expert_conflicts(config: Any) -> Iterator[str]:
    experts, active = config.num_experts, config.num_experts_per_tok
    if active > experts:
        yield f"--num-experts-per-tok {active} is more than --num-experts {experts}; lower it."
    if config.use_moe:
        return
    schema = schema_of(config.__class__)
    for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
        # The files of runs contain the defaults.
        if (value := getattr(config, name)) not in (None, schema[name].fallback):
            yield f"{schema[name].flag} {value} applies to MoE models only; add --use-moe."


def _divisors(n: int) -> str:
    # Bounded, for a typing error may give a very large number.
    limit = 1000
    found = [d for d in range(1, min(n, limit) + 1) if n % d == 0]
    return ", ".join(map(str, found if n <= limit else [*found, n]))


def run_notes(config: Any, total_steps: int, steps_per_epoch: int, warmup_steps: int) -> list[str]:
    """Return a sentence for each option that does not do in this run what it says, with what happens instead.

    A default that a short run does not reach is no contradiction, and not reported.

    Args:
        config: a `PretrainConfig`.
        warmup_steps: of the learning rate, as given or by default.
    """
    notes = [
        *_limit_notes(config, total_steps, steps_per_epoch),
        *_schedule_notes(config, total_steps, warmup_steps),
        *_interval_notes(config, total_steps),
        *_unused_options(config),
    ]
    return [for_caller(note, schema_of(config.__class__)) for note in notes]


def _limit_notes(config: Any, total_steps: int, steps_per_epoch: int) -> Iterator[str]:
    """Yield which of --epochs, --max-steps and --max-tokens ends the run, if the others ask for more."""
    if config.epochs is None and total_steps > steps_per_epoch and config.max_epochs > 1:
        yield (
            f"{_limits(config)} takes {total_steps / steps_per_epoch:.3g} epochs of {steps_per_epoch:,} "
            "steps each; --epochs limits them."
        )
    if config.epochs is None or (config.max_steps is None and config.max_tokens is None):
        if None not in (config.max_tokens, config.max_steps) and config.max_steps > total_steps:
            yield (
                f"--max-tokens {config.max_tokens} ends the run after {total_steps:,} steps, before "
                f"--max-steps {config.max_steps}."
            )
        return
    in_epochs = config.epochs * steps_per_epoch
    if total_steps < in_epochs:
        yield (
            f"{_limits(config, total_steps)} ends the run after {total_steps:,} of the {in_epochs:,} steps "
            f"of --epochs {config.epochs}."
        )
    elif config.max_steps is None or config.max_steps > total_steps:
        yield (
            f"--epochs {config.epochs} ends the run after {total_steps:,} steps, before {_limits(config)}; "
            "raise it or remove it to train longer."
        )


def _limits(config: Any, total_steps: int | None = None) -> str:
    """Return the limits that are given, or the one that ends a run of `total_steps`."""
    limits = [("--max-steps", config.max_steps), ("--max-tokens", config.max_tokens)]
    if total_steps is not None and config.max_steps is not None and config.max_tokens is not None:
        limits = limits[:1] if config.max_steps == total_steps else limits[1:]
    return " or ".join(f"{flag} {value}" for flag, value in limits if value is not None)


def _schedule_notes(config: Any, total_steps: int, warmup_steps: int) -> Iterator[str]:
    """Yield how far the learning rate gets, if warm-up or decay do not fit the run."""
    given = f"--warmup-steps {warmup_steps}"
    if warmup_steps > total_steps:
        reached = total_steps / warmup_steps
        yield (
            f"{given} is longer than the run: in {total_steps:,} steps the learning rate only reaches "
            f"{reached:.1%} of its peak."
        )
    elif config.lr_schedule == "constant" or total_steps == 1:
        return
    elif warmup_steps == total_steps:
        yield f"{given} takes all {total_steps:,} steps: the learning rate reaches its peak and never decays."
    elif config.lr_schedule == "wsd":
        wanted = config.decay_steps or round(config.decay_ratio * total_steps)
        if (room := total_steps - max(warmup_steps, 1)) < wanted:
            name = "decay_ratio" if config.decay_steps is None else "decay_steps"
            yield (
                f"{flag_of(name)} {getattr(config, name)} means {wanted:,} steps of decay, but only {room:,} "
                f"follow the warm-up: the learning rate decays over {room:,}."
            )


def _interval_notes(config: Any, total_steps: int) -> Iterator[str]:
    """Yield which intervals are longer than the run."""
    schema = schema_of(config.__class__)
    consequences = {
        "save_interval": "the only checkpoint is that of the last step",
        "keep_every": "no checkpoint is kept for good",
        "eval_interval": "the only evaluations are those before the first and after the last step",
        "sample_interval": "no sample is generated",
        "score_interval": "the only scores are those after the last step",
    }
    if not config.val_data and not config.val_fraction:
        del consequences["eval_interval"]
    if config.keep_every is not None and config.keep_every <= total_steps:
        del consequences["save_interval"]
    for name, consequence in consequences.items():
        interval = getattr(config, name)
        if interval is not None and interval != schema[name].default and interval > total_steps:
            yield f"{flag_of(name)} {interval} is beyond the run of {total_steps:,} steps: {consequence}."
    if config.profile and total_steps < 10:
        yield f"--profile records steps 10 to 14, and the run has {total_steps}: nothing is recorded."


def _unused_options(config: Any) -> Iterator[str]:
    """Yield which options have no effect beside the others."""
    schema = schema_of(config.__class__)
    schedule, validated = config.lr_schedule, bool(config.val_data or config.val_fraction)
    no_validation = "there is no validation data; set --val-fraction or --val-data"
    cases = (
        (schedule != "wsd", ("decay_ratio", "decay_steps", "decay_shape"), "needs --lr-schedule wsd"),
        (schedule == "constant", ("min_lr_ratio",), "--lr-schedule constant does not decay"),
        (not validated, ("eval_interval", "eval_batches"), no_validation),
        (bool(config.val_data), ("val_fraction",), "--val-data is the validation data"),
        (config.sample_interval is None, ("sample_prompt",), "needs --sample-interval"),
    )
    for unused, names, reason in cases:
        for name in names if unused else ():
            if (value := getattr(config, name)) != schema[name].default:
                yield f"{' '.join(schema[name].spell(value))} has no effect: {reason}."
