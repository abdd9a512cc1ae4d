"""Divide the sequences of one optimizer step among processes and micro-batches."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from ..config.budget import parse_budget
from ..config.options import DEFAULT_BATCH_SIZE, PretrainConfig
from ..errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """Sizes of the global batch and of its micro-batches.

    Attributes:
        micro_batch_size: sequences in one micro-batch of one process.
        accumulation_steps: micro-batches of one process per optimizer step.
        num_processes: data-parallel world size.
    """

    micro_batch_size: int
    accumulation_steps: int
    num_processes: int

    @property
    def global_batch_size(self) -> int:
        """Sequences in one optimizer step over all processes."""
        return self.micro_batch_size * self.accumulation_steps * self.num_processes


def sequences_per_step(config: PretrainConfig, num_processes: int) -> int:
    """Return the sequences of one optimizer step over all processes.

    With `--batch-size auto` and no global batch size, the default micro-batch size counts.
    """
    if config.global_batch_size is not None:
        return config.global_batch_size
    sequences = config.batch_size if isinstance(config.batch_size, int) else DEFAULT_BATCH_SIZE
    return sequences * (config.accumulation_steps or 1) * num_processes


def candidate_micro_batches(sequences: int) -> list[int]:
    """Return divisors of the sequences of one process per step, each at least twice the previous."""
    sizes = [sequences]
    while sizes[0] > 1:
        sizes.insert(0, next(size for size in range(sizes[0] // 2, 0, -1) if sequences % size == 0))
    return sizes


def plan_batches(config: PretrainConfig, num_processes: int) -> BatchPlan:
    """Return the accumulation steps that give the global batch size; resolve `auto` first.

    Raises:
        ConfigError: when --global-batch-size is not a multiple of --batch-size times the world size; the
            message lists valid sizes.
    """
    batch_size = config.batch_size
    assert isinstance(batch_size, int), "call auto_batch_size.resolve_batch_size first"
    sequences = batch_size * num_processes
    wanted = config.global_batch_size
    if wanted is None:
        return BatchPlan(batch_size, config.accumulation_steps or 1, num_processes)
    if wanted % sequences == 0:
        return BatchPlan(batch_size, wanted // sequences, num_processes)
    below, above = wanted // sequences * sequences, math.ceil(wanted / sequences) * sequences
    globals_that_fit = " or ".join(str(size) for size in (below, above) if size)
    per_process = wanted // num_processes
    fitting = [size for size in range(1, per_process + 1) if wanted % (size * num_processes) == 0]
    if fitting:
        nearest = min(fitting, key=lambda size: abs(size - batch_size))
        micro = f", or --batch-size {nearest}"
    else:
        micro = f", or a number of processes that divides {wanted}"
    processes = "1 process" if num_processes == 1 else f"{num_processes} processes"
    raise ConfigError(
        f"--global-batch-size {wanted} is not a multiple of {sequences} sequences "
        f"(--batch-size {batch_size} x {processes}); "
        f"use --global-batch-size {globals_that_fit}{micro}."
    )


def fit_micro_batch(config: PretrainConfig, num_processes: int) -> PretrainConfig:
    """Return the configuration with the largest micro-batch, at most its own, for the same global batch.

    Raises:
        ConfigError: when the world size does not divide the global batch.
    """
    if not isinstance(config.batch_size, int):
        return config
    sequences = config.global_batch_size or config.batch_size
    share, rest = divmod(sequences, num_processes)
    if rest:
        fewer = max(number for number in range(1, num_processes) if sequences % number == 0)
        raise ConfigError(
            f"{num_processes} processes cannot share the run's global batch of {sequences} sequences; "
            f"use {fewer}."
        )
    most = min(config.batch_size, share)
    return dataclasses.replace(
        config, batch_size=max(size for size in range(1, most + 1) if share % size == 0)
    )


def count_steps(
    config: PretrainConfig,
    *,
    steps_per_epoch: int,
    tokens_per_epoch: int,
    tokens_per_step: float,
    max_tokens: float | None = None,
) -> int:
    """Return the number of optimizer steps of a run: the first of --epochs, --max-steps and --max-tokens.

    Args:
        config: holds the three limits.
        max_tokens: that of --budget, in place of --max-tokens.
        steps_per_epoch: optimizer steps in one epoch; the last may have fewer sequences.
        tokens_per_epoch: real input tokens in one epoch.
        tokens_per_step: mean real input tokens in a full step.
    """
    steps = config.max_epochs * steps_per_epoch
    if config.max_steps is not None:
        steps = min(steps, config.max_steps)
    if (limit := max_tokens or config.max_tokens) is not None:
        epochs, rest = divmod(limit, tokens_per_epoch)
        last = math.ceil(rest / tokens_per_step)
        steps = min(steps, epochs * steps_per_epoch + min(last, steps_per_epoch))
    return max(int(steps), 1)


def budget_tokens(config: PretrainConfig, flops_per_token: float) -> float | None:
    """Return the training tokens of --budget; None without one, and for a time."""
    if config.budget is None:
        return None
    budget = parse_budget(config.budget)
    return budget.tokens if budget.flops is None else max(budget.flops / flops_per_token, 1.0)


def max_training_tokens(
    config: PretrainConfig, plan: BatchPlan, tokens_per_epoch: int, mean_length: float | None = None
) -> int:
    """Return the upper limit of input tokens of a run.

    Args:
        config: holds the limits.
        plan: batches of a step.
        tokens_per_epoch: real input tokens in one epoch.
        mean_length: mean tokens of a sequence; by default sequences are full.
    """
    tokens = config.max_epochs * tokens_per_epoch
    if config.max_steps is not None:
        length = config.max_seq_len if mean_length is None else mean_length
        tokens = min(tokens, config.max_steps * plan.global_batch_size * length)
    return int(tokens if config.max_tokens is None else min(tokens, config.max_tokens))
