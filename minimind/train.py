"""The training loop: one optimizer step, and what happens between steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from .config import PretrainConfig
from .data.loader import Loader, MicroBatch, StepBatch
from .errors import TrainingError
from .evaluation import Evaluation, evaluate
from .optim import set_learning_rate, skip_if_nonfinite
from .progress import Progress
from .readback import Readback
from .stopping import StopRequest
from .throughput import Meter
from .trackers import Trackers

# So many updates in a row may be skipped for a gradient that is not finite. The fp16 scaler starts high and
# halves until nothing overflows: from 65536 that can take 16 steps before anything is wrong.
NONFINITE_STEPS_ALLOWED = 20


@dataclass
class TrainState:
    """Where a run stands; everything else follows from the configuration and these few numbers.

    Attributes:
        step: optimizer steps done.
        epoch: the pass under way, from 0.
        row: rows of this pass trained.
        tokens: real input tokens trained, over all processes.
        skipped_steps: updates left out because the gradient was not finite.
        best_val_loss: lowest validation loss so far.
        stopping: all processes have agreed to stop after this step.
    """

    step: int = 0
    epoch: int = 0
    row: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    best_val_loss: float = math.inf
    stopping: bool = False

    def advance(self, batch: StepBatch, rows_per_epoch: int) -> None:
        """Count one optimizer step."""
        self.step += 1
        self.tokens += batch.num_tokens
        self.epoch, self.row = batch.epoch, self.row + batch.num_rows
        if self.row >= rows_per_epoch:
            self.epoch, self.row = self.epoch + 1, 0


@dataclass(frozen=True)
class StepRecord:
    """What the host knows of a step when it is launched; the device's numbers join it later."""

    step: int
    epoch: float
    tokens: int
    num_targets: int
    learning_rate: float
    report: bool


@dataclass
class Run:
    """The parts of a run that the loop works with."""

    config: PretrainConfig
    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: Loader
    validation: Callable[[int | None], Iterable[MicroBatch]] | None
    bytes_per_token: torch.Tensor
    learning_rate: Callable[[int], float]
    total_steps: int
    meter: Meter
    progress: Progress
    trackers: Trackers
    save: Callable[[TrainState], None]
    mark_best: Callable[[TrainState], None]
    stop: StopRequest
    after_step: Callable[[], None] | None = None
    readback: Readback[StepRecord] = field(init=False)
    _interval: list[float] = field(default_factory=lambda: [0.0, 0.0], init=False)
    _nonfinite_in_a_row: int = field(default=0, init=False)
    last_loss: float = field(default=math.nan, init=False)
    last_evaluation: Evaluation | None = field(default=None, init=False)
    saved_step: int = field(default=-1, init=False)

    def __post_init__(self) -> None:
        self.readback = Readback(self.accelerator.device)


def train(run: Run, state: TrainState) -> None:
    """Train from `state` to the end of the run, or until all processes have agreed to stop.

    Raises:
        TrainingError: when the gradient stays non-finite.
    """
    config = run.config
    run.model.train()
    batches = _batches(run.loader, state)
    while state.step < run.total_steps and not state.stopping:
        with run.meter.phase("data"):
            batch = next(batches)
        learning_rate = run.learning_rate(state.step)
        set_learning_rate(run.optimizer, learning_rate)
        values = train_step(run, batch, state)
        state.advance(batch, run.loader.rows_per_epoch)
        run.meter.step(batch.num_tokens)
        last = state.step == run.total_steps
        run.readback.put(_record(run, state, batch, learning_rate, last), values)
        settle(run, state, everything=last)
        if run.after_step is not None:
            run.after_step()
        if last or due(state.step, config.save_interval):
            save(run, state)
        if last or due(state.step, evaluation_interval(config)):
            validate(run, state)
    if run.saved_step != state.step:
        save(run, state)


def train_step(run: Run, batch: StepBatch, state: TrainState) -> torch.Tensor:
    """Do one optimizer step.

    The loss is the mean over the real targets of the whole global batch. `Accelerator.backward` divides by
    the accumulation steps and the processes average their gradients, so the summed loss of a micro-batch is
    multiplied by both and divided by the number of targets, which every process knows without asking.

    Returns:
        (3,) float32 on the device: the loss summed over all processes, the number of processes that were
        asked to stop, and the norm of the gradient.
    """
    accelerator, model, optimizer = run.accelerator, run.model, run.optimizer
    scale = accelerator.num_processes * len(batch.micro_batches) / max(batch.num_targets, 1)
    if run.config.dropout > 0:
        # Dropout is a function of (seed, step, process), so a resumed run draws what it would have drawn.
        seeds = np.random.SeedSequence((run.config.seed, state.step, accelerator.process_index))
        torch.manual_seed(int(seeds.generate_state(1)[0]))
    loss_sum = torch.zeros((), device=accelerator.device)
    for micro_batch in batch.micro_batches:
        with accelerator.accumulate(model):
            loss = forward_loss(model, micro_batch)
            accelerator.backward(loss * scale)
            loss_sum += loss.detach()
            if accelerator.sync_gradients:
                norm = clip_gradient(run)
                skip_if_nonfinite(optimizer, norm)
            optimizer.step()
            optimizer.zero_grad()
    # The wish of any process to stop rides along, so that all read it at the same step.
    asked = torch.full_like(loss_sum, float(run.stop.reason is not None))
    sums = accelerator.reduce(torch.stack((loss_sum, asked)), reduction="sum")
    return torch.cat((sums, norm.float().reshape(1)))


def forward_loss(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Return the cross-entropy of a micro-batch summed over its real targets, a float32 scalar."""
    # The constant 1 keeps the compiled graph the same for every count of targets.
    output = model(
        input_ids=batch.input_ids,
        shift_labels=batch.shift_labels,
        document_ids=batch.document_ids,
        position_ids=batch.position_ids,
        num_items_in_batch=1,
    )
    return output.loss


def clip_gradient(run: Run) -> torch.Tensor:
    """Clip the gradient in place and return its norm before that, the same on every process."""
    limit = run.config.grad_clip or math.inf
    norm = run.accelerator.clip_grad_norm_(run.model.parameters(), limit)
    # Under FSDP2 the norm is a DTensor; making it whole is a collective that every process takes part in.
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def settle(run: Run, state: TrainState, *, everything: bool = False) -> None:
    """Take in the device's numbers of earlier steps: count, report, and stop where that is hopeless."""
    for record, (loss_sum, asked_to_stop, norm) in run.readback.arrived(everything=everything):
        state.stopping |= asked_to_stop > 0
        if math.isfinite(loss_sum) and math.isfinite(norm):
            run._nonfinite_in_a_row = 0
            run._interval[0] += loss_sum
            run._interval[1] += record.num_targets
        else:
            _count_nonfinite(run, state, record, loss_sum, norm)
        if record.report:
            _report(run, state, record, norm)


def save(run: Run, state: TrainState) -> None:
    """Save the state, after every step it contains has been looked at."""
    settle(run, state, everything=True)
    with run.meter.phase("saving"):
        run.save(state)
    run.saved_step = state.step


def validate(run: Run, state: TrainState) -> None:
    """Evaluate, log the result and keep the best loss; does nothing without validation text.

    An evaluation can be long, so a wish to stop is heard between its batches too.
    """
    if run.validation is None:
        return
    # Reports of steps before it come before it, and their time is not taken for that of the evaluation.
    settle(run, state, everything=True)
    with run.meter.phase("evaluation"):
        result = evaluate(
            run.model,
            run.validation(run.config.eval_batches),
            run.bytes_per_token,
            run.accelerator,
            asked_to_stop=lambda: run.stop.reason is not None,
        )
    if result is None:
        state.stopping = True
        return
    run.last_evaluation = result
    if result.loss < state.best_val_loss:
        state.best_val_loss = result.loss
        if run.saved_step == state.step:
            run.mark_best(state)
    report_evaluation(run, state, result)


def report_evaluation(run: Run, state: TrainState, result: Evaluation) -> None:
    """Write an evaluation down and show it."""
    values = {
        "val_loss": result.loss,
        "val_perplexity": result.perplexity,
        "val_bits_per_byte": result.bits_per_byte,
        "val_tokens": result.tokens,
    }
    run.trackers.log(values, state.step)
    run.progress.evaluation(state.step, values)


def due(step: int, interval: int) -> bool:
    """Whether something done every `interval` steps is done after `step`."""
    return step % interval == 0


def evaluation_interval(config: PretrainConfig) -> int:
    """Steps between two evaluations."""
    return config.eval_interval or config.save_interval


def _batches(loader: Loader, state: TrainState) -> Iterator[StepBatch]:
    """Yield the steps from the state's cursor on, pass after pass."""
    epoch, row = state.epoch, state.row
    while True:
        yield from loader.steps(epoch, row)
        epoch, row = epoch + 1, 0


def _record(run: Run, state: TrainState, batch: StepBatch, learning_rate: float, last: bool) -> StepRecord:
    return StepRecord(
        step=state.step,
        epoch=state.epoch + state.row / run.loader.rows_per_epoch,
        tokens=state.tokens,
        num_targets=batch.num_targets,
        learning_rate=learning_rate,
        report=last or due(state.step, run.config.log_interval),
    )


def _count_nonfinite(run: Run, state: TrainState, record: StepRecord, loss: float, norm: float) -> None:
    state.skipped_steps += 1
    run._nonfinite_in_a_row += 1
    what = "loss" if not math.isfinite(loss) else "gradient"
    run.progress.warn(f"step {record.step}: the {what} is not finite; this update was skipped.")
    if run._nonfinite_in_a_row >= NONFINITE_STEPS_ALLOWED:
        raise TrainingError(
            f"the {what} was not finite in {NONFINITE_STEPS_ALLOWED} steps in a row, up to step "
            f"{record.step}; go on from a checkpoint with a lower --learning-rate, more --warmup-steps, or "
            "--mixed-precision bf16 instead of fp16."
        )


def _report(run: Run, state: TrainState, record: StepRecord, norm: float) -> None:
    loss_sum, targets = run._interval
    run._interval = [0.0, 0.0]
    loss = loss_sum / targets if targets else math.nan
    run.last_loss = loss
    values = {
        "loss": loss,
        "learning_rate": record.learning_rate,
        "grad_norm": norm,
        "epoch": record.epoch,
        "tokens": record.tokens,
        "skipped_steps": state.skipped_steps,
        **run.meter.report(record.step),
    }
    run.trackers.log(values, record.step)
    run.progress.step(record.step, values)
