"""Training speed on this machine: real steps on random tokens, and the time of each phase of a step."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean

import torch
from accelerate import Accelerator

from ..config.options import PretrainConfig
from ..data.shards import random_shards
from ..distributed.accelerator import close_accelerator, shown_precision, start_accelerator
from ..errors import ConfigError
from ..formatting import count, duration
from ..modeling.config import MiniMindConfig
from ..optim.build import set_schedule
from ..training.load_balancing import expert_balance
from ..training.peak_flops import peak_flops_of
from ..training.setup import RunInputs, TrainingParts, build_training, resolve_run
from ..training.step import train_step
from ..training.step_timer import StepTimer
from ..training.throughput import memory_gb

# They compile, fill the allocator's pools and start the prefetch.
WARMUP_STEPS = 3
PARTS = ("data", "forward", "backward", "optimizer")
# Seconds. A step that would take longer, at half of the matmul speed, is measured smaller.
LONGEST_STEP = 3.0


class TooLargeError(ConfigError):
    """A step does not fit into the memory of the GPU."""


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """Mean times of one optimizer step in seconds.

    Attributes:
        data_seconds: waiting for the batch on the host.
        forward_seconds: forward passes, including the gradient of the logits.
        optimizer_seconds: clipping and updating.
        start_seconds: the first steps, which compile.
    """

    steps: int
    step_seconds: float
    data_seconds: float
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float
    start_seconds: float

    def scaled(self, work: float) -> float:
        """Return the time of a step whose micro-batches have `work` times the FLOPs of those measured.

        The optimizer's time depends on the model alone; that of Muon is large beside a small batch on a CPU.
        """
        phases = sum(getattr(self, f"{name}_seconds") for name in PARTS)
        fixed = self.step_seconds * self.optimizer_seconds / phases
        return work * (self.step_seconds - fixed) + fixed


@dataclasses.dataclass(frozen=True)
class BenchmarkResult(StepTimes):
    """Measured training speed, besides the times of a step.

    Attributes:
        batch_size: sequences per micro-batch; fewer than asked for where a step would have taken too long.
        max_seq_len: sequence length in tokens; likewise.
        reduced: whether one of the two is less than asked for.
        tokens_per_second: input tokens over all ranks, in steps of the size asked for; scaled by
            `StepTimes.scaled` where those measured are smaller.
        memory_gb: peak allocation on a GPU, else memory of the process, 10^9 bytes.
        flops_per_token: of the model at the sequence length asked for; see
            `MiniMindConfig.flops_per_token`.
        peak_flops: of all devices by their data sheet, None where unknown.
        mfu: model FLOPs as a fraction of `peak_flops`, None where unknown.
        matmul_flops: measured FLOP/s of a large square product in this precision; mean over devices.
        matmul_share: model FLOPs as a fraction of `matmul_flops` over all devices.
    """

    device: str
    processes: int
    precision: str
    compiled: bool
    optimizer: str
    parameters: int
    batch_size: int
    max_seq_len: int
    reduced: bool
    tokens_per_second: float
    memory_gb: float
    flops_per_token: int
    peak_flops: float | None
    mfu: float | None
    matmul_flops: float
    matmul_share: float

    def rows(self) -> list[tuple[str, str]]:
        """Return the result as pairs of a key and a value."""
        precision = {"no": "float32"}.get(self.precision, self.precision)
        parts = [f"{name} {getattr(self, name + '_seconds') * 1e3:.1f} ms" for name in PARTS]
        reduced = ", less than asked for, which would take too long here" if self.reduced else ""
        steps = f"{self.steps} step{'s' * (self.steps > 1)}"
        how = f"for the size asked for, scaled from {steps}" if self.reduced else f"({steps})"
        return [
            ("model", f"{count(self.parameters)} parameters, {count(self.flops_per_token)} FLOP per token"),
            ("device", f"{self.device} x {self.processes}, {precision}"),
            ("step", f"{self.batch_size} sequences x {self.max_seq_len} tokens per micro-batch{reduced}"),
            ("speed", f"{count(self.tokens_per_second)} tokens/s {how}"),
            *([] if self.mfu is None else [("MFU", f"{self.mfu:.1%}")]),
            (
                "matmul",
                f"{count(self.matmul_flops)}FLOP/s measured; training uses {self.matmul_share:.1%} of it",
            ),
            ("time", f"{self.step_seconds * 1e3:.1f} ms per step: {', '.join(parts)}"),
            ("memory", f"{self.memory_gb:.2f} GB"),
            ("start", f"{duration(self.start_seconds)}{' with compilation' if self.compiled else ''}"),
        ]


def benchmark(config: PretrainConfig, seconds: float = 10.0) -> BenchmarkResult:
    """Train on random tokens for a while and measure.

    Nothing stays on the disk. Under `accelerate launch` every rank calls this.

    Args:
        config: of the run to measure; data, output and limits have no effect.
        seconds: how long to measure whole steps; their phases take half of that in addition.

    Raises:
        ConfigError: for options or a launch that a run cannot use.
        TooLargeError: for a step that does not fit into the memory of the GPU.
    """
    options = resolve_run(config)
    with ExitStack() as closing:
        folder = Path(closing.enter_context(tempfile.TemporaryDirectory()))
        accelerator = start_accelerator(options.config)
        closing.callback(close_accelerator, accelerator)
        device, processes = accelerator.device, accelerator.num_processes
        # The mean, so that all ranks choose the same size of a step.
        matmul = _mean(matmul_flops(device, accelerator.mixed_precision), accelerator)
        wanted = options.with_batch_size(accelerator)
        if device.type == "cuda":
            # The matrices of the product are larger than a small model.
            torch.cuda.reset_peak_memory_stats(device)
        inputs = _shortened(wanted, matmul)
        sequences, length = _size(inputs)
        try:
            shards = random_shards(
                folder / f"tokens-{accelerator.process_index}", inputs.model_config.vocab_size
            )
            parts = build_training(inputs, shards, accelerator)
            closing.callback(parts.release)
            times = measure_steps(inputs, parts, accelerator, seconds)
        except torch.OutOfMemoryError as error:
            raise TooLargeError(
                f"--batch-size {sequences} with --max-seq-len {length} does not fit into the memory of the "
                "GPU; lower one of them."
            ) from error
        model_config = inputs.model_config
        wanted_sequences, wanted_length = _size(wanted)
        asked = micro_batch_flops(model_config, wanted_sequences, wanted_length)
        work = asked / micro_batch_flops(model_config, sequences, length)
        tokens = parts.plan.global_batch_size * wanted_length * wanted_sequences / sequences
        speed = tokens / times.scaled(work)
        achieved = speed * model_config.flops_per_token(wanted_length)
        peak = peak_flops_of(device)
        return BenchmarkResult(
            **dataclasses.asdict(times),
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper(),
            processes=processes,
            precision=shown_precision(config, accelerator),
            compiled=parts.compiled,
            optimizer=inputs.config.optimizer,
            parameters=model_config.num_parameters(),
            batch_size=sequences,
            max_seq_len=length,
            reduced=_size(wanted) != (sequences, length),
            tokens_per_second=speed,
            memory_gb=memory_gb(device),
            flops_per_token=model_config.flops_per_token(wanted_length),
            peak_flops=None if peak is None else peak * processes,
            mfu=None if peak is None else achieved / (peak * processes),
            matmul_flops=matmul,
            matmul_share=achieved / (matmul * processes),
        )


def micro_batch_flops(model_config: MiniMindConfig, sequences: int, length: int) -> int:
    """Return the FLOPs of a micro-batch of full sequences, forward and backward."""
    return sequences * length * model_config.flops_per_token(length)


def matmul_flops(device: torch.device, precision: str) -> float:
    """Return the FLOP/s of a large square matrix product, the best of several.

    Args:
        precision: `no` (float32 as PyTorch is set), `bf16` or `fp16`.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timer = StepTimer(device)
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or (len(times) < 20 and time.perf_counter() - began < 1.0):
        timer.start()
        a @ b
        timer.mark("product")
        times.append(timer.seconds()["product"][-1])
    return 2 * size**3 / min(times)


def measure_steps(
    inputs: RunInputs, parts: TrainingParts, accelerator: Accelerator, seconds: float
) -> StepTimes:
    """Train for a while and return the times of a step.

    A step that takes long (uncompiled, on a CPU) is measured once, with its phases.

    Args:
        seconds: how long to measure whole steps.
    """
    config = inputs.config
    parts.model.train()
    set_schedule(parts.optimizer, config.peak_learning_rate)
    # All steps have the same shapes.
    batches = parts.loader.steps(0, epochs=None)
    clock = StepTimer(accelerator.device)

    def step(timer: StepTimer | None = None) -> float:
        """Take a step and return how long its batch took."""
        began = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - began
        train_step(
            parts.model,
            parts.optimizer,
            batch,
            accelerator,
            grad_clip=config.grad_clip,
            balance=expert_balance(accelerator, inputs.model_config),
            graphs=parts.graphs,
            timer=timer,
        )
        return waited

    def timed(steps: int) -> float:
        """Return the mean time of some steps, the same on all ranks, so that they take as many."""
        began = clock.synchronize()
        for _ in range(steps):
            step()
        return max(_mean((clock.synchronize() - began) / steps, accelerator), 1e-9)

    began = clock.synchronize()
    # The first step is not typical where it compiles, or on a GPU, for which kernels are built.
    first = timed(1)
    long = not parts.compiled and accelerator.device.type != "cuda" and first > LONGEST_STEP
    for _ in range(0 if long else WARMUP_STEPS - 1):
        step()
    start_seconds = clock.synchronize() - began

    if long:
        steps = rounds = max(round(seconds / first), 1)
    else:
        steps = max(round(seconds / max(timed(1), 1e-4)), 2)
        step_seconds = timed(steps)
        rounds = max(round(seconds / 2 / step_seconds), 2)
    timer = StepTimer(accelerator.device)
    waits = [step(timer) for _ in range(rounds)]
    phases = timer.seconds()
    micro_batches = accelerator.gradient_accumulation_steps
    data, optimizer = fmean(waits), fmean(phases["optimizer"])
    forward, backward = (fmean(phases[name]) * micro_batches for name in ("forward", "backward"))
    if long:
        # There is no time for whole steps besides.
        step_seconds = data + forward + backward + optimizer
    return StepTimes(steps, step_seconds, data, forward, backward, optimizer, start_seconds)


def _shortened(inputs: RunInputs, matmul: float) -> RunInputs:
    """Return the inputs with fewer sequences, then shorter ones, where a step would take too long."""
    config = inputs.config
    (sequences, length) = wanted = _size(inputs)

    def too_long() -> bool:
        flops = micro_batch_flops(inputs.model_config, sequences, length)
        return (config.accumulation_steps or 1) * flops > LONGEST_STEP * 0.5 * matmul

    while sequences > 1 and too_long():
        sequences = -(-sequences // 2)
    while length > 64 and too_long():
        length = max(length // 2, 64)
    if (sequences, length) == wanted:
        return inputs
    # A global batch would bring the sequences back as accumulation.
    smaller = dataclasses.replace(config, batch_size=sequences, max_seq_len=length, global_batch_size=None)
    return dataclasses.replace(inputs, config=smaller)


def _size(inputs: RunInputs) -> tuple[int, int]:
    """Return the sequences of a micro-batch and their length."""
    assert isinstance(inputs.config.batch_size, int)
    return inputs.config.batch_size, inputs.config.max_seq_len


def _mean(value: float, accelerator: Accelerator) -> float:
    """Return the mean of a number over all ranks."""
    number = torch.tensor([value], dtype=torch.float32, device=accelerator.device)
    return float(accelerator.reduce(number, reduction="mean"))
