"""Anneal: decay the learning rate from a checkpoint of a WSD or constant run, in a new run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from ..checkpoint.files import StoredCheckpoint, stored_checkpoints
from ..checkpoint.train_state import TrainState
from ..config.naming import errors_for_caller
from ..config.options import CONFIG_SCHEMA, PretrainConfig
from ..data.batch_plan import fit_micro_batch
from ..distributed.heartbeat import first_choice, started_before
from ..errors import CheckpointError, ConfigError
from ..launch_env import is_main_process, world_size
from ..run_folder import RunFolder
from ..schedule import stable_phase, stored_warmup_steps
from ..training.pretrain import pretrain
from ..training.result import PretrainResult


@errors_for_caller((*CONFIG_SCHEMA, "from_step"))
def decay(
    run: Path,
    tokens: int,
    *,
    from_step: int | None = None,
    output_dir: Path | None = None,
    shape: Literal["linear", "sqrt"] = "linear",
    min_lr_ratio: float | None = None,
    quiet: bool = True,
    handle_signals: bool = False,
) -> PretrainResult:
    """Continue from a checkpoint of a run with a decaying learning rate, in a new folder.

    The data continues where the checkpoint stopped. The original run is not changed, so it can be resumed and
    decayed from other steps. Resume an interrupted decay by `pretrain` with `resume`.

    Args:
        run: output folder of a run with the schedule `wsd` or `constant`.
        tokens: length of the decay, rounded up to whole steps.
        from_step: step of the checkpoint; by default the newest.
        output_dir: folder of the decay; by default beside the run, named after it and the step.
        shape: shape of the decay.
        min_lr_ratio: final learning rate relative to the peak; by default that of the run.
        quiet: see `pretrain`.
        handle_signals: see `pretrain`.

    Raises:
        UserError: for a missing checkpoint or one outside of the stable phase, an output folder with a run,
            and whatever `pretrain` raises.
    """
    checkpoint, others = _checkpoint(RunFolder(run), from_step)
    if from_step is None:
        # A run in progress may save a newer one before another rank looks.
        checkpoint, others = _checkpoint(RunFolder(run), int(first_choice("decay", str(checkpoint.step))))
    beside = run.resolve()
    folder = output_dir or beside.with_name(f"{beside.name}-decay-{checkpoint.step}")
    # Other ranks may look after the main process has begun.
    if is_main_process() and not started_before() and RunFolder(folder).holds_a_run():
        raise ConfigError(
            f"--output-dir {folder} already contains a run; resume it with minimind-train pretrain --resume "
            f"--output-dir {folder}, or name another folder."
        )
    config = decay_config(checkpoint, tokens, folder, shape=shape, min_lr_ratio=min_lr_ratio)
    # Before the folder of the decay is created.
    if is_main_process() and not started_before() and (problem := checkpoint.problem()) is not None:
        advice = f"give --from-step {_listed(others)}" if others else "it is the only one"
        raise CheckpointError(f"{problem.removesuffix('.')}: the checkpoint cannot be used; {advice}.")
    return pretrain(config, branch=True, quiet=quiet, handle_signals=handle_signals)


def decay_config(
    checkpoint: StoredCheckpoint,
    tokens: int,
    output_dir: Path,
    *,
    shape: Literal["linear", "sqrt"] = "linear",
    min_lr_ratio: float | None = None,
) -> PretrainConfig:
    """Return the options of a decay: those of the run, with a `wsd` schedule that decays from the checkpoint.

    A run with these options from the start, without `resume`, takes the same steps. The number of processes
    may differ; the global batch stays.

    Raises:
        CheckpointError: when the checkpoint is not of a stable phase.
        ConfigError: when the global batch is not divisible by the number of processes.
    """
    settings = checkpoint.trainer["settings"]
    state = TrainState.from_dict(checkpoint.trainer["state"])
    trunk = dataclasses.replace(_config_of(settings), warmup_steps=stored_warmup_steps(settings))
    _refuse_unstable(checkpoint, trunk, settings, state)
    global_batch_size = settings["global_batch_size"]
    per_step = global_batch_size * trunk.max_seq_len if trunk.packing else state.tokens / state.step
    steps = max(math.ceil(tokens / per_step), 1)
    last = state.step + steps
    changed = dataclasses.replace(
        trunk,
        global_batch_size=global_batch_size,
        lr_schedule="wsd",
        decay_steps=steps,
        decay_shape=shape,
        min_lr_ratio=trunk.min_lr_ratio if min_lr_ratio is None else min_lr_ratio,
        max_steps=last,
        max_tokens=None,
        # The decay may need more epochs than the run.
        epochs=max(trunk.epochs or 1, math.ceil(last / settings["steps_per_epoch"])),
        # A time limit would move the decay.
        max_time=None,
        budget=None,
        budget_keeps=(),
        profile=False,
        resume=str(checkpoint.path),
        output_dir=str(output_dir),
        run_name=None if trunk.run_name is None else f"{trunk.run_name}-decay-{state.step}",
    )
    return fit_micro_batch(changed, world_size())


def _checkpoint(run: RunFolder, step: int | None) -> tuple[StoredCheckpoint, list[StoredCheckpoint]]:
    """Return the checkpoint of a step, or the newest, and all others; unverified. Refuse a missing one."""
    found = stored_checkpoints(run.checkpoints)
    if not found:
        raise CheckpointError(f"there is no checkpoint in {run.checkpoints}; name the --output-dir of a run.")
    if step is None:
        return found[-1], found[:-1]
    for checkpoint in found:
        if checkpoint.step == step:
            return checkpoint, [other for other in found if other is not checkpoint]
    raise CheckpointError(
        f"--from-step {step} has no checkpoint in {run.checkpoints}, only steps {_listed(found)}; "
        "runs keep more with --keep-every."
    )


def _config_of(settings: dict[str, Any]) -> PretrainConfig:
    """Return the options of a checkpoint, for any number of processes."""
    values = {name: settings[name] for name in CONFIG_SCHEMA if name in settings}
    return PretrainConfig(**{**values, "accumulation_steps": None})


def _refuse_unstable(
    checkpoint: StoredCheckpoint, config: PretrainConfig, settings: dict[str, Any], state: TrainState
) -> None:
    """Refuse a checkpoint outside of the stable phase, by an error that lists the usable checkpoints."""
    if "total_steps" not in settings:
        raise CheckpointError(
            f"{checkpoint.path} is of an older version of minimind; resume its run up to the next "
            "checkpoint, and decay from that."
        )
    phase = stable_phase(config, settings["total_steps"], state.decay_window)
    if phase is None:
        raise CheckpointError(
            f"{checkpoint.path} is of a run with --lr-schedule {config.lr_schedule}, which has no stable "
            "phase to decay from; train the run with --lr-schedule wsd or constant."
        )
    first, last = phase
    if first <= state.step <= last:
        return
    what = "in the warm-up" if state.step < first else "already in the decay"
    fitting = [one for one in stored_checkpoints(checkpoint.path.parent) if first <= one.step <= last]
    advice = f"give --from-step {_listed(fitting)}" if fitting else "none of its checkpoints is"
    raise CheckpointError(
        f"{checkpoint.path} is {what}: the stable phase is from step {first} to step {last}; {advice}. "
        "Runs keep more with --keep-every."
    )


def _listed(checkpoints: list[StoredCheckpoint]) -> str:
    *others, last = [str(checkpoint.step) for checkpoint in checkpoints]
    return f"{', '.join(others)} or {last}" if others else last
