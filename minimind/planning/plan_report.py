"""The plan of a run as values and as lines: sizes, memory, time, cost and disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.options import PretrainConfig
from ..data.batch_plan import BatchPlan
from ..data.prepare import PreparedData
from ..formatting import count, duration, size
from .benchmark import BenchmarkResult
from .memory import MemoryEstimate
from .scaled_run import ScaledRun


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run. Sizes are in bytes, times in seconds.

    Attributes:
        config: the options, with all sizes of the model filled in.
        batches: batches of a step.
        parts: parameters by part; a tied LM head has none.
        flops_per_token: of the model; see `MiniMindConfig.flops_per_token`.
        data: the tokenized data.
        tokens_per_epoch: input tokens of an epoch, without padding.
        first_step: the step that --resume continues from, else 0.
        total_tokens: input tokens of the whole run, about.
        cache_folder: of the token cache.
        cache_bytes: its size, about.
        memory: the estimate for one GPU.
        device_memory: of one GPU, None without one.
        measured: benchmark of a few steps, None where they do not fit into the GPU.
        step_seconds: of a full step, None where nothing was measured.
        evaluation_seconds: of all evaluations together, about; likewise None.
        checkpoint_bytes: of one checkpoint.
        disk_bytes: peak size of all checkpoints, and the model.
        disk_free: free space of the output folder's disk.
        price_per_hour: of all machines together, None where not given.
        scaled: the prediction for more GPUs, None where not asked for.
        problems: sentences about what would go wrong.
    """

    config: PretrainConfig
    batches: BatchPlan
    parts: dict[str, int]
    flops_per_token: int
    data: PreparedData
    tokens_per_epoch: int
    steps_per_epoch: int
    first_step: int
    total_steps: int
    total_tokens: int
    cache_folder: Path
    cache_bytes: int
    memory: MemoryEstimate
    device_memory: int | None
    measured: BenchmarkResult | None
    step_seconds: float | None
    evaluation_seconds: float | None
    checkpoint_bytes: int
    disk_bytes: int
    disk_free: int
    price_per_hour: float | None
    scaled: ScaledRun | None
    problems: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """All parameters."""
        return sum(self.parts.values())

    @property
    def seconds(self) -> float | None:
        """The time from start to final model, None where nothing was measured."""
        if self.measured is None or self.step_seconds is None or self.evaluation_seconds is None:
            return None
        steps = self.total_steps - self.first_step
        return self.measured.start_seconds + steps * self.step_seconds + self.evaluation_seconds

    @property
    def cost(self) -> float | None:
        """The cost of the run in the currency of the price, None without price or measurement.

        Where more GPUs were asked for, the price is theirs, and the run is the one with DDP.
        """
        seconds, price = self.seconds, self.price_per_hour
        if self.scaled is not None:
            seconds = self.scaled.seconds("DDP")
        return None if seconds is None or price is None else seconds / 3600 * price

    @property
    def measured_memory(self) -> int | None:
        """The measured peak on a GPU, None where the steps were smaller than those of the run."""
        if self.measured is None or self.measured.reduced or self.device_memory is None:
            return None
        return round(self.measured.memory_gb * 1e9)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        memory = self.memory
        return {
            "parameters": {"all": self.parameters, **self.parts},
            "flops_per_token": self.flops_per_token,
            "processes": self.batches.num_processes,
            "micro_batch_size": self.batches.micro_batch_size,
            "accumulation_steps": self.batches.accumulation_steps,
            "max_seq_len": self.config.max_seq_len,
            "documents": self.data.train.num_documents,
            "data_fingerprint": self.data.fingerprint,
            "tokens_per_epoch": self.tokens_per_epoch,
            "steps_per_epoch": self.steps_per_epoch,
            "first_step": self.first_step,
            "total_steps": self.total_steps,
            "total_tokens": self.total_tokens,
            "total_flops": self.flops_per_token * self.total_tokens,
            "cache_folder": str(self.cache_folder),
            "cache_bytes": self.cache_bytes,
            "cache_built_now": self.data.built,
            "memory_bytes": {**dataclasses.asdict(memory), "peak": memory.peak},
            "memory_measured_bytes": self.measured_memory,
            "device_memory_bytes": self.device_memory,
            "step_seconds": self.step_seconds,
            "evaluation_seconds": self.evaluation_seconds,
            "seconds": self.seconds,
            "mfu": None if self.measured is None else self.measured.mfu,
            "price_per_hour": self.price_per_hour,
            "cost": self.cost,
            "scaled": None if self.scaled is None else self.scaled.to_dict(),
            "checkpoint_bytes": self.checkpoint_bytes,
            "disk_bytes": self.disk_bytes,
            "disk_free_bytes": self.disk_free,
            "problems": list(self.problems),
            "measured": None if self.measured is None else dataclasses.asdict(self.measured),
        }

    def rows(self) -> list[tuple[str, str]]:
        """Return the plan as pairs of a key and a value."""
        rows = [*self._sizes(), *self._memory_rows(), *self._time_rows(), *self._disk_rows()]
        if self.scaled is not None:
            rows += self.scaled.rows()
        if self.cost is not None:
            which = " with DDP" if self.scaled is not None else ""
            rows.append(("cost", f"{self.cost:,.2f} at {self.price_per_hour:g} per hour{which}"))
        return rows

    def _sizes(self) -> Iterator[tuple[str, str]]:
        tied = " (tied)" if self.config.tie_word_embeddings else ""
        parts = [
            f"{part} {count(number)}" + (tied if part == "head" else "")
            for part, number in self.parts.items()
        ]
        yield "model", f"{count(self.parameters)} parameters: {', '.join(parts)}"
        total = self.flops_per_token * self.total_tokens
        yield "arithmetic", f"{count(self.flops_per_token)} FLOP per token, {count(total)} FLOP in total"
        data = self.data
        validation = f", {count(data.validation.num_tokens)} for validation" if data.validation else ""
        yield (
            "data",
            f"{count(self.tokens_per_epoch)} tokens per epoch in {data.train.num_documents:,} documents"
            f"{validation}",
        )
        how = "tokenized now" if data.built else "found"
        yield "cache", f"{size(self.cache_bytes)} in {self.cache_folder}, {how}; the run will use it"
        b = self.batches
        length = self.config.max_seq_len
        yield (
            "step",
            f"{count(b.global_batch_size * length)} tokens (micro-batch {b.micro_batch_size} x accumulation "
            f"{b.accumulation_steps} x processes {b.num_processes}, sequences of {length} tokens)",
        )
        epochs = self.total_tokens / max(self.tokens_per_epoch, 1)
        left = f", {self.total_steps - self.first_step:,} of them left" if self.first_step else ""
        yield (
            "run",
            f"{self.total_steps:,} steps{left}, {count(self.total_tokens)} tokens, {epochs:.3g} epochs, "
            f"{self.total_tokens / self.parameters:.3g} tokens per parameter",
        )
        config = self.config
        rates = f"learning rate {config.peak_learning_rate:g}, weight decay {config.matrix_weight_decay:g}"
        yield "optimizer", f"{config.optimizer}, {rates}"

    def _memory_rows(self) -> Iterator[tuple[str, str]]:
        m = self.memory
        yield (
            "memory",
            f"estimate {size(m.peak)} at the peak: weights {size(m.weights + m.weight_copies)}, gradients "
            f"{size(m.gradients)}, optimizer {size(m.optimizer)}, activations {size(m.activations)}, "
            f"working space {size(max(m.working, m.optimizer_working))}",
        )
        if self.device_memory is None:
            return
        measured = self.measured_memory
        said = "" if measured is None else f"measured {size(measured)}, "
        yield "", f"{said}of {size(self.device_memory)} on the GPU"

    def _time_rows(self) -> Iterator[tuple[str, str]]:
        measured, seconds = self.measured, self.seconds
        if measured is None or seconds is None or self.step_seconds is None:
            yield "time", "unknown: a step does not fit into the memory of the GPU"
            return
        tokens = self.batches.global_batch_size * self.config.max_seq_len
        how = f"{measured.steps} steps measured on {measured.device} x {measured.processes}"
        if measured.reduced:
            how += f", of {measured.batch_size} sequences of {measured.max_seq_len} tokens and scaled up"
        step = self.step_seconds
        time = f"{step:.3g} s" if step >= 1 else f"{step * 1e3:.3g} ms"
        yield "speed", f"{count(tokens / step)} tokens/s, {time} per step ({how})"
        if measured.mfu is not None:
            yield "MFU", f"{measured.mfu:.1%} of the peak FLOP/s"
        parts = f"steps {duration((self.total_steps - self.first_step) * self.step_seconds)}"
        parts += f", evaluations {duration(self.evaluation_seconds or 0.0)}"
        parts += f", start {duration(measured.start_seconds)}"
        yield "time", f"{duration(seconds)}: {parts}"

    def _disk_rows(self) -> Iterator[tuple[str, str]]:
        yield (
            "disk",
            f"{size(self.disk_bytes)} for checkpoints of {size(self.checkpoint_bytes)} and the model, "
            f"{size(self.disk_free)} free in {self.config.output_dir}",
        )
