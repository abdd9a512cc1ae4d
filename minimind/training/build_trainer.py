"""Build the trainer of a run from its inputs: checkpoints, outputs, schedule, meter and evaluator."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from accelerate import Accelerator

from ..checkpoint.checkpointer import RunCheckpoints, finished_state
from ..checkpoint.compatibility import settings_of_run
from ..checkpoint.store import CheckpointStore
from ..checkpoint.train_state import TrainState
from ..config.checks import run_notes
from ..config.options import PretrainConfig
from ..data.prepare import PreparedData
from ..distributed.accelerator import shown_precision
from ..distributed.collectives import run_on_main_and_broadcast
from ..distributed.shutdown import StopRequest
from ..errors import CheckpointError
from ..optim.build import fit_to_horizon
from ..run_folder import RunFolder
from ..schedule import WARMUP_KEY, LearningRateSchedule, expected_steps, resume_schedule
from ..tracking.console import Progress
from ..tracking.environment import describe_environment, describe_launch
from ..tracking.live_report import LiveReport
from .callbacks import Callbacks
from .custom_parts import CustomParts
from .evaluator import Evaluator
from .forecast import RunForecast
from .loss_spikes import SpikeReporter
from .outputs import Outputs
from .peak_flops import peak_flops_of
from .profiler import ProfileTrace
from .setup import RunInputs, TrainingParts
from .summary import banner, run_facts
from .throughput import Meter
from .time_limits import budget_clock
from .trainer import Trainer


@dataclass(frozen=True)
class Session:
    """What the parts of `pretrain` share: output folder, terminal, stop requests, and what the end closes."""

    folder: RunFolder
    progress: Progress
    stop: StopRequest
    closing: ExitStack


@dataclass(frozen=True)
class TrainerBuilder:
    """What the trainer of a run is built from."""

    session: Session
    inputs: RunInputs
    parts: TrainingParts
    data: PreparedData
    accelerator: Accelerator
    total_steps: int
    custom: CustomParts
    callbacks: Callbacks

    def finished_state(self) -> dict[str, Any] | None:
        """Return the training state where the run has finished; every rank must call this."""
        inputs, plan = self.inputs, self.parts.plan
        settings = settings_of_run(inputs.config, inputs.model_config, plan, inputs.tokenizer, self.data)
        settings["custom_parts"] = self.parts.custom_names
        find = partial(finished_state, self.session.folder, self.total_steps, settings)
        return run_on_main_and_broadcast(self.accelerator, find)

    def environment(self, fingerprints: dict[str, str]) -> dict[str, Any]:
        """Return what the run runs on; empty on all ranks but the main process."""
        accelerator = self.accelerator
        if not accelerator.is_main_process:
            return {}
        precision = shown_precision(self.inputs.config, accelerator)
        launch = describe_launch(accelerator, precision=precision, compiled=self.parts.compiled)
        custom = {name: part for name, part in self.parts.custom_names.items() if part}
        facts = {"launch": launch, "fingerprints": {**fingerprints, "mixture": self.data.mixture}}
        if custom:
            facts["custom_parts"] = custom
        return describe_environment(accelerator.device) | facts

    def build(self, written: PretrainConfig, environment: dict[str, Any], *, branch: bool) -> Trainer:
        """Load the checkpoint to resume, open all outputs, and return the trainer.

        `written` are the options as the run's folder keeps them.
        """
        session, inputs, parts, total_steps = self.session, self.inputs, self.parts, self.total_steps
        accelerator, model_config, config = self.accelerator, inputs.model_config, inputs.config
        progress, closing, validation = session.progress, session.closing, self.data.validation
        store = CheckpointStore(
            session.folder.checkpoints,
            config.keep_checkpoints,
            keep_every=config.keep_every,
            on_error=partial(_save_failed, config, progress, session.stop),
        )
        settings = settings_of_run(config, model_config, parts.plan, inputs.tokenizer, self.data) | {
            "custom_parts": parts.custom_names,
            "total_steps": total_steps,
            "steps_per_epoch": parts.loader.steps_per_epoch,
            # For those who read the weights without the run.
            "model_config": model_config.to_dict() if parts.custom_model is None else None,
        }
        steps = expected_steps(config, total_steps)
        fit_to_horizon(parts.optimizer, steps, steps / parts.loader.steps_per_epoch)
        checkpointer = RunCheckpoints(
            store, accelerator, parts.model, parts.optimizer, settings, progress, self.callbacks
        )
        state, saved_step, tracker_ids = checkpointer.resume(config.resume, branch=branch)
        schedule = self._schedule(checkpointer, state, branch=branch)
        settings[WARMUP_KEY] = schedule.warmup_steps
        if accelerator.is_main_process:
            session.folder.describe(written, environment)
        outputs = Outputs(
            inputs, session.folder, accelerator, parts.model, environment, progress, self.custom.trackers
        )
        outputs.open(state.step, tracker_ids)
        closing.callback(outputs.close)
        checkpointer.trackers = outputs.trackers
        # Flush pending checkpoint writes however the run ends.
        closing.callback(store.wait_until_written)
        steps_per_epoch = parts.loader.steps_per_epoch
        for note in run_notes(config, total_steps, steps_per_epoch, schedule.warmup_steps):
            progress.note(note)
        rows = banner(inputs, parts, self.data, accelerator, total_steps)
        progress.banner(rows)
        meter = self._meter(state)
        if accelerator.is_main_process:
            facts = run_facts(written, session.folder, rows, self.data, environment, total_steps)
            outputs.report = LiveReport(
                session.folder, facts, warnings=progress.warnings, totals=meter.totals, warn=progress.warn
            )
            closing.enter_context(outputs.report)
        return Trainer(
            config=config,
            model_config=model_config,
            accelerator=accelerator,
            model=parts.model,
            optimizer=parts.optimizer,
            loader=parts.loader,
            schedule=schedule,
            total_steps=total_steps,
            checkpointer=checkpointer,
            outputs=outputs,
            meter=meter,
            progress=progress,
            stop=session.stop,
            state=state,
            evaluator=Evaluator(validation, inputs, parts, accelerator) if validation else None,
            spikes=SpikeReporter(
                accelerator, parts.model, parts.loader, inputs.tokenizer, session.folder.spikes
            ),
            callbacks=self.callbacks,
            graphs=parts.graphs,
            profiler=self._profiler(state),
            budget=budget_clock(config, model_config.num_parameters(), state.budget_seconds),
            forecast=RunForecast(model_config, self.data) if config.budget and validation else None,
            saved_step=saved_step,
        )

    def _schedule(
        self, checkpointer: RunCheckpoints, state: TrainState, *, branch: bool
    ) -> LearningRateSchedule:
        """Return the schedule, which a resumed run continues; may release the decay window of `state`."""
        config, custom = self.inputs.config, self.custom.schedule
        if (saved := checkpointer.saved_settings) is None:
            return LearningRateSchedule(config, self.total_steps, custom=custom)
        resumed = resume_schedule(
            config,
            self.total_steps,
            saved=saved,
            step=state.step,
            decay_window=state.decay_window,
            custom=custom,
        )
        state.decay_window = resumed.decay_window
        for note in resumed.notes if not branch else ():
            self.session.progress.note(note)
        return resumed.schedule

    def _meter(self, state: TrainState) -> Meter:
        config, accelerator = self.inputs.config, self.accelerator
        # Steps between the phases that the remaining time includes.
        intervals = {"saving": config.save_interval}
        if self.data.validation is not None:
            intervals["evaluation"] = config.evaluation_interval
        if probes := [n for n in (config.sample_interval, config.score_interval) if n is not None]:
            intervals["sampling"] = min(probes)
        return Meter(
            self.inputs.model_config.flops_per_token(config.max_seq_len),
            accelerator.num_processes,
            peak_flops_of(accelerator.device) if self.parts.custom_model is None else None,
            state.decay_window[1] if state.decay_window else self.total_steps,
            start_step=state.step,
            intervals=intervals,
            device=accelerator.device,
        )

    def _profiler(self, state: TrainState) -> ProfileTrace | None:
        session, accelerator = self.session, self.accelerator
        if not self.inputs.config.profile:
            return None
        trace = ProfileTrace(
            session.folder.profile,
            accelerator.device,
            process_index=accelerator.process_index,
            start_step=state.step,
            note=session.progress.note,
        )
        return session.closing.enter_context(trace)


def _save_failed(
    config: PretrainConfig, progress: Progress, stop: StopRequest, error: CheckpointError
) -> None:
    """Warn that a save failed; called from the thread that writes."""
    progress.warn(str(error))
    if config.on_save_error == "stop":
        stop.request("--on-save-error stop")
