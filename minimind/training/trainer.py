"""The training loop: one optimizer step, and what happens between steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from ..checkpoint.train_state import TrainState
from ..config.options import PretrainConfig, due, evaluation_interval, save_due
from ..data.loader import Loader, MicroBatch, StepBatch
from ..distributed.shutdown import StopRequest
from ..errors import TrainingError
from ..evaluation.validation import Evaluation, evaluate
from ..optim.build import set_learning_rate, skip_if_nonfinite
from ..schedule import decay_steps_due
from ..tracking.console import Progress
from ..tracking.trackers import Trackers
from .async_metrics import AsyncScalars
from .cuda_graph import ForwardBackwardGraph
from .garbage_collection import manual_gc
from .load_balancing import ExpertBalance, expert_numbers
from .loss_spikes import MAX_REPORTS, MAX_REWINDS, Spike, remember, spike_threshold
from .samples import Samples
from .throughput import Meter

# So many updates in a row may be left out for a gradient that is not finite, or a loss that jumped. The fp16
# scaler starts high and halves until nothing overflows: from 65536 that can take 16 steps before anything is
# wrong.
UPDATES_LEFT_OUT_ALLOWED = 20

# Steps between two collections of cyclic garbage: the same on all processes, so that none waits for another.
COLLECT_INTERVAL = 100

# Time kept for writing the model and its sample after the last step.
END_SECONDS = 5.0


@dataclass(frozen=True)
class StepRecord:
    """What the host knows of a step when it is launched; the device's numbers join it later."""

    step: int
    epoch: float
    tokens: int
    num_targets: int
    learning_rate: float
    digest: str
    limit: float
    rows: list[int]
    report: bool


class SpikeError(Exception):
    """Leads out of the loop to go back to a checkpoint; never leaves this module.

    Attributes:
        spike: the step that jumped or was not finite.
    """

    def __init__(self, spike: Spike) -> None:
        super().__init__(spike.what)
        self.spike = spike


@dataclass
class Run:
    """The parts of a run that the loop works with.

    Attributes:
        stop_after: the step after which the run ends as if it had been asked to stop; None for no such step.
        saved_step: the last step of which there is a checkpoint in the run's folder.
    """

    config: PretrainConfig
    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: Loader
    validation: Callable[[int | None], Iterable[MicroBatch]] | None
    bytes_per_token: torch.Tensor
    learning_rate: Callable[[int, tuple[int, int] | None], float]
    total_steps: int
    meter: Meter
    progress: Progress
    trackers: Trackers
    save: Callable[[TrainState], None]
    mark_best: Callable[[TrainState], None]
    stop: StopRequest
    # Writes the texts of a step down, where reports are wanted, and returns words that tell where.
    report_spike: Callable[[Spike], str] | None = None
    # Puts model, optimizer and the given state back to the last checkpoint.
    go_back: Callable[[TrainState], None] | None = None
    stop_after: int | None = None
    samples: Samples | None = None
    graph: ForwardBackwardGraph | None = None
    after_step: Callable[[], None] | None = None
    readback: AsyncScalars[StepRecord] = field(init=False)
    _last_spike: int = field(default=-1, init=False)
    _reports: int = field(default=0, init=False)
    last_loss: float = field(default=math.nan, init=False)
    last_evaluation: Evaluation | None = field(default=None, init=False)
    saved_step: int = field(default=-1, init=False)

    def __post_init__(self) -> None:
        self.readback = AsyncScalars(self.accelerator.device)

    def last_step(self, state: TrainState) -> int:
        """Return the number of steps of the whole run."""
        return self.total_steps if state.ending is None else state.ending[1]


def train(run: Run, state: TrainState) -> None:
    """Train from `state` to the end of the run, or until all processes have agreed to stop.

    Raises:
        TrainingError: when the gradient stays non-finite, or the run would go back too often.
    """
    if _rewinds(run) and run.saved_step != state.step:
        save(run, state)  # or a run that fails early would have nothing to go back to
    while True:
        try:
            with manual_gc() as collect:
                return _train(run, state, collect)
        except SpikeError as error:
            spike = error.spike
        # Out here the loop that was left is let go, and its thread that reads ahead with it.
        rewind(run, state, spike)


def _train(run: Run, state: TrainState, collect: Callable[[], object]) -> None:
    config = run.config
    run.model.train()
    batches = _batches(run.loader, state)
    while state.step < run.last_step(state) and not state.stopping:
        with run.meter.phase("data"):
            batch = next(batches)
        learning_rate = run.learning_rate(state.step, state.ending)
        set_learning_rate(run.optimizer, learning_rate)
        limit = _loss_limit(run, state, batch)
        values = train_step(run, batch, state, limit)
        state.advance(batch, run.loader.sequences_per_epoch)
        run.meter.step(batch.num_tokens)
        last = state.step == run.last_step(state)
        run.readback.put(_record(run, state, batch, learning_rate, limit, last), values)
        settle(run, state, everything=last)
        state.stopping |= state.step == run.stop_after
        if run.after_step is not None:
            run.after_step()
        if due(state.step, COLLECT_INTERVAL):
            collect()
        if last or save_due(state.step, config):
            save(run, state)
        if last or due(state.step, evaluation_interval(config)):
            validate(run, state)
        if run.samples is not None and due(state.step, config.sample_interval or 1):
            write_samples(run, state)
    if run.saved_step != state.step:
        save(run, state)


def train_step(run: Run, batch: StepBatch, state: TrainState, limit: float = math.inf) -> torch.Tensor:
    """Do one optimizer step, whose update is left out where loss or gradient is not finite.

    A summed loss above `limit` leaves the update out too with `--on-spike skip`.

    The loss is the mean over the real targets of the whole global batch. `Accelerator.backward` divides by
    the accumulation steps and the processes average their gradients, so the summed loss of a micro-batch is
    multiplied by both and divided by the number of targets, which every process knows without asking. The
    loss that balances experts is summed in the same way and added to what the gradient is taken of, but not
    to the loss that is returned.

    Returns:
        (4,) float32 on the device: the loss summed over all processes, the number of processes that were
        asked to stop, the steps that the main process wants to decay from now on, and the norm of the
        gradient; with experts (5 + L·E,), with `ExpertBalance.sums` behind them.
    """
    accelerator, model, optimizer = run.accelerator, run.model, run.optimizer
    scale = accelerator.num_processes * len(batch.micro_batches) / max(batch.num_targets, 1)
    if run.config.dropout > 0:
        # Dropout is a function of (seed, step, process), so a resumed run draws what it would have drawn.
        seeds = np.random.SeedSequence((run.config.seed, state.step, accelerator.process_index))
        torch.manual_seed(int(seeds.generate_state(1)[0]))
    loss_sum = torch.zeros((), device=accelerator.device)
    balance = ExpertBalance(accelerator, run.config)
    for micro_batch in batch.micro_batches:
        with accelerator.accumulate(model):
            if run.graph is not None:
                loss_sum += run.graph(micro_batch, scale)
            else:
                loss_sum += forward_backward(run, micro_batch, scale, balance)
            if accelerator.sync_gradients:
                # Wishes of single processes ride along, so that all read them at the same step.
                asked = torch.full_like(loss_sum, float(run.stop.reason is not None))
                decay = torch.full_like(loss_sum, float(decay_wanted(run, state)))
                sums = accelerator.reduce(torch.stack((loss_sum, asked, decay)), reduction="sum")
                norm = clip_gradient(run)
                skips = run.config.on_spike == "skip"
                skip_if_nonfinite(optimizer, norm, sums[0], limit=limit if skips else math.inf)
            optimizer.step()
            optimizer.zero_grad()
    return torch.cat((sums, norm.float().reshape(1), *balance.sums()))


def decay_wanted(run: Run, state: TrainState) -> int:
    """Return the steps to decay from now on so that a `wsd` run ends within --max-time; 0 for not yet."""
    seconds_left, per_step = run.stop.seconds_left(), run.meter.seconds_per_step()
    if (
        run.config.lr_schedule != "wsd"
        or not run.accelerator.is_main_process
        or state.ending is not None
        or seconds_left is None
        or per_step is None
    ):
        return 0
    # A tenth is kept for steps that take longer, and what the end of a run takes at least twice over.
    ending = 2 * (run.meter.seconds_of("evaluation") + run.meter.seconds_of("saving")) + END_SECONDS
    steps = decay_steps_due(
        steps_done=state.step,
        decay_ratio=run.config.decay_ratio,
        decay_steps=run.config.decay_steps,
        seconds_left=0.9 * (seconds_left - ending),
        seconds_per_step=per_step,
    )
    return steps if state.step + steps < run.total_steps else 0


def forward_backward(
    run: Run,
    batch: MicroBatch,
    scale: float | torch.Tensor,
    balance: ExpertBalance,
    between: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Run a micro-batch forward and back, which adds to the gradients of the parameters.

    Args:
        run: its model and accelerator.
        batch: on the device.
        scale: what the loss is multiplied by before its gradient is taken.
        balance: of the step.
        halfway: called between the passes.

    Returns:
        The cross-entropy summed over the real targets, a float32 scalar.
    """
    loss = forward_loss(run.model, batch, balance)
    between()
    run.accelerator.backward(balance.added_to(loss) * scale)
    return loss.detach()


def forward_loss(model: nn.Module, batch: MicroBatch, balance: ExpertBalance | None = None) -> torch.Tensor:
    """Return the cross-entropy of a micro-batch summed over its real targets, a float32 scalar.

    With experts, `balance` says what to route and is told what the routers chose.
    """
    # The constant 1 keeps the compiled graph the same for every count of targets.
    output = model(
        input_ids=batch.input_ids,
        shift_labels=batch.shift_labels,
        document_ids=batch.document_ids,
        position_ids=batch.position_ids,
        num_items_in_batch=1,
        **(balance.inputs(batch) if balance is not None else {}),
    )
    if balance is not None:
        # A model of the caller's own has none.
        balance.note(getattr(output, "routing", None))
    return output.loss


def clip_gradient(run: Run) -> torch.Tensor:
    """Clip the gradient in place and return its norm before that, the same on every process."""
    limit = run.config.grad_clip or math.inf
    norm = run.accelerator.clip_grad_norm_(run.model.parameters(), limit)
    # Under FSDP2 the norm is a DTensor; making it whole is a collective that every process takes part in.
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def settle(run: Run, state: TrainState, *, everything: bool = False) -> None:
    """Take in the device's numbers of earlier steps: count, report, and stop where that is hopeless."""
    for arrival in run.readback.arrived(everything=everything):
        record, (loss_sum, asked_to_stop, decay, norm, *routing) = arrival.tag, arrival.values
        state.stopping |= asked_to_stop > 0
        if decay > 0 and state.ending is None:
            _end_in_time(run, state, int(decay))
        remember(state.recent_losses, loss_sum / max(record.num_targets, 1))
        finite = math.isfinite(loss_sum) and math.isfinite(norm)
        jumped = finite and loss_sum > record.limit
        if finite and not (jumped and run.config.on_spike == "skip"):
            state.left_out_in_a_row = 0
            state.interval_loss += loss_sum
            state.interval_targets += record.num_targets
            if routing:
                before = state.interval_routing or [0.0] * len(routing)
                state.interval_routing = [a + b for a, b in zip(before, routing, strict=True)]
        else:
            state.left_out_in_a_row += 1
            state.skipped_steps += 1
        if record.report:
            _report(run, state, record, norm, arrival.time)
        if jumped or not finite:
            _look_into(run, state, record, loss_sum, norm)


def save(run: Run, state: TrainState) -> None:
    """Save the state, after every step it contains has been looked at."""
    settle(run, state, everything=True)
    with run.meter.phase("saving"):
        run.save(state)
    run.saved_step = state.step


def rewind(run: Run, state: TrainState, spike: Spike) -> None:
    """Go back to the last checkpoint and leave the rows of `spike` out from then on.

    Raises:
        TrainingError: when the run has gone back too often already.
    """
    if state.rewinds >= MAX_REWINDS:
        raise TrainingError(
            f"step {spike.step}: {spike.what} after {MAX_REWINDS} rewinds, so a few rows are not the cause; "
            "go on with --resume and a lower --learning-rate or --grad-clip, or with --on-spike skip."
        )
    rows = [spike.epoch, spike.row, spike.rows]
    rewinds, left_out, stopping = state.rewinds + 1, [*state.left_out, rows], state.stopping
    with run.meter.phase("rewinding"):
        assert run.go_back is not None
        run.go_back(state)
    state.rewinds, state.left_out, state.stopping = rewinds, left_out, stopping
    run.readback.clear()
    run._last_spike = -1
    run.meter.go_back(state.step)
    run.trackers.go_back(state.step)
    if run.samples is not None:
        run.samples.go_back(state.step)
    places = dict(zip(("left_out_epoch", "left_out_row", "left_out_rows"), rows, strict=True))
    run.trackers.log({"rewound_from": spike.step, **places, "rewinds": rewinds}, state.step)
    run.progress.warn(
        f"back from step {spike.step} to step {state.step}, and on without rows {spike.row} to "
        f"{spike.row + spike.rows - 1} of pass {spike.epoch} (rewind {rewinds} of at most {MAX_REWINDS})."
    )
    # At once, so that a run that is resumed from here leaves the rows out too.
    save(run, state)


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


def write_samples(run: Run, state: TrainState) -> None:
    """Write down what the model makes of some prompts now."""
    assert run.samples is not None
    settle(run, state, everything=True)
    with run.meter.phase("sampling"):
        run.samples.write(state.step)


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


def _batches(loader: Loader, state: TrainState) -> Iterator[StepBatch]:
    """Yield the steps from the state's cursor on, pass after pass."""
    epoch, row = state.epoch, state.row
    while True:
        for batch in loader.steps(epoch, row):
            if state.leaves_out(batch):
                state.pass_over(batch, loader.sequences_per_epoch)
            else:
                yield batch
        epoch, row = epoch + 1, 0


def _rewinds(run: Run) -> bool:
    return run.config.on_spike == "rewind" and run.go_back is not None


def _loss_limit(run: Run, state: TrainState, batch: StepBatch) -> float:
    """Return the summed loss above which the coming step jumps, as a float32, as the device compares it."""
    full = sum(len(part.input_ids) for part in batch.micro_batches) * run.accelerator.num_processes
    share = batch.num_sequences / full
    per_token = spike_threshold(state.recent_losses, len(run.readback), run.config.spike_sigma, share)
    return float(np.float32(per_token * max(batch.num_targets, 1)))


def _record(
    run: Run, state: TrainState, batch: StepBatch, learning_rate: float, limit: float, last: bool
) -> StepRecord:
    return StepRecord(
        step=state.step,
        epoch=state.epoch + state.row / run.loader.sequences_per_epoch,
        tokens=state.tokens,
        num_targets=batch.num_targets,
        learning_rate=learning_rate,
        digest=state.digest,
        limit=limit,
        # The cursor is already past them.
        rows=[
            batch.epoch,
            (state.row or run.loader.sequences_per_epoch) - batch.num_sequences,
            batch.num_sequences,
        ],
        report=last or due(state.step, run.config.log_interval),
    )


def _end_in_time(run: Run, state: TrainState, decay_steps: int) -> None:
    """Begin the decay that ends the run before its time is up."""
    state.ending = (state.step, min(state.step + decay_steps, run.total_steps))
    run.meter.end_at(state.ending[1])
    run.progress.start(state.ending[1], state.step)
    run.progress.note(f"--max-time: decaying from step {state.step:,}, to end at step {state.ending[1]:,}.")


def _look_into(run: Run, state: TrainState, record: StepRecord, loss_sum: float, norm: float) -> None:
    """Tell of a step that jumped or was not finite, and do what the run is to do about it.

    Raises:
        TrainingError: when too many updates in a row were left out.
        SpikeError: when the run is to go back.
    """
    epoch, row, rows = record.rows
    targets = max(record.num_targets, 1)
    spike = Spike(
        step=record.step,
        loss=loss_sum / targets,
        limit=record.limit / targets,
        grad_norm=norm,
        learning_rate=record.learning_rate,
        update_skipped=state.left_out_in_a_row > 0,
        epoch=epoch,
        row=row,
        rows=rows,
        rewinds=state.rewinds,
        weights_of_step=state.step,
    )
    parts = [f"step {spike.step}: {spike.what}"] + ["this update was skipped"] * spike.update_skipped
    # A gradient that overflows in fp16 is how its scaler finds the scale, and no text's fault.
    suspect = run.accelerator.scaler is None or spike.jumped or not math.isfinite(loss_sum)
    if suspect and run.report_spike is not None:
        # The first of several steps in a row tells enough.
        if spike.step != run._last_spike + 1 and run._reports < MAX_REPORTS:
            run._reports += 1
            with run.meter.phase("spikes"):
                parts.append(run.report_spike(spike))
        run._last_spike = spike.step
    run.progress.warn("; ".join(parts) + ".")
    if state.left_out_in_a_row >= UPDATES_LEFT_OUT_ALLOWED:
        raise TrainingError(
            f"step {spike.step}: {spike.what}, and {UPDATES_LEFT_OUT_ALLOWED} updates in a row were skipped; "
            "go on from a checkpoint with a lower --learning-rate, more --warmup-steps, or "
            "--mixed-precision bf16 instead of fp16."
        )
    if suspect and _rewinds(run):
        raise SpikeError(spike)


def _report(run: Run, state: TrainState, record: StepRecord, norm: float, time: float) -> None:
    loss = state.interval_loss / state.interval_targets if state.interval_targets else math.nan
    experts = {}
    if state.interval_routing:
        experts = expert_numbers(
            state.interval_routing,
            num_experts=run.config.num_experts,
            experts_per_token=run.config.num_experts_per_tok,
            num_targets=state.interval_targets,
        )
    state.interval_loss, state.interval_targets, state.interval_routing = 0.0, 0, []
    run.last_loss = loss
    values = {
        "loss": loss,
        "learning_rate": record.learning_rate,
        "grad_norm": norm,
        **experts,
        "epoch": record.epoch,
        "tokens": record.tokens,
        "skipped_steps": state.skipped_steps,
        "digest": record.digest,
        **run.meter.report(record.step, time),
    }
    run.trackers.log(values, record.step)
    run.progress.step(record.step, values)
