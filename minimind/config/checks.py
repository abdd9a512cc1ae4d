"""Conflicts between options that are valid on their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..formatting import parse_duration
from .schema import schema_of


def conflicts(config: Any) -> Iterator[str]:
    """Yield a sentence for each conflict between the options of a `PretrainConfig`."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        yield (
            f"--num-key-value-heads {kv_heads} does not divide --num-attention-heads {heads}; "
            f"use one of {_divisors(heads)}."
        )
    if config.head_dim is None and config.hidden_size % heads:
        yield (
            f"--hidden-size {config.hidden_size} is not a multiple of --num-attention-heads {heads}; "
            "change one of them or set --head-dim."
        )
    elif (config.head_dim or config.hidden_size // heads) % 2:
        yield "rotary position embeddings need an even head dimension; set --head-dim to an even number."
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
    if "none" in config.tracker and len(config.tracker) > 1:
        yield "--tracker none cannot be combined with another tracker; remove one of them."


def _expert_conflicts(config: Any) -> Iterator[str]:
    if config.num_experts_per_tok > config.num_experts:
        yield (
            f"--num-experts-per-tok {config.num_experts_per_tok} is more than --num-experts "
            f"{config.num_experts}; lower it."
        )
    if config.use_moe or config.from_weight is not None:
        return
    schema = schema_of(config.__class__)
    for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
        if (value := getattr(config, name)) != schema[name].default:
            yield f"{schema[name].flag} {value} applies to MoE models only; add --use-moe."


def _divisors(n: int) -> str:
    # Bounded, for a typing error may give a very large number.
    limit = 1000
    found = [d for d in range(1, min(n, limit) + 1) if n % d == 0]
    return ", ".join(map(str, found if n <= limit else [*found, n]))
