"""One call from a configuration to a trained model."""

from __future__ import annotations

import dataclasses
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..checkpoint.checkpointer import RunCheckpoints
from ..checkpoint.compatibility import settings_of_run
from ..checkpoint.state_dict import reserve_host_memory
from ..checkpoint.store import CheckpointStore
from ..checkpoint.train_state import TrainState
from ..config.options import AUTO, PretrainConfig, due, evaluation_interval
from ..data.batch_plan import BatchPlan, most_tokens, plan_batches
from ..data.loader import Loader, evaluation_batches, steps_in_all
from ..data.prepare import PreparedData, cache_folder, prepare_data
from ..data.shards import TokenShards
from ..distributed.accelerator import check_launch, close_accelerator, start_accelerator
from ..distributed.collectives import run_on_main_and_broadcast
from ..distributed.consistency import check_same_on_all_ranks, run_signature
from ..distributed.failures import report_peer_failures, watch_peers
from ..distributed.heartbeat import begun_before, note_begun
from ..distributed.main_process_first import main_process_first
from ..distributed.shutdown import StopRequest
from ..errors import CheckpointError, ConfigError
from ..evaluation.validation import evaluate
from ..formats.open_model import training_tokenizer
from ..formatting import count, parse_duration
from ..launch_env import is_main_process, restarts
from ..modeling.transformer import MiniMindForCausalLM
from ..run_folder import RunFolder
from ..schedule import learning_rates
from ..tokenizer import Tokenizer
from ..tracking.console import Progress
from ..tracking.environment import describe_environment, describe_launch
from ..tracking.metrics_file import last_with
from ..tracking.trackers import Trackers, check_trackers
from .auto_batch_size import resolve_batch_size
from .build_model import ModelFactory, build_model, resolve_model_config
from .final_model import save_final_model, save_final_weights, write_sample
from .loss_spikes import report_spike
from .peak_flops import peak_flops_of
from .prepared_model import compile_and_wrap, pass_graph
from .profiler import ProfileTrace
from .samples import Samples, check_prompts
from .summary import PretrainResult, banner, summary
from .throughput import Meter
from .trainer import Run, report_evaluation, train, validate


def pretrain(
    config: PretrainConfig,
    *,
    stop_after: int | None = None,
    model_factory: ModelFactory = MiniMindForCausalLM,
    branch: bool = False,
) -> PretrainResult:
    """Train a model as the configuration says, from text files to a model folder.

    Under `accelerate launch` every process calls this. SIGTERM and SIGINT end the run after the step under
    way with its state saved, as `PretrainResult.stopped` then tells.

    Args:
        config: all options.
        stop_after: end the run after this step as a signal would, to go on from there another time.
        model_factory: makes the model to train in place of `MiniMindForCausalLM`, from the shape that the
            options give, in float32 on the CPU. The model is called with the keywords `input_ids`,
            `document_ids` and `position_ids`, of which the last two are None without packing. With
            `shift_labels` and `num_items_in_batch` as well, the `loss` of what it returns is the sum of the
            cross-entropy over the labels that are not -100, divided by the latter; else its `logits` are
            asked for. Unless it is exactly a `MiniMindForCausalLM`, its weights are delivered without a
            config, nothing is sampled, and model FLOPs are not reported.
        branch: the checkpoint to resume is of another run, which this one leaves: it gets a folder and charts
            of its own.

    Raises:
        UserError: for anything the caller can put right: options, data, checkpoints, a loss that diverges.
    """
    started = time.monotonic()
    check_trackers(config)
    folder = RunFolder(Path(config.output_dir))
    with ExitStack() as closing:
        limit = None if config.max_time is None else parse_duration(config.max_time)
        stop = closing.enter_context(StopRequest(limit, started=started))
        progress = Progress(enabled=is_main_process())
        closing.callback(progress.close)
        if (remark := check_launch(config)) is not None:
            progress.note(remark)
        tokenizer, caution = training_tokenizer(config.tokenizer, config.from_weight)
        if caution is not None:
            progress.warn(caution)
        config, shape = resolve_model_config(config, tokenizer)
        check_prompts(config, shape, tokenizer)
        config = dataclasses.replace(config, learning_rate=config.peak_learning_rate)
        # Before the processes are joined: a long build would outlast the patience of those that wait.
        patience = parse_duration(config.dist_timeout)
        with main_process_first(cache_folder(config), patience, progress.note):
            if is_main_process():
                if folder.claim(resume=(config.resume is not None and not branch) or begun_before()):
                    closing.callback(folder.remove_if_empty)
                note_begun()
            # Whichever process comes first builds, and is the one to tell of it.
            builder = progress if is_main_process() else Progress()
            closing.callback(builder.close)
            data = _prepared(config, tokenizer, builder, stop)
            if data.built:
                builder.banner([("data", line) for line in data.report.lines()])
        config = _after_restart(config, folder, progress)

        accelerator = start_accelerator(config)
        closing.callback(close_accelerator, accelerator)
        place = closing.enter_context(report_peer_failures(accelerator))
        fingerprints = {"tokenizer": tokenizer.fingerprint, "training text": data.fingerprint}
        check_same_on_all_ranks(accelerator, run_signature(accelerator, config, fingerprints))
        wanted = config.batch_size
        if wanted == AUTO and model_factory is not MiniMindForCausalLM:
            # What is remembered is known by the shape, which says nothing of another model.
            raise ConfigError("--batch-size auto knows minimind's own model only; give a number.")
        config = resolve_batch_size(
            config, shape, accelerator, partial(compile_and_wrap, config, shape), progress.note
        )
        plan = plan_batches(config, accelerator.num_processes)
        model = build_model(config, shape, model_factory, progress.note)
        # Of a subclass too the shape does not tell what it computes.
        custom = None if type(model) is MiniMindForCausalLM else _describe(model)
        length = most_tokens(config, plan, data.train.num_tokens)
        model, optimizer, compiled = compile_and_wrap(config, shape, plan, accelerator, model, tokens=length)
        loader = _make_loader(config, data, plan, tokenizer, accelerator, trim=not compiled)

        store = CheckpointStore(
            folder.checkpoints,
            config.keep_checkpoints,
            keep_every=config.keep_every,
            on_error=partial(_save_failed, config, progress, stop),
        )
        total_steps = steps_in_all(config, loader, plan)
        settings = settings_of_run(config, shape, plan, tokenizer, data)
        settings |= {"total_steps": total_steps, "steps_per_epoch": loader.steps_per_epoch}
        # For those who read the weights without the run.
        settings["model_config"] = shape.to_dict() if custom is None else None
        checkpoints = RunCheckpoints(store, accelerator, model, optimizer, settings, progress)
        state, saved_step, saved_trackers = checkpoints.resume(config.resume, branch=branch)
        environment = {}
        if accelerator.is_main_process:
            launch = describe_launch(accelerator, compiled=compiled)
            facts = {"launch": launch, "fingerprints": {**fingerprints, "mixture": data.mixture}}
            environment = describe_environment(accelerator.device) | facts
            # A resumed run may find itself on another device: `auto` is kept, and with it the global batch.
            folder.describe(dataclasses.replace(config, batch_size=wanted), environment)
        trackers = Trackers(
            config,
            folder,
            accelerator,
            saved_trackers,
            start_step=state.step,
            environment=environment,
            warn=progress.warn,
        )
        closing.callback(trackers.close)
        checkpoints.trackers = trackers
        # However the run ends, what it has given to be written is written first.
        closing.callback(store.settle)
        epochs = total_steps / loader.steps_per_epoch
        progress.banner(banner(config, shape, plan, data, accelerator, compiled, total_steps, epochs, custom))

        meter = Meter(
            shape.flops_per_token(config.max_seq_len),
            accelerator.num_processes,
            peak_flops_of(accelerator.device) if custom is None else None,
            state.ending[1] if state.ending else total_steps,
            start_step=state.step,
            intervals=_intervals(config, data),
            device=accelerator.device,
        )
        run = Run(
            config=config,
            accelerator=accelerator,
            model=model,
            optimizer=optimizer,
            loader=loader,
            validation=_validation(config, plan, data.validation, tokenizer, accelerator),
            bytes_per_token=_bytes_per_token(tokenizer, shape.vocab_size, accelerator.device),
            learning_rate=learning_rates(config, total_steps),
            total_steps=total_steps,
            meter=meter,
            progress=progress,
            trackers=trackers,
            save=checkpoints.save,
            mark_best=checkpoints.mark_best,
            stop=stop,
            stop_after=stop_after,
            report_spike=partial(report_spike, accelerator, model, loader, tokenizer.decode, folder.spikes),
            go_back=checkpoints.go_back,
        )
        run.graph = pass_graph(run, shape, compiled=compiled)
        if config.sample_interval is not None:
            run.samples = Samples(
                config, shape, model, tokenizer, accelerator, folder,
                start_step=state.step, log_text=trackers.log_text,
            )  # fmt: skip
            closing.callback(run.samples.close)
        if config.profile:
            trace = ProfileTrace(
                folder.profile,
                accelerator.device,
                process_index=accelerator.process_index,
                start_step=state.step,
                note=progress.note,
            )
            run.after_step = closing.enter_context(trace).step
        run.saved_step = saved_step
        # Entered last, so left first: a process that fails by itself is not ended while it cleans up.
        closing.enter_context(watch_peers(accelerator, place, patience, stop, store.settle))
        progress.start(run.last_step(state), state.step)
        reserve_host_memory(accelerator, model, optimizer)
        _look_before_the_first_step(run, state, folder)
        train(run, state)
        run_on_main_and_broadcast(accelerator, partial(_last_save, config, store))
        sample = ""
        if not state.stopping and custom is not None:
            save_final_weights(accelerator, model, tokenizer, folder.model)
        elif not state.stopping:
            save_final_model(accelerator, model, shape, tokenizer, folder.model)
            if accelerator.is_main_process:
                sample = write_sample(folder.model, tokenizer, config.seed, accelerator.device)
        totals = meter.totals()
        trackers.log({f"total_{name}": value for name, value in totals.items()}, state.step)
        evaluation = run.last_evaluation
        result = PretrainResult(
            model_dir=folder.model,
            steps=state.step,
            tokens=state.tokens,
            loss=run.last_loss,
            val_loss=evaluation.loss if evaluation else None,
            bits_per_byte=evaluation.bits_per_byte if evaluation else None,
            tokens_per_second=totals["tokens_per_second"],
            seconds=time.monotonic() - started,
            sample=sample,
            stopped=_why_stopped(stop, state, stop_after) if state.stopping else None,
        )
        progress.summary(summary(result, totals, meter.bottleneck(), state.skipped_steps, state.rewinds))
        # Only a run that got this far waits for the others: one that failed must not.
        accelerator.wait_for_everyone()
        return result


def _prepared(
    config: PretrainConfig, tokenizer: Tokenizer, builder: Progress, stop: StopRequest
) -> PreparedData:
    """Return the tokenized text, leaving off where a signal asks to: that may take hours.

    A process whose turn comes because the one before it failed is asked to by the launcher.
    """

    def show(done: int, total: int) -> None:
        stop.exit_if_signalled()
        builder.data_build(done, total)

    try:
        return prepare_data(config, tokenizer, show)
    finally:
        stop.exit_if_signalled()


def _after_restart(config: PretrainConfig, folder: RunFolder, progress: Progress) -> PretrainConfig:
    """Return the options of a run that the launcher started anew: it goes on where it was saved last."""
    # A checkpoint named by --resume counts until there are newer ones.
    if not restarts() or (config.resume is not None and not folder.checkpoints.exists()):
        return config
    progress.note(f"restart {restarts()} by the launcher: going on as with --resume.")
    return dataclasses.replace(config, resume="auto")


def _describe(model: nn.Module) -> str:
    return f"{count(sum(tensor.numel() for tensor in model.parameters()))} parameters: {type(model).__name__}"


def _make_loader(
    config: PretrainConfig,
    data: PreparedData,
    plan: BatchPlan,
    tokenizer: Tokenizer,
    accelerator: Accelerator,
    *,
    trim: bool,
) -> Loader:
    return Loader(
        data.train,
        seq_len=config.max_seq_len,
        packing=config.packing,
        plan=plan,
        seed=config.seed,
        process_index=accelerator.process_index,
        device=accelerator.device,
        pad_token_id=tokenizer.pad_token_id,
        trim=trim,
        weights=data.weights,
    )


def _validation(
    config: PretrainConfig,
    plan: BatchPlan,
    shards: TokenShards | None,
    tokenizer: Tokenizer,
    accelerator: Accelerator,
) -> Any:
    """Return a function from a number of batches, None for all, to this process's validation batches."""
    if shards is None:
        return None
    return lambda max_batches: evaluation_batches(
        shards,
        seq_len=config.max_seq_len,
        packing=config.packing,
        batch_size=plan.micro_batch_size,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        device=accelerator.device,
        max_batches=max_batches,
        pad_token_id=tokenizer.pad_token_id,
    )


def _bytes_per_token(tokenizer: Tokenizer, vocab_size: int, device: torch.device) -> torch.Tensor:
    table = torch.zeros(vocab_size)
    table[: tokenizer.vocab_size] = torch.from_numpy(tokenizer.bytes_per_token())
    return table.to(device)


def _intervals(config: PretrainConfig, data: PreparedData) -> dict[str, int]:
    """Return the steps between the phases that the time left has to count."""
    intervals = {"saving": config.save_interval}
    if data.validation is not None:
        intervals["evaluation"] = evaluation_interval(config)
    if config.sample_interval is not None:
        intervals["sampling"] = config.sample_interval
    return intervals


def _save_failed(
    config: PretrainConfig, progress: Progress, stop: StopRequest, error: CheckpointError
) -> None:
    """Say that a save failed; called from the thread that writes."""
    progress.warn(str(error))
    if config.on_save_error == "stop":
        stop.ask("--on-save-error stop")


def _last_save(config: PretrainConfig, store: CheckpointStore) -> None:
    """Wait until all is written.

    Raises:
        CheckpointError: where a failed save is to end the run.
    """
    store.settle()
    if config.on_save_error == "stop":
        store.wait()


def _why_stopped(stop: StopRequest, state: TrainState, stop_after: int | None) -> str:
    if stop.reason is not None:
        return stop.reason
    return "the step asked for" if state.step == stop_after else "another process"


def _look_before_the_first_step(run: Run, state: TrainState, folder: RunFolder) -> None:
    """Run one validation batch, so that what would fail at the first evaluation fails at once.

    A resumed run instead makes up for an evaluation that its checkpoint was written just before, or for the
    mark of the best checkpoint that follows it.
    """
    if run.validation is None:
        return
    with run.meter.phase("evaluation"):
        result = evaluate(run.model, run.validation(1), run.bytes_per_token, run.accelerator)
    if state.step == 0 and result is not None:
        report_evaluation(run, state, result)
    elif state.step == run.total_steps or due(state.step, evaluation_interval(run.config)):
        step, loss = run_on_main_and_broadcast(
            run.accelerator, lambda: last_with(folder.metrics, "val_loss") or (-1, None)
        )
        if step != state.step:
            validate(run, state)
        elif loss is not None and loss < state.best_val_loss:
            state.best_val_loss = loss
            run.mark_best(state)
