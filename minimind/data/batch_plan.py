"""How the rows of one optimizer step are divided among processes and micro-batches."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from ..config.options import DEFAULT_BATCH_SIZE, PretrainConfig
from ..errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """The size of a step and of its parts.

    Attributes:
        micro_batch_size: rows that one process runs at once.
        accumulation_steps: micro-batches that one process runs before the optimizer steps.
        num_processes: data-parallel processes.
    """

    micro_batch_size: int
    accumulation_steps: int
    num_processes: int

    @property
    def global_batch_size(self) -> int:
        """Rows in one optimizer step over all processes."""
        return self.micro_batch_size * self.accumulation_steps * self.num_processes


def rows_of_a_step(config: PretrainConfig, num_processes: int) -> int:
    """Return the rows of one optimizer step over all processes.

    With `--batch-size auto` and no global batch they are those of the default micro-batch.
    """
    if config.global_batch_size is not None:
        return config.global_batch_size
    rows = config.batch_size if isinstance(config.batch_size, int) else DEFAULT_BATCH_SIZE
    return rows * (config.accumulation_steps or 1) * num_processes


def micro_batches_to_try(rows: int) -> list[int]:
    """Return divisors of the rows of one process in a step, from 1 to all, each at least twice the last."""
    sizes = [rows]
    while sizes[0] > 1:
        sizes.insert(0, next(size for size in range(sizes[0] // 2, 0, -1) if rows % size == 0))
    return sizes


def plan_batches(config: PretrainConfig, num_processes: int) -> BatchPlan:
    """Work out the accumulation that gives the wanted global batch; `auto` is settled before.

    Raises:
        ConfigError: when the global batch is not a multiple of the rows of one round of micro-batches;
            the message lists global batches and micro-batches that would do.
    """
    batch_size = config.batch_size
    assert isinstance(batch_size, int), "auto_batch_size.resolve_batch_size comes first"
    rows = batch_size * num_processes
    wanted = config.global_batch_size
    if wanted is None:
        return BatchPlan(batch_size, config.accumulation_steps or 1, num_processes)
    if wanted % rows == 0:
        return BatchPlan(batch_size, wanted // rows, num_processes)
    below, above = wanted // rows * rows, math.ceil(wanted / rows) * rows
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
        f"--global-batch-size {wanted} is not a multiple of {rows} rows "
        f"(--batch-size {batch_size} x {processes}); "
        f"use --global-batch-size {globals_that_fit}{micro}."
    )


def fitted_to(config: PretrainConfig, num_processes: int) -> PretrainConfig:
    """Return the configuration with the largest micro-batch, up to its own, that gives the same global batch.

    Raises:
        ConfigError: where the rows of a step cannot be shared by so many processes.
    """
    if not isinstance(config.batch_size, int):
        return config
    rows = config.global_batch_size or config.batch_size
    share, rest = divmod(rows, num_processes)
    if rest:
        fewer = max(number for number in range(1, num_processes) if rows % number == 0)
        raise ConfigError(
            f"a step of the run has {rows} rows, which {num_processes} processes cannot share equally; take "
            f"{fewer}."
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
) -> int:
    """Return the number of optimizer steps of a run: the first of --epochs, --max-steps and --max-tokens.

    Args:
        config: the limits.
        steps_per_epoch: optimizer steps in one pass, the last of which may be short.
        tokens_per_epoch: real input tokens in one pass.
        tokens_per_step: real input tokens in a full step, on average.
    """
    steps = config.max_epochs * steps_per_epoch
    if config.max_steps is not None:
        steps = min(steps, config.max_steps)
    if config.max_tokens is not None:
        epochs, rest = divmod(config.max_tokens, tokens_per_epoch)
        last = math.ceil(rest / tokens_per_step)
        steps = min(steps, epochs * steps_per_epoch + min(last, steps_per_epoch))
    return max(int(steps), 1)


def most_tokens(config: PretrainConfig, plan: BatchPlan, tokens_per_epoch: int) -> int:
    """Return the most input tokens that a run can see."""
    tokens = config.max_epochs * tokens_per_epoch
    if config.max_steps is not None:
        tokens = min(tokens, config.max_steps * plan.global_batch_size * config.max_seq_len)
    return int(tokens if config.max_tokens is None else min(tokens, config.max_tokens))
