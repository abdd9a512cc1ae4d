"""`pretrain`: from a configuration to a trained model."""

from __future__ import annotations

import dataclasses
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..checkpoint.checkpointer import RunCheckpoints, finished_state
from ..checkpoint.compatibility import settings_of_run
from ..checkpoint.resume import check_resumable, resume_source
from ..checkpoint.state_dict import reserve_host_memory
from ..checkpoint.store import CheckpointStore
from ..checkpoint.train_state import TrainState
from ..config.checks import run_notes
from ..config.naming import errors_for_caller
from ..config.options import AUTO, CONFIG_SCHEMA, PretrainConfig
from ..data.prepare import PreparedData, cache_folder, prepare_data
from ..distributed.accelerator import close_accelerator, start_accelerator
from ..distributed.collectives import run_on_main_and_broadcast
from ..distributed.consistency import check_same_on_all_ranks, run_signature
from ..distributed.failures import report_peer_failures, watch_peers
from ..distributed.heartbeat import record_start, started_before
from ..distributed.launcher import watch_launcher
from ..distributed.main_process_first import main_process_first
from ..distributed.shutdown import StopRequest
from ..errors import CheckpointError
from ..formatting import parse_duration
from ..launch_env import is_main_process, restarts
from ..modeling.transformer import MiniMindForCausalLM
from ..optim.build import fit_to_horizon
from ..run_folder import RunFolder
from ..schedule import WARMUP_KEY, LearningRateSchedule, expected_steps, resume_schedule
from ..tracking.console import Progress
from ..tracking.environment import describe_environment, describe_launch
from ..tracking.live_report import LiveReport
from ..tracking.trackers import check_trackers
from .build_model import ModelFactory
from .evaluator import Evaluator
from .final_model import save_final_model, save_final_weights, write_sample
from .forecast import run_forecast
from .loss_spikes import SpikeReporter
from .outputs import Outputs
from .peak_flops import peak_flops_of
from .profiler import ProfileTrace
from .samples import check_prompts
from .setup import (
    RunInputs,
    TrainingParts,
    build_training,
    check_auto_batch_size,
    resolve_run,
    torch_for_training,
)
from .summary import PretrainResult, banner, card_of_run, finished_result, run_facts, summarize
from .throughput import Meter
from .time_limits import budget_clock
from .trainer import Trainer

# The signal handlers and the state of Accelerate belong to one run at a time.


@errors_for_caller(CONFIG_SCHEMA)
def pretrain(
    config: PretrainConfig,
    *,
    stop_after: int | None = None,
    model_factory: ModelFactory = MiniMindForCausalLM,
    branch: bool = False,
) -> PretrainResult:
    """Train a model with options that are all chosen; the steps behind `minimind.pretrain`.

    Args:
        config: all options.
        stop_after: see `minimind.planning.budget.pretrain`, as of the others.
        model_factory: builds the model.
        branch: the checkpoint to resume belongs to another run.

    Raises:
        UserError: for anything the caller can fix: options, data, checkpoints, a loss that diverges.
    """
    started = time.monotonic()
    check_trackers(config)
    check_auto_batch_size(config, model_factory)
    with ExitStack() as closing:
        closing.enter_context(torch_for_training())
        session = _open_session(config, started, closing)
        progress, stop = session.progress, session.stop
        source = resume_source(config.resume, session.folder)
        options = resolve_run(_after_restart(config, source, session), progress.note)
        data = _claim_and_tokenize(options, session, source=None if branch else source)
        closing.enter_context(stop.announced(progress.note))

        accelerator = start_accelerator(options.config)
        closing.callback(close_accelerator, accelerator)
        place = closing.enter_context(report_peer_failures(accelerator))
        fingerprints = {"tokenizer": options.tokenizer.fingerprint, "training text": data.fingerprint}
        shared = run_signature(accelerator, dataclasses.asdict(options.config), fingerprints)
        check_same_on_all_ranks(accelerator, shared)
        inputs = options.with_batch_size(accelerator, progress.note)
        parts = build_training(
            inputs,
            data.train,
            accelerator,
            tokens_per_epoch=data.train.num_tokens,
            weights=data.weights,
            model_factory=model_factory,
            note=progress.note,
        )
        total_steps = inputs.total_steps(parts.loader, parts.plan)
        run = _Run(session, inputs, parts, data, accelerator, total_steps)
        if options.config.resume == AUTO and not branch:
            done = run.finished_state()
            if done is not None:
                progress.note(
                    f"finished ({done['step']:,}/{total_steps:,} steps); --max-steps or --epochs trains on."
                )
                return finished_result(session.folder, done, time.monotonic() - started)
        # `auto` is kept in the run's file: it may be resumed on another device.
        written = dataclasses.replace(inputs.config, batch_size=options.config.batch_size)
        trainer = run.build_trainer(written, run.environment(fingerprints), branch=branch)
        trainer.stop_after = stop_after
        # Last in the ExitStack, so that the watchdog ends before cleanup.
        store, timeout = trainer.checkpointer.store, parse_duration(config.dist_timeout)
        closing.enter_context(watch_peers(accelerator, place, timeout, stop, store.wait_until_written))
        progress.start(trainer.last_step, trainer.state.step)
        reserve_host_memory(accelerator, parts.model, parts.optimizer)
        trainer.sanity_check_validation()
        trainer.train()
        run_on_main_and_broadcast(accelerator, partial(_finish_saving, inputs.config, store))
        sample = "" if trainer.state.stopping else _save_final(trainer, parts, inputs, session.folder)
        result = summarize(trainer, parts, session.folder, started, sample)
        # Only a run that completed waits for the other ranks.
        accelerator.wait_for_everyone()
        return result


@dataclass(frozen=True)
class _Session:
    """What the parts of `pretrain` share: output folder, terminal, stop requests, and what the end closes."""

    folder: RunFolder
    progress: Progress
    stop: StopRequest
    closing: ExitStack


def _open_session(config: PretrainConfig, started: float, closing: ExitStack) -> _Session:
    limit = None if config.max_time is None else parse_duration(config.max_time)
    stop = closing.enter_context(StopRequest(limit, started=started))
    closing.enter_context(watch_launcher(stop))
    progress = Progress(enabled=is_main_process())
    closing.callback(progress.close)
    return _Session(RunFolder(Path(config.output_dir)), progress, stop, closing)


def _after_restart(config: PretrainConfig, source: str | None, session: _Session) -> PretrainConfig:
    """Return the options with what to resume: after a restart by the launcher, the last checkpoint."""
    # A checkpoint named by --resume counts until there are newer ones.
    if restarts() and (source is None or session.folder.checkpoints.exists()):
        session.progress.note(f"restart {restarts()} by the launcher: resuming as with --resume.")
        source = AUTO
    return dataclasses.replace(config, resume=source)


def _claim_and_tokenize(options: RunInputs, session: _Session, *, source: str | None) -> PreparedData:
    """Lock the output folder and tokenize the data, before the ranks are joined: that may take hours.

    `source` is what the user asked to resume.

    Raises:
        KeyboardInterrupt: where a signal asks to stop, also on a rank that continues because another failed.
    """
    config, progress, stop = options.config, session.progress, session.stop
    if config.sample_interval is not None:
        check_prompts(config.sample_prompt, options.model_config.max_position_embeddings, options.tokenizer)
    with main_process_first(cache_folder(config), parse_duration(config.dist_timeout), progress.note):
        if is_main_process():
            # The processes that the launcher replaced may still be ending.
            wait_seconds = 60.0 if restarts() else 0.0
            resumes = source is not None or started_before()
            claim = session.folder.claim(resume=resumes, wait_seconds=wait_seconds, note=progress.note)
            session.closing.enter_context(claim)
            if source == AUTO:
                check_resumable(session.folder)
            session.folder.save_options(config)
            record_start()
        # The rank that comes first builds the cache, and shows it.
        builder = progress if is_main_process() else Progress()
        session.closing.callback(builder.close)

        def show(done: int, total: int) -> None:
            stop.exit_if_signalled()
            builder.data_build(done, total)

        try:
            data = prepare_data(config, options.tokenizer, show)
        finally:
            stop.exit_if_signalled()
        if data.built or (config.verbose and is_main_process()):
            lines = data.report.lines() if config.verbose else data.report.problems()
            builder.banner([("data", line) for line in lines])
    return data


@dataclass(frozen=True)
class _Run:
    """What the trainer of a run is built from."""

    session: _Session
    inputs: RunInputs
    parts: TrainingParts
    data: PreparedData
    accelerator: Accelerator
    total_steps: int

    def finished_state(self) -> dict[str, Any] | None:
        """Return the training state where the run has finished; every rank must call this."""
        inputs, plan = self.inputs, self.parts.plan
        settings = settings_of_run(inputs.config, inputs.model_config, plan, inputs.tokenizer, self.data)
        find = partial(finished_state, self.session.folder, self.total_steps, settings)
        return run_on_main_and_broadcast(self.accelerator, find)

    def environment(self, fingerprints: dict[str, str]) -> dict[str, Any]:
        """Return what the run runs on; empty on all ranks but the main process."""
        accelerator = self.accelerator
        if not accelerator.is_main_process:
            return {}
        launch = describe_launch(accelerator, compiled=self.parts.compiled)
        facts = {"launch": launch, "fingerprints": {**fingerprints, "mixture": self.data.mixture}}
        return describe_environment(accelerator.device) | facts

    def build_trainer(self, written: PretrainConfig, environment: dict[str, Any], *, branch: bool) -> Trainer:
        """Load the checkpoint to resume, open all outputs, and return the trainer.

        `written` are the options as the run's folder keeps them.
        """
        session, inputs, parts, total_steps = self.session, self.inputs, self.parts, self.total_steps
        accelerator, model_config, config = self.accelerator, inputs.model_config, inputs.config
        progress, closing = session.progress, session.closing
        store = CheckpointStore(
            session.folder.checkpoints,
            config.keep_checkpoints,
            keep_every=config.keep_every,
            on_error=partial(_save_failed, config, progress, session.stop),
        )
        settings = settings_of_run(config, model_config, parts.plan, inputs.tokenizer, self.data) | {
            "total_steps": total_steps,
            "steps_per_epoch": parts.loader.steps_per_epoch,
            # For those who read the weights without the run.
            "model_config": model_config.to_dict() if parts.custom_model is None else None,
        }
        fit_to_horizon(parts.optimizer, expected_steps(config, total_steps))
        checkpointer = RunCheckpoints(store, accelerator, parts.model, parts.optimizer, settings, progress)
        state, saved_step, tracker_ids = checkpointer.resume(config.resume, branch=branch)
        schedule = self._schedule(checkpointer, state, branch=branch)
        settings[WARMUP_KEY] = schedule.warmup_steps
        if accelerator.is_main_process:
            session.folder.describe(written, environment)
        outputs = Outputs(inputs, session.folder, accelerator, parts.model, environment, progress)
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
            evaluator=self._evaluator(),
            spikes=SpikeReporter(
                accelerator, parts.model, parts.loader, inputs.tokenizer, session.folder.spikes
            ),
            graph=parts.graph,
            profiler=self._profiler(state),
            budget=budget_clock(config, model_config.num_parameters(), state.budget_seconds),
            forecast=None if config.budget is None else run_forecast(model_config, self.data),
            saved_step=saved_step,
        )

    def _schedule(
        self, checkpointer: RunCheckpoints, state: TrainState, *, branch: bool
    ) -> LearningRateSchedule:
        """Return the schedule, which a resumed run continues; may release the decay window of `state`."""
        config = self.inputs.config
        if (saved := checkpointer.saved_settings) is None:
            return LearningRateSchedule(config, self.total_steps)
        resumed = resume_schedule(
            config, self.total_steps, saved=saved, step=state.step, decay_window=state.decay_window
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

    def _evaluator(self) -> Evaluator | None:
        inputs, parts, validation = self.inputs, self.parts, self.data.validation
        if validation is None:
            return None
        return Evaluator(
            validation,
            parts.model,
            self.accelerator,
            inputs.tokenizer,
            vocab_size=inputs.model_config.vocab_size,
            seq_len=inputs.config.max_seq_len,
            packing=inputs.config.packing,
            plan=parts.plan,
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


def _finish_saving(config: PretrainConfig, store: CheckpointStore) -> None:
    """Wait until all checkpoints are written.

    Raises:
        CheckpointError: where a save failed, with --on-save-error stop.
    """
    store.wait_until_written()
    if config.on_save_error == "stop":
        store.wait()


def _save_final(trainer: Trainer, parts: TrainingParts, inputs: RunInputs, folder: RunFolder) -> str:
    """Write the model folder, and return a text generated by it; every rank must call this."""
    accelerator, tokenizer = trainer.accelerator, inputs.tokenizer
    card = card_of_run(trainer, parts.custom_model)
    if parts.custom_model is not None:
        save_final_weights(accelerator, trainer.model, tokenizer, folder.model, card)
        return ""
    save_final_model(accelerator, trainer.model, inputs.model_config, tokenizer, folder.model, card)
    if not accelerator.is_main_process:
        return ""
    return write_sample(folder.model, tokenizer, inputs.config.seed, accelerator.device)
