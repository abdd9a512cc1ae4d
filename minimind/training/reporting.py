"""Reports of training steps and evaluations to trackers and terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from ..checkpoint.train_state import TrainState
from ..distributed.collectives import run_on_main_and_broadcast
from ..evaluation.scaling_law import Forecast
from ..evaluation.validation import Evaluation
from ..modeling.config import MiniMindConfig
from ..tracking.console import Progress
from ..tracking.metrics_file import last_with
from .callbacks import Callbacks
from .load_balancing import expert_metrics
from .loss_spikes import Spike
from .outputs import Outputs
from .throughput import Meter


@dataclass(frozen=True)
class StepRecord:
    """What the host knows of a step when it is launched; the device's values follow later.

    Attributes:
        step: its number, from 1.
        epoch: epochs done after the step, a fraction.
        tokens: input tokens trained on after the step.
        num_targets: targets of the step, over all ranks.
        learning_rate: of the step.
        digest: hash of all sequences up to the step.
        limit: summed loss above which the step is a spike.
        sequences: epoch, index in the epoch of the first sequence, and number of sequences.
        report: whether metrics are reported after this step.
    """

    step: int
    epoch: float
    tokens: int
    num_targets: int
    learning_rate: float
    digest: str
    limit: float
    sequences: tuple[int, int, int]
    report: bool

    def spike(self, state: TrainState, loss_sum: float, norm: float) -> Spike:
        """Return the spike of this step, given its summed loss and gradient norm."""
        targets = max(self.num_targets, 1)
        epoch, sequence, num_sequences = self.sequences
        return Spike(
            step=self.step,
            loss=loss_sum / targets,
            limit=self.limit / targets,
            grad_norm=norm,
            learning_rate=self.learning_rate,
            update_skipped=state.skipped_in_a_row > 0,
            epoch=epoch,
            sequence=sequence,
            num_sequences=num_sequences,
            rewinds=state.rewinds,
            weights_of_step=state.step,
        )


class Reports:
    """Sends metrics to the trackers and shows them.

    Attributes:
        last_loss: training loss of the last report, NaN before the first.
        last_evaluation: the last full evaluation.
        forecast: of the final evaluation, by the last one; None where there is none.
    """

    def __init__(
        self,
        model_config: MiniMindConfig,
        outputs: Outputs,
        progress: Progress,
        meter: Meter,
        callbacks: Callbacks,
    ) -> None:
        self._model_config, self._outputs = model_config, outputs
        self._progress, self._meter, self._callbacks = progress, meter, callbacks
        self.last_loss = math.nan
        self.last_evaluation: Evaluation | None = None
        self.forecast: Forecast | None = None

    def step(self, state: TrainState, record: StepRecord, norm: float, time: float) -> None:
        """Report the mean over the steps since the last report, and begin the next interval.

        Args:
            state: holds the sums of the interval.
            record: of its last step.
            norm: of that step's gradient.
            time: when the device had computed that step.
        """
        self.last_loss = state.interval_loss / state.interval_targets if state.interval_targets else math.nan
        experts = {}
        if state.interval_routing:
            experts = expert_metrics(
                state.interval_routing,
                num_experts=self._model_config.num_experts,
                experts_per_token=self._model_config.num_experts_per_tok,
                num_targets=state.interval_targets,
            )
        state.interval_loss, state.interval_targets, state.interval_routing = 0.0, 0, []
        values = {
            "loss": self.last_loss,
            "learning_rate": record.learning_rate,
            "grad_norm": norm,
            **experts,
            "epoch": record.epoch,
            "tokens": record.tokens,
            "skipped_steps": state.skipped_steps,
            "digest": record.digest,
            **self._meter.report(record.step, time),
        }
        self._outputs.trackers.log(values, record.step)
        self._progress.step(record.step, values | self._forecast_values())
        self._callbacks.report(record.step, values)

    def evaluation(self, step: int, result: Evaluation, forecast: Forecast | None = None) -> None:
        """Report an evaluation after `step`, and what it says of the end of the run."""
        self.forecast = forecast
        values = {
            "val_loss": result.loss,
            "val_perplexity": result.perplexity,
            "val_bits_per_byte": result.bits_per_byte,
            "val_tokens": result.tokens,
            **self._forecast_values(),
        }
        self._outputs.trackers.log(values, step)
        self._progress.evaluation(step, values)
        self._callbacks.evaluation(step, values)

    def recorded_evaluation(self, accelerator: Accelerator, step: int) -> dict[str, Any] | None:
        """Return the evaluation after `step` if it was reported; every rank must call this after a resume.

        The callbacks see it where their states do not include it: a checkpoint is saved before its step is
        evaluated.
        """
        path = self._outputs.metrics_path
        last = run_on_main_and_broadcast(accelerator, lambda: last_with(path, "val_loss"))
        if last is None or last["step"] != step:
            return None
        values = {name: value for name, value in last.items() if name.startswith("val_")}
        self._callbacks.evaluation(step, values)
        return values

    def scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Show scores after `step`, where there are any."""
        if scores:
            shown = " | ".join(f"{name} {value:.1%}" for name, value in scores.items())
            self._progress.note(f"step {step:,}: {shown} (chance 25.0%)")

    def _forecast_values(self) -> dict[str, float]:
        if self.forecast is None:
            return {}
        return {
            "val_forecast_bits_per_byte": self.forecast.bits_per_byte,
            "val_forecast_low": self.forecast.low,
            "val_forecast_high": self.forecast.high,
        }

    def rewind(self, state: TrainState, spike: Spike, max_rewinds: int) -> None:
        """Report that the run continues from `state`, without the sequences of `spike`."""
        values = {
            "rewound_from": spike.step,
            # Keys that readers of metrics.jsonl know.
            "left_out_epoch": spike.epoch,
            "left_out_row": spike.sequence,
            "left_out_rows": spike.num_sequences,
            "rewinds": state.rewinds,
        }
        self._outputs.trackers.log(values, state.step)
        self._progress.warn(
            f"rewound from step {spike.step} to step {state.step}; sequences {spike.sequence} to "
            f"{spike.sequence + spike.num_sequences - 1} of epoch {spike.epoch} are excluded (rewind "
            f"{state.rewinds} of at most {max_rewinds})."
        )
