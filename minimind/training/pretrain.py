"""`pretrain`: from a configuration to a trained model."""

from __future__ import annotations

import dataclasses
import time
from contextlib import ExitStack
from pathlib import Path

from ..checkpoint.resume import check_parts, check_resumable, resume_source
from ..config.naming import errors_for_caller
from ..config.options import AUTO, CONFIG_SCHEMA, PretrainConfig
from ..data.documents import Documents
from ..data.prepare import PreparedData, cache_folder, prepare_data
from ..distributed.accelerator import close_accelerator, start_accelerator
from ..distributed.collectives import run_on_main_and_broadcast
from ..distributed.consistency import check_same_on_all_ranks, run_signature
from ..distributed.failures import report_peer_failures, watch_peers
from ..distributed.heartbeat import record_start, started_before
from ..distributed.launcher import watch_launcher
from ..distributed.main_process_first import main_process_first
from ..distributed.shutdown import StopRequest
from ..formatting import parse_duration
from ..launch_env import is_main_process, restarts
from ..modeling.transformers_config import TransformersConfig
from ..run_folder import RunFolder
from ..tracking.console import Progress
from ..tracking.trackers import check_trackers
from .build_trainer import Session, TrainerBuilder
from .callbacks import Callbacks, Run
from .custom_parts import CustomParts
from .final_model import keep_initial, save_final_model, save_final_weights, write_sample
from .result import PretrainResult
from .samples import check_prompts
from .setup import RunInputs, TrainingParts, build_training, resolve_run, torch_for_training
from .summary import card_of_run, finished_result, summarize
from .trainer import Trainer

# The signal handlers and the state of Accelerate belong to one run at a time.


@errors_for_caller(CONFIG_SCHEMA)
def pretrain(
    config: PretrainConfig,
    custom: CustomParts | None = None,
    *,
    quiet: bool = True,
    handle_signals: bool = False,
    stop_after: int | None = None,
    branch: bool = False,
) -> PretrainResult:
    """Train a model with options that are all chosen; see `minimind.planning.budget.pretrain`."""
    started, custom = time.monotonic(), custom or CustomParts()
    check_trackers(config, custom.trackers)
    custom.check(config)
    callbacks = Callbacks(custom.callbacks)
    with ExitStack() as closing:
        closing.enter_context(torch_for_training())
        session = _open_session(config, started, closing, quiet=quiet, handle_signals=handle_signals)
        progress, stop = session.progress, session.stop
        source = resume_source(config.resume, session.folder)
        if source is not None:
            check_parts(source, session.folder, custom.given)
        options = resolve_run(_after_restart(config, source, session), progress.note)
        data = _claim_and_tokenize(options, session, custom.data, source=None if branch else source)
        closing.enter_context(stop.announced(progress.note))

        # init_process_group waits for the other ranks in C++, where Python runs no signal handler.
        with stop.default_handlers():
            accelerator = start_accelerator(options.config)
        closing.callback(close_accelerator, accelerator)
        place = closing.enter_context(report_peer_failures(accelerator))
        fingerprints = {"tokenizer": options.tokenizer.fingerprint, "training text": data.fingerprint}
        shared = run_signature(accelerator, dataclasses.asdict(options.config), fingerprints)
        check_same_on_all_ranks(accelerator, shared)
        inputs = options.with_batch_size(accelerator, progress.note)
        inputs = inputs.with_learning_rate(data.train, accelerator.num_processes, progress.note)
        parts = build_training(
            inputs,
            data.train,
            accelerator,
            tokens_per_epoch=data.train.num_tokens,
            weights=data.weights,
            custom=custom,
            note=progress.note,
        )
        closing.callback(parts.release)
        total_steps = inputs.total_steps(parts.loader, parts.plan)
        builder = TrainerBuilder(session, inputs, parts, data, accelerator, total_steps, custom, callbacks)
        if options.config.resume == AUTO and not branch:
            done = builder.finished_state()
            if done is not None:
                progress.note(
                    f"finished ({done['step']:,}/{total_steps:,} steps); --max-steps or --epochs trains on."
                )
                return finished_result(session.folder, done, time.monotonic() - started)
        # `auto` is kept in the run's file: it may be resumed on another device.
        written = dataclasses.replace(inputs.config, batch_size=options.config.batch_size)
        trainer = builder.build(written, builder.environment(fingerprints), branch=branch)
        trainer.stop_after = stop_after
        # Last in the ExitStack, so that the watchdog ends before cleanup.
        store, timeout = trainer.checkpointer.store, parse_duration(config.dist_timeout)
        closing.enter_context(watch_peers(accelerator, place, timeout, stop, store.wait_until_written))
        progress.start(trainer.last_step, trainer.state.step)
        trainer.checkpointer.reserve_host_memory()
        state, last_step = (lambda: trainer.state), (lambda: trainer.last_step)
        callbacks.start(Run(inputs.config, parts.model, accelerator, state, last_step, stop, store))
        trainer.sanity_check_validation()
        trainer.train()
        # With --on-save-error stop, a save that failed raises.
        finish = store.wait if config.on_save_error == "stop" else store.wait_until_written
        run_on_main_and_broadcast(accelerator, finish)
        sample = "" if trainer.state.stopping else _save_final(trainer, parts, inputs, session.folder)
        # A launcher ends a rank when another one has ended.
        stop.finish()
        result = summarize(trainer, parts, session.folder, started, sample)
        # Only a run that completed waits for the other ranks.
        accelerator.wait_for_everyone()
        callbacks.end(result)
        return result


def _open_session(
    config: PretrainConfig, started: float, closing: ExitStack, *, quiet: bool, handle_signals: bool
) -> Session:
    limit = None if config.max_time is None else parse_duration(config.max_time)
    stop = StopRequest(limit, started=started)
    if handle_signals:
        closing.enter_context(stop)
    closing.enter_context(watch_launcher(stop))
    progress = Progress(enabled=is_main_process(), quiet=quiet)
    closing.callback(progress.close)
    return Session(RunFolder(Path(config.output_dir)), progress, stop, closing)


def _after_restart(config: PretrainConfig, source: str | None, session: Session) -> PretrainConfig:
    """Return the options with what to resume: after a restart by the launcher, the last checkpoint."""
    # A checkpoint named by --resume counts until there are newer ones.
    if restarts() and (source is None or session.folder.checkpoints.exists()):
        session.progress.note(f"restart {restarts()} by the launcher: resuming as with --resume.")
        source = AUTO
    return dataclasses.replace(config, resume=source)


def _claim_and_tokenize(
    options: RunInputs, session: Session, documents: Documents | None, *, source: str | None
) -> PreparedData:
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
            if isinstance(options.model_config, TransformersConfig):
                keep_initial(options.model_config, session.folder)
            record_start()
        # The rank that comes first builds the cache, and shows it.
        builder = progress if is_main_process() else Progress(quiet=progress.quiet)
        session.closing.callback(builder.close)

        def show(done: int, total: int) -> None:
            stop.exit_if_signalled()
            builder.data_build(done, total)

        try:
            data = prepare_data(config, options.tokenizer, show, documents)
        finally:
            stop.exit_if_signalled()
        whole = config.verbose and is_main_process()
        if whole or data.built:
            lines = data.report.lines() if whole else data.report.problems()
            builder.banner([("data", line) for line in lines])
    return data


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
