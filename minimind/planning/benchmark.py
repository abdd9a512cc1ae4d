"""How fast this machine trains a model: real steps on made-up tokens, and where the time of a step goes."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator

from ..config.options import AUTO, PretrainConfig
from ..data.batch_plan import BatchPlan, plan_batches
from ..data.loader import Loader, StepBatch
from ..data.random_tokens import random_shards
from ..distributed.accelerator import check_launch, close_accelerator, start_accelerator
from ..distributed.shutdown import StopRequest
from ..errors import ConfigError
from ..formats.open_model import training_tokenizer
from ..formatting import count, duration
from ..modeling.config import MiniMindConfig
from ..optim.build import set_learning_rate, skip_if_nonfinite
from ..run_folder import RunFolder
from ..tracking.console import Progress
from ..tracking.trackers import Trackers
from ..training.auto_batch_size import resolve_batch_size
from ..training.build_model import resolve_model_config
from ..training.load_balancing import ExpertBalance
from ..training.peak_flops import peak_flops_of
from ..training.prepared_model import compile_and_wrap, pass_graph
from ..training.throughput import Meter
from ..training.trainer import Run, TrainState, clip_gradient, forward_loss, train_step

# Compile, fill the allocator's pools, start the prefetch.
WARMUP_STEPS = 3
PARTS = ("data", "forward", "backward", "optimizer")
# A step is made smaller where it would take longer than this, by a guess of half of the matmul speed.
LONGEST_STEP = 3.0


class TooLargeError(ConfigError):
    """A step that does not fit into the memory of the GPU."""


@dataclasses.dataclass(frozen=True)
class BenchmarkResult:
    """What was measured.

    Attributes:
        device: its name.
        processes: how many trained together.
        precision: of the matrix products.
        compiled: whether the model was.
        optimizer: its name.
        parameters: of the model.
        batch_size: rows of a micro-batch; less than asked for where a step would have taken too long.
        max_seq_len: tokens of a row; likewise.
        reduced: whether one of the two is less than asked for.
        steps: measured.
        step_seconds: mean time of a whole step, as it was measured.
        tokens_per_second: input tokens over all processes, in steps of the size asked for; where those
            measured are smaller, worked out by `seconds_of_step`.
        data_seconds: of a step, waiting for rows on the host.
        forward_seconds: of a step, in forward passes; the gradient of the logits is made there too.
        backward_seconds: of a step, in backward passes.
        optimizer_seconds: of a step, clipping and updating.
        start_seconds: the first steps, which compile.
        memory_gb: the most allocated on a GPU, else the memory of the process, 10^9 bytes.
        flops_per_token: arithmetic of the model in rows of the length asked for; see
            `MiniMindConfig.flops_per_token`.
        peak_flops: of the devices together by the maker's word, None where it is not known.
        mfu: share of `peak_flops` that the model's arithmetic makes up, None where that is not known.
        matmul_flops: of a large square product in this precision, measured; the mean over devices.
        matmul_share: share of `matmul_flops`, over all devices, that the model's arithmetic makes up.
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
    steps: int
    step_seconds: float
    tokens_per_second: float
    data_seconds: float
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float
    start_seconds: float
    memory_gb: float
    flops_per_token: int
    peak_flops: float | None
    mfu: float | None
    matmul_flops: float
    matmul_share: float

    def rows(self) -> list[tuple[str, str]]:
        """Return the result in rows of a key and a value."""
        precision = {"no": "float32"}.get(self.precision, self.precision)
        parts = [f"{name} {getattr(self, name + '_seconds') * 1e3:.1f} ms" for name in PARTS]
        peak = "the peak of this device is not known" if self.mfu is None else f"{self.mfu:.1%}"
        reduced = ", less than asked for, which would take long here" if self.reduced else ""
        steps = f"{self.steps} step{'s' * (self.steps > 1)}"
        how = f"for the size asked for, worked out from {steps}" if self.reduced else f"({steps})"
        return [
            ("model", f"{count(self.parameters)} parameters, {count(self.flops_per_token)} FLOP a token"),
            ("device", f"{self.device} x {self.processes}, {precision}"),
            ("step", f"{self.batch_size} rows of {self.max_seq_len} a micro-batch{reduced}"),
            ("speed", f"{count(self.tokens_per_second)} tokens/s {how}"),
            ("MFU", peak),
            (
                "matmul",
                f"{count(self.matmul_flops)}FLOP/s measured; training uses {self.matmul_share:.1%} of it",
            ),
            ("time", f"{self.step_seconds * 1e3:.1f} ms a step: {', '.join(parts)}"),
            ("memory", f"{self.memory_gb:.2f} GB"),
            ("start", f"{duration(self.start_seconds)}{' with compilation' if self.compiled else ''}"),
        ]


def benchmark(config: PretrainConfig, seconds: float = 10.0) -> BenchmarkResult:
    """Train on made-up tokens for a while and measure.

    Nothing is left on the disk. Under `accelerate launch` every process calls this.

    Args:
        config: of the run to be measured; data, output and limits play no part.
        seconds: how long to measure whole steps; their parts take half of that besides.

    Raises:
        ConfigError: for wrong options, and a launch that would go wrong silently.
        TooLargeError: for a step that does not fit into the memory of the GPU.
    """
    check_launch(config)
    tokenizer = training_tokenizer(config.tokenizer, config.from_weight)[0]
    config, shape = resolve_model_config(config, tokenizer)
    with ExitStack() as closing:
        folder = Path(closing.enter_context(tempfile.TemporaryDirectory()))
        accelerator = start_accelerator(config)
        closing.callback(close_accelerator, accelerator)
        # The mean, for all processes have to come to the same size of a step.
        matmul = _mean(matmul_flops(accelerator.device, accelerator.mixed_precision), accelerator)
        config = resolve_batch_size(config, shape, accelerator, partial(compile_and_wrap, config, shape))
        if accelerator.device.type == "cuda":
            # The product's own matrices are larger than a small model.
            torch.cuda.reset_peak_memory_stats(accelerator.device)
        wanted = config
        config = _shortened(config, shape, matmul)
        config = dataclasses.replace(config, output_dir=str(folder / "run"), tracker=("none",))
        plan = plan_batches(config, accelerator.num_processes)
        try:
            run, compiled = _make_run(config, shape, plan, accelerator, folder, tokenizer.pad_token_id)
            closing.callback(run.trackers.close)
            measured = _measure(run, seconds, compiled=compiled)
        except torch.OutOfMemoryError as error:
            raise TooLargeError(
                f"--batch-size {config.batch_size} with --max-seq-len {config.max_seq_len} does not fit into "
                "the memory of the GPU; lower one of them."
            ) from error
        device, processes = accelerator.device, accelerator.num_processes
        length = wanted.max_seq_len
        wanted_work, work = (micro_batch_flops(shape, _rows(c), c.max_seq_len) for c in (wanted, config))
        tokens = plan.global_batch_size * length * _rows(wanted) / _rows(config)
        speed = tokens / seconds_of_step(measured, wanted_work / work)
        achieved = speed * shape.flops_per_token(length)
        peak = peak_flops_of(device)
        return BenchmarkResult(
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper(),
            processes=processes,
            precision=accelerator.mixed_precision,
            compiled=compiled,
            optimizer=config.optimizer,
            parameters=shape.num_parameters(),
            batch_size=plan.micro_batch_size,
            max_seq_len=config.max_seq_len,
            reduced=(wanted.batch_size, length) != (config.batch_size, config.max_seq_len),
            tokens_per_second=speed,
            memory_gb=run.meter.report(0)["memory_gb"],
            flops_per_token=shape.flops_per_token(length),
            peak_flops=None if peak is None else peak * processes,
            mfu=None if peak is None else achieved / (peak * processes),
            matmul_flops=matmul,
            matmul_share=achieved / (matmul * processes),
            **measured,
        )


def seconds_of_step(measured: Mapping[str, Any], work: float) -> float:
    """Return the time of a step whose rows are `work` times the arithmetic of those measured.

    The optimizer takes as long as ever: what it does depends on the model alone, and what Muon does is much
    beside a few rows on a CPU.

    Args:
        measured: the times of a `BenchmarkResult` by their names.
        work: a ratio; 1 gives `step_seconds`.
    """
    parts = sum(measured[f"{name}_seconds"] for name in PARTS)
    fixed = measured["step_seconds"] * measured["optimizer_seconds"] / parts
    return work * (measured["step_seconds"] - fixed) + fixed


def micro_batch_flops(shape: MiniMindConfig, rows: int, length: int) -> int:
    """Return the arithmetic of a micro-batch, forward and backward, of full rows."""
    return rows * length * shape.flops_per_token(length)


def with_batch_size(config: PretrainConfig, shape: MiniMindConfig) -> PretrainConfig:
    """Return the configuration with a number for `--batch-size auto`, before processes have met for a run.

    Raises:
        ConfigError: where none can be found; see `resolve_batch_size`.
    """
    if config.batch_size != AUTO:
        return config
    with ExitStack() as closing:
        accelerator = start_accelerator(config)
        closing.callback(close_accelerator, accelerator)
        return resolve_batch_size(config, shape, accelerator, partial(compile_and_wrap, config, shape))


def matmul_flops(device: torch.device, precision: str) -> float:
    """Return the FLOP/s of a large square matrix product, the best of several.

    Args:
        device: where.
        precision: `no` (float32 as PyTorch is set), `bf16` or `fp16`.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timer = _Timer(device)
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or (len(times) < 20 and time.perf_counter() - began < 1.0):
        with timer.part("product"):
            a @ b
        times.append(timer.seconds()["product"][-1])
    return 2 * size**3 / min(times)


class _Timer:
    """Times parts of the work: on a GPU by events between them, which do not make the host wait."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []
        self._added: list[tuple[str, float]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what the device does inside."""
        began = self._now()
        yield
        self._marks.append((name, began, self._now()))

    def add(self, name: str, seconds: float) -> None:
        """Note a part that was timed elsewhere."""
        self._added.append((name, seconds))

    def seconds(self) -> dict[str, list[float]]:
        """Wait for the device and return the times of each part."""
        if self._cuda:
            torch.cuda.synchronize()
        times: dict[str, list[float]] = {}
        for name, spent in self._added:
            times.setdefault(name, []).append(spent)
        for name, began, ended in self._marks:
            spent = began.elapsed_time(ended) / 1e3 if self._cuda else ended - began
            times.setdefault(name, []).append(spent)
        return times

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _shortened(config: PretrainConfig, shape: MiniMindConfig, matmul: float) -> PretrainConfig:
    """Return the configuration with fewer rows, then shorter ones, where a step would take too long."""

    def too_long() -> bool:
        work = (config.accumulation_steps or 1) * micro_batch_flops(shape, rows, length)
        return work > LONGEST_STEP * 0.5 * matmul

    rows, length = _rows(config), config.max_seq_len
    while rows > 1 and too_long():
        rows = -(-rows // 2)
    while length > 64 and too_long():
        length = max(length // 2, 64)
    if (rows, length) == (config.batch_size, config.max_seq_len):
        return config
    # A global batch would only bring the rows back as accumulation.
    return dataclasses.replace(config, batch_size=rows, max_seq_len=length, global_batch_size=None)


def _mean(value: float, accelerator: Accelerator) -> float:
    """Return the mean of a number over all processes."""
    number = torch.tensor([value], dtype=torch.float32, device=accelerator.device)
    return float(accelerator.reduce(number, reduction="mean"))


def _rows(config: PretrainConfig) -> int:
    assert isinstance(config.batch_size, int)
    return config.batch_size


def _make_run(
    config: PretrainConfig,
    shape: MiniMindConfig,
    plan: BatchPlan,
    accelerator: Accelerator,
    folder: Path,
    pad_token_id: int,
) -> tuple[Run, bool]:
    """Return a run like any other, but on random tokens and without a place for results."""
    model, optimizer, compiled = compile_and_wrap(config, shape, plan, accelerator)
    loader = Loader(
        random_shards(folder / f"tokens-{accelerator.process_index}", shape.vocab_size),
        seq_len=config.max_seq_len,
        packing=config.packing,
        plan=plan,
        seed=config.seed,
        process_index=accelerator.process_index,
        device=accelerator.device,
        pad_token_id=pad_token_id,
        trim=not compiled,
    )
    (folder / "run").mkdir(exist_ok=True)
    run = Run(
        config=config,
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        loader=loader,
        validation=None,
        bytes_per_token=torch.ones(shape.vocab_size),
        learning_rate=lambda step, ending: config.peak_learning_rate,
        total_steps=1,
        meter=Meter(1.0, accelerator.num_processes, None, 1, device=accelerator.device),
        progress=Progress(enabled=False),
        trackers=Trackers(
            config, RunFolder(folder / "run"), accelerator, {}, start_step=0, warn=lambda text: None
        ),
        save=lambda state: None,
        mark_best=lambda state: None,
        stop=StopRequest(),
    )
    run.graph = pass_graph(run, shape, compiled=compiled)
    return run, compiled


def _measure(run: Run, seconds: float, *, compiled: bool) -> dict[str, Any]:
    """Return the fields of the result that are times, and the number of steps."""
    run.model.train()
    state = TrainState()
    batches = _endless(run.loader)
    set_learning_rate(run.optimizer, run.config.peak_learning_rate)
    device = run.accelerator.device

    def synchronize() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step() -> None:
        train_step(run, next(batches), state)
        state.step += 1

    def once() -> float:
        """Take a step and return its time, the same on all processes, so that all go on alike."""
        began = synchronize()
        step()
        return max(_mean(synchronize() - began, run.accelerator), 1e-4)

    began = synchronize()
    # The first step of a compiled model tells nothing, nor does one on a GPU, for which kernels are built.
    first = once()
    long = not compiled and device.type != "cuda" and first > LONGEST_STEP
    for _ in range(0 if long else WARMUP_STEPS - 1):
        step()
    start_seconds = synchronize() - began

    if long:
        timed = max(round(seconds / first), 1)
    else:
        steps = max(round(seconds / once()), 2)
        began = synchronize()
        for _ in range(steps):
            step()
        step_seconds = _mean((synchronize() - began) / steps, run.accelerator)
        timed = max(round(seconds / 2 / step_seconds), 2)

    timer = _Timer(device)
    waits = []
    for _ in range(timed):
        began = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - began)
        _timed_step(run, batch, timer)
    times = timer.seconds()
    rounds = run.accelerator.gradient_accumulation_steps
    parts = {
        "data_seconds": fmean(waits),
        "forward_seconds": fmean(times["forward"]) * rounds,
        "backward_seconds": fmean(times["backward"]) * rounds,
        "optimizer_seconds": fmean(times["optimizer"]),
    }
    if long:
        # There is no time for whole steps besides.
        steps, step_seconds = timed, sum(parts.values())
    return {"steps": steps, "step_seconds": step_seconds, "start_seconds": start_seconds, **parts}


def _timed_step(run: Run, batch: StepBatch, timer: _Timer) -> None:
    """Do what `train_step` does, each part timed on its own."""
    scale = run.accelerator.num_processes * len(batch.micro_batches) / max(batch.num_targets, 1)
    balance = ExpertBalance(run.accelerator, run.config)
    for micro_batch in batch.micro_batches:
        with run.accelerator.accumulate(run.model):
            if run.graph is not None and run.graph.captured:
                for name, spent in zip(
                    ("forward", "backward"), run.graph.timed(micro_batch, scale), strict=True
                ):
                    timer.add(name, spent)
            else:
                with timer.part("forward"):
                    loss = forward_loss(run.model, micro_batch, balance)
                with timer.part("backward"):
                    run.accelerator.backward(balance.added_to(loss) * scale)
            if run.accelerator.sync_gradients:
                with timer.part("optimizer"):
                    skip_if_nonfinite(run.optimizer, clip_gradient(run))
                    run.optimizer.step()
                    run.optimizer.zero_grad()
            else:
                run.optimizer.step()
                run.optimizer.zero_grad()


def _endless(loader: Loader) -> Iterator[StepBatch]:
    """Yield steps pass after pass; all have the same shapes."""
    epoch = 0
    while True:
        yield from loader.steps(epoch)
        epoch += 1
