"""The training loop of a run."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from ..data.loader import Loader, StepBatch
from ..errors import CheckpointError, TrainingError
from ..modeling.config import MiniMindConfig
from ..optim.build import set_schedule
from .async_metrics import AsyncScalars
from .callbacks import Callbacks
from .cuda_graph import StepGraphs
from .evaluator import Evaluator
from .forecast import RunForecast
from .garbage_collection import manual_gc
from .load_balancing import expert_balance
from .loss_spikes import MAX_REWINDS, Spike, SpikeError, SpikeReporter, append_loss, spike_threshold
from .outputs import Outputs
from .profiler import ProfileTrace
from .reporting import Reports, StepRecord
from .step import train_step
from .time_limits import TimeLimits

# Consecutive updates that may be skipped for a loss or gradient that is not finite, or for loss spikes. The
# fp16 scaler starts at 65536 and halves until nothing overflows, which may take 16 steps.
MAX_SKIPPED_IN_A_ROW = 20

# Steps between two garbage collections: the same on all ranks, so that none waits for another.
COLLECT_INTERVAL = 100


@dataclass(kw_only=True)
class Trainer(TimeLimits):
    """Trains a model from `state` to the end of the run. Every rank calls every method.

    Attributes:
        config: all options.
        model_config: sizes of the model.
        accelerator: of the run.
        model: prepared.
        optimizer: prepared.
        loader: batches of the training split.
        schedule: the learning rate.
        total_steps: optimizer steps of the run, unless --max-time ends it earlier.
        checkpointer: saves and loads checkpoints.
        outputs: metrics, trackers and samples.
        meter: throughput, and where time goes.
        progress: what a person sees.
        stop: whether this rank was asked to stop.
        state: progress of the run, from its checkpoint on a resume.
        evaluator: None without validation data.
        spikes: writes the documents of loss spikes; None for no reports and no rewinds.
        callbacks: of the caller.
        graphs: CUDA graphs of a step; None without.
        profiler: None without --profile.
        budget: clock of a time budget; None without one.
        forecast: extrapolates evaluations; None without --budget.
        stop_after: step after which the run ends as if it had been asked to stop; None for none.
        checked_warmup: whether the warm-up was compared with --max-time.
        saved_step: the last step with a checkpoint in the run's folder, -1 without one.
        reports: sends metrics to trackers and terminal.
    """

    model_config: MiniMindConfig
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: Loader
    outputs: Outputs
    evaluator: Evaluator | None = None
    spikes: SpikeReporter | None = None
    callbacks: Callbacks = field(default_factory=Callbacks)
    graphs: StepGraphs | None = None
    profiler: ProfileTrace | None = None
    forecast: RunForecast | None = None
    stop_after: int | None = None
    saved_step: int = -1
    reports: Reports = field(init=False)
    metrics: AsyncScalars[StepRecord] = field(init=False)

    def __post_init__(self) -> None:
        self.reports = Reports(self.model_config, self.outputs, self.progress, self.meter, self.callbacks)
        self.metrics = AsyncScalars(self.accelerator.device)

    def train(self) -> None:
        """Train to the end of the run, or until all ranks have agreed to stop.

        Raises:
            TrainingError: when losses or gradients stay non-finite, or the run would rewind too often.
        """
        if self._rewinds and self.saved_step != self.state.step:
            self.save()  # so that there is a checkpoint to rewind to
        while True:
            try:
                with manual_gc():
                    return self._train()
            except SpikeError as error:
                spike = error.spike
            # Outside of the handler, so that the loop's frame and its prefetch thread are released.
            self.rewind(spike)

    def _train(self) -> None:
        config, state = self.config, self.state
        self.model.train()
        batches = self._batches()
        while state.step < self.last_step and not state.stopping:
            with self.meter.phase("data"):
                batch = next(batches)
            learning_rate = self.schedule.at(state.step, state.decay_window)
            set_schedule(self.optimizer, learning_rate, state.step)
            limit = self._loss_limit(batch)
            values = self.train_step(batch, limit)
            sequences = batch.epoch, state.sequence, batch.num_sequences
            state.advance(batch, self.loader.sequences_per_epoch)
            self.meter.step(batch.num_tokens)
            last = state.step == self.last_step
            record = StepRecord(
                step=state.step,
                epoch=state.epoch + state.sequence / self.loader.sequences_per_epoch,
                tokens=state.tokens,
                num_targets=batch.num_targets,
                learning_rate=learning_rate,
                digest=state.digest,
                limit=limit,
                sequences=sequences,
                report=last or state.step % config.log_interval == 0,
            )
            self.metrics.enqueue(record, values)
            self.drain_metrics(everything=last)
            state.stopping |= state.step == self.stop_after
            if self.profiler is not None:
                self.profiler.step()
            if state.step % COLLECT_INTERVAL == 0:
                # Young generations only: traversing the 100,000 objects of compiled code takes 80 ms.
                gc.collect(1)
            if last or config.saves_after(state.step):
                self.save()
            if last or state.step % config.evaluation_interval == 0:
                self.validate()
            if self.outputs.probes_after(state.step, last=last):
                self.probe(last=last)
        if self.saved_step != state.step:
            self.save()

    def train_step(self, batch: StepBatch, limit: float) -> torch.Tensor:
        """Do one optimizer step; see `step.train_step`. A summed loss above `limit` is a spike."""
        if self.config.dropout > 0:
            # Dropout is a function of (seed, step, rank), so a resumed run draws the same masks.
            parts = (self.config.seed, self.state.step, self.accelerator.process_index)
            torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1)[0]))
        return train_step(
            self.model,
            self.optimizer,
            batch,
            self.accelerator,
            grad_clip=self.config.grad_clip,
            loss_limit=limit if self.config.on_spike == "skip" else math.inf,
            balance=expert_balance(self.accelerator, self.model_config),
            graphs=self.graphs,
            stop=self.stop,
            decay_steps=self._decay_steps(),
        )

    def drain_metrics(self, *, everything: bool = False) -> None:
        """Process the device's values of earlier steps: count, report, handle spikes."""
        state = self.state
        for ready in self.metrics.ready(everything=everything):
            record, (loss_sum, asked_to_stop, decay, norm, *routing) = ready.tag, ready.values
            state.stopping |= asked_to_stop > 0
            if decay and self.budget is not None:
                self._fit_to_budget(record.step + int(decay) - 2)
            elif decay and state.decay_window is None:
                self._fit_to_time(int(decay))
            loss = loss_sum / max(record.num_targets, 1)
            append_loss(state.recent_losses, loss)
            self.progress.advance(record.step, loss)
            finite = math.isfinite(loss_sum) and math.isfinite(norm)
            jumped = finite and loss_sum > record.limit
            if finite and not (jumped and self.config.on_spike == "skip"):
                state.skipped_in_a_row = 0
                state.interval_loss += loss_sum
                state.interval_targets += record.num_targets
                if routing:
                    before = state.interval_routing or [0.0] * len(routing)
                    state.interval_routing = [a + b for a, b in zip(before, routing, strict=True)]
            else:
                state.skipped_in_a_row += 1
                state.skipped_steps += 1
            if record.report:
                self.reports.step(state, record, norm, ready.time)
            if jumped or not finite:
                self._handle_spike(record, loss_sum, norm)

    def save(self) -> None:
        """Save a checkpoint, after the metrics of every step it contains were processed."""
        self.drain_metrics(everything=True)
        if self.budget is not None:
            self.state.budget_seconds = self.budget.spent()
        with self.meter.phase("saving"):
            self.checkpointer.save(self.state)
        self.saved_step = self.state.step
        self.callbacks.save(self.saved_step)

    def validate(self) -> None:
        """Evaluate, report the result and mark the best checkpoint; does nothing without validation data."""
        if self.evaluator is None:
            return
        # Earlier steps are reported first, and their time does not count as that of the evaluation.
        self.drain_metrics(everything=True)
        with self.meter.phase("evaluation"):
            result = self.evaluator.evaluate(self.config.eval_batches, self.stop)
        if result is None:
            self.state.stopping = True
            return
        self.reports.last_evaluation = result
        if result.loss < self.state.best_val_loss:
            self.state.best_val_loss = result.loss
            if self.saved_step == self.state.step:
                self.checkpointer.mark_best(self.state)
        forecast = None
        if self.forecast is not None:
            share = self.state.step / self.last_step
            forecast = self.forecast.after(result.bits_per_byte, tokens=self.state.tokens, share=share)
        self.reports.evaluation(self.state.step, result, forecast)

    def sanity_check_validation(self) -> None:
        """Evaluate before the first step, so that an evaluation that fails does so at once.

        A new run evaluates and reports what later evaluations do, the baseline of its curve. A resumed run
        evaluates one batch, and makes up for an evaluation that was due at its checkpoint, or for the mark of
        the best checkpoint that follows it.
        """
        if self.evaluator is None:
            return
        state = self.state
        with self.meter.phase("evaluation"):
            result = self.evaluator.evaluate(self.config.eval_batches if state.step == 0 else 1, self.stop)
        if result is None:
            state.stopping = True
        elif state.step == 0:
            self.reports.evaluation(0, result)
        elif state.step == self.total_steps or state.step % self.config.evaluation_interval == 0:
            last = self.reports.recorded_evaluation(self.accelerator, state.step)
            if last is None or self.checkpointer.best_restarted:
                self.validate()
            elif last["val_loss"] is not None and last["val_loss"] < state.best_val_loss:
                state.best_val_loss = last["val_loss"]
                self.checkpointer.mark_best(state)

    def probe(self, *, last: bool) -> None:
        """Write text samples and scores of the model as it is, where they are due."""
        self.drain_metrics(everything=True)
        with self.meter.phase("sampling"):
            self.reports.scores(self.state.step, self.outputs.probe(self.state.step, last=last))

    def rewind(self, spike: Spike) -> None:
        """Resume from the last checkpoint, with the sequences of `spike` excluded from then on.

        Raises:
            TrainingError: after too many rewinds.
            CheckpointError: when there is no valid checkpoint.
        """
        before = self.state
        if before.rewinds >= MAX_REWINDS:
            raise TrainingError(
                f"step {spike.step}: {spike.what} after {MAX_REWINDS} rewinds, so a few documents are not "
                "the cause; resume with a lower --learning-rate or --grad-clip, or with --on-spike skip."
            )
        excluded = [spike.epoch, spike.sequence, spike.num_sequences]
        with self.meter.phase("rewinding"):
            self.outputs.close()
            state, self.saved_step, tracker_ids = self.checkpointer.resume("auto")
            if self.saved_step < 0:
                raise CheckpointError("there is no valid checkpoint to rewind to.")
            self.outputs.open(state.step, tracker_ids)
            self.checkpointer.trackers = self.outputs.trackers
        state.rewinds, state.stopping = before.rewinds + 1, before.stopping
        if before.decay_window is None:  # a checkpoint of an earlier attempt may have one
            state.decay_window = None
        state.excluded_sequences = [*before.excluded_sequences, excluded]
        self.state = state
        self.metrics.clear()
        self.meter.rewind(state.step)
        if self.spikes is not None:
            self.spikes.rewind()
        self.reports.rewind(state, spike, MAX_REWINDS)
        if self.callbacks:
            self.reports.recorded_evaluation(self.accelerator, state.step)
        # At once, so that a run that is resumed from here excludes the sequences too.
        self.save()

    @property
    def _rewinds(self) -> bool:
        return self.config.on_spike == "rewind" and self.spikes is not None

    def _batches(self) -> Iterator[StepBatch]:
        """Yield the steps from the state's position on, epoch after epoch."""
        state = self.state
        for batch in self.loader.steps(state.epoch, state.sequence, epochs=None):
            if state.excludes(batch):
                state.skip(batch, self.loader.sequences_per_epoch)
            else:
                yield batch

    def _loss_limit(self, batch: StepBatch) -> float:
        """Return the summed loss above which the step is a spike, in float32 as the device compares it."""
        full = sum(len(part.input_ids) for part in batch.micro_batches) * self.accelerator.num_processes
        fraction = batch.num_sequences / full
        sigma, unread = self.config.spike_sigma, len(self.metrics)
        per_token = spike_threshold(self.state.recent_losses, unread, sigma, fraction)
        return float(np.float32(per_token * max(batch.num_targets, 1)))

    def _handle_spike(self, record: StepRecord, loss_sum: float, norm: float) -> None:
        """Warn of a loss spike or non-finite step, write its report, and rewind with --on-spike rewind.

        Raises:
            TrainingError: after too many consecutive skipped updates.
            SpikeError: to rewind.
        """
        state, spike = self.state, record.spike(self.state, loss_sum, norm)
        clauses = [f"step {spike.step}: {spike.what}"] + ["this update was skipped"] * spike.update_skipped
        # With fp16 an overflowing gradient is how the scaler finds its scale, and not caused by the data.
        suspect = self.accelerator.scaler is None or spike.jumped or not math.isfinite(loss_sum)
        if suspect and self.spikes is not None:
            with self.meter.phase("spikes"):
                where = self.spikes.report(spike)
            clauses += [where] if where else []
        self.progress.warn("; ".join(clauses) + ".")
        self.callbacks.spike(spike)
        if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"step {spike.step}: {spike.what}, and {MAX_SKIPPED_IN_A_ROW} updates in a row were skipped; "
                "resume from a checkpoint with a lower --learning-rate, more --warmup-steps, or "
                "--mixed-precision bf16 instead of fp16."
            )
        if suspect and self._rewinds:
            raise SpikeError(spike)
