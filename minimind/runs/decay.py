"""A finished model from the stable phase of a run: a branch that decays, and a trunk that stays as it is."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from ..checkpoint.files import StoredCheckpoint, stored_checkpoints
from ..checkpoint.train_state import TrainState
from ..config.options import PretrainConfig
from ..config.schema import schema_of
from ..data.batch_plan import fitted_to
from ..distributed.heartbeat import begun_before, first_choice
from ..errors import CheckpointError, ConfigError
from ..launch_env import is_main_process, world_size
from ..run_folder import RunFolder
from ..schedule import stable_phase, warmup_steps
from ..training.pretrain import pretrain
from ..training.summary import PretrainResult


def decay(
    run: Path,
    tokens: int,
    *,
    from_step: int | None = None,
    output_dir: Path | None = None,
    shape: Literal["linear", "sqrt"] = "linear",
    min_lr_ratio: float | None = None,
) -> PretrainResult:
    """Go on from a checkpoint of a run while the learning rate falls, in a folder of its own.

    The rows are those that the run would have trained on next. Nothing in its folder is changed, so it can be
    resumed, and decayed from elsewhere. A decay that was stopped goes on by `pretrain` with `resume`.

    Args:
        run: output folder of a run with the schedule `wsd` or `constant`.
        tokens: length of the decay, rounded up to whole steps.
        from_step: steps done at the checkpoint to start from; by default the newest.
        output_dir: of the decay; by default beside the run, named after it and the step.
        shape: how the learning rate falls.
        min_lr_ratio: learning rate of the last step as a share of the peak; by default that of the run.

    Raises:
        UserError: for a checkpoint that is not there or not of the stable phase, a folder that holds a run,
            and whatever `pretrain` raises.
    """
    checkpoint, others = _checkpoint(RunFolder(run), from_step)
    if from_step is None:
        # The run may be going on, and have a newer one when another process looks.
        checkpoint, others = _checkpoint(RunFolder(run), int(first_choice("decay", str(checkpoint.step))))
    beside = run.resolve()
    folder = (
        output_dir if output_dir is not None else beside.with_name(f"{beside.name}-decay-{checkpoint.step}")
    )
    # The other processes may look when the first one has begun.
    if is_main_process() and not begun_before() and RunFolder(folder).holds_a_run():
        raise ConfigError(
            f"--output-dir {folder} already holds a run; go on with it by minimind-train pretrain --resume "
            f"--output-dir {folder}, or name another folder."
        )
    config = decay_config(checkpoint, tokens, folder, shape=shape, min_lr_ratio=min_lr_ratio)
    # Before there is a folder of the decay.
    if is_main_process() and not begun_before() and (problem := checkpoint.problem()) is not None:
        advice = f"give --from-step {_listed(others)}" if others else "it is the only one"
        raise CheckpointError(f"{problem.removesuffix('.')}: the checkpoint cannot be used; {advice}.")
    return pretrain(config, branch=True)


def decay_config(
    checkpoint: StoredCheckpoint,
    tokens: int,
    output_dir: Path,
    *,
    shape: Literal["linear", "sqrt"] = "linear",
    min_lr_ratio: float | None = None,
) -> PretrainConfig:
    """Return the options of a decay: those of the run, with a `wsd` schedule that decays from the checkpoint.

    A run that had these options from its start, without `resume`, would take the very same steps. There may
    be more or fewer processes than the run had; the rows of a step stay.

    Raises:
        CheckpointError: when the checkpoint is not of a stable phase.
        ConfigError: when the processes cannot share the rows of a step equally.
    """
    settings = checkpoint.trainer["settings"]
    state = TrainState(**checkpoint.trainer["state"])
    trunk = _config_of(settings)
    _refuse_unstable(checkpoint, trunk, settings, state)
    rows = settings["global_batch_size"]
    per_step = rows * trunk.max_seq_len if trunk.packing else state.tokens / state.step
    steps = max(math.ceil(tokens / per_step), 1)
    last = state.step + steps
    changed = dataclasses.replace(
        trunk,
        global_batch_size=rows,
        lr_schedule="wsd",
        warmup_steps=warmup_steps(trunk, settings["total_steps"]),
        decay_steps=steps,
        decay_shape=shape,
        min_lr_ratio=trunk.min_lr_ratio if min_lr_ratio is None else min_lr_ratio,
        max_steps=last,
        max_tokens=None,
        # More passes than the run was to make, where the decay takes it beyond them.
        epochs=max(trunk.epochs or 1, math.ceil(last / settings["steps_per_epoch"])),
        # A time limit is not an option of the model, and would move the decay.
        max_time=None,
        profile=False,
        resume=str(checkpoint.path),
        output_dir=str(output_dir),
        run_name=None if trunk.run_name is None else f"{trunk.run_name}-decay-{state.step}",
    )
    return fitted_to(changed, world_size())


def _checkpoint(run: RunFolder, step: int | None) -> tuple[StoredCheckpoint, list[StoredCheckpoint]]:
    """Return the checkpoint of a step, the newest where None is given, and all others; unverified.

    Raises:
        CheckpointError: where there is none.
    """
    found = stored_checkpoints(run.checkpoints)
    if not found:
        raise CheckpointError(f"there is no checkpoint in {run.checkpoints}; name the --output-dir of a run.")
    if step is None:
        return found[-1], found[:-1]
    for checkpoint in found:
        if checkpoint.step == step:
            return checkpoint, [other for other in found if other is not checkpoint]
    raise CheckpointError(
        f"--from-step {step} has no checkpoint in {run.checkpoints}; there are those of steps "
        f"{_listed(found)}. Runs keep more with --keep-every."
    )


def _config_of(settings: dict[str, Any]) -> PretrainConfig:
    """Return the options that a checkpoint was written with, for any number of processes."""
    known = schema_of(PretrainConfig)
    values = {name: settings[name] for name in known if name in settings}
    for name, setting in known.items():
        if setting.repeatable and name in values:
            values[name] = tuple(values[name])
    return PretrainConfig(**{**values, "accumulation_steps": None})


def _refuse_unstable(
    checkpoint: StoredCheckpoint, config: PretrainConfig, settings: dict[str, Any], state: TrainState
) -> None:
    """Refuse a checkpoint whose learning rate is not that of the stable phase.

    Raises:
        CheckpointError: telling which of the checkpoints beside it would do.
    """
    if "total_steps" not in settings:
        raise CheckpointError(
            f"{checkpoint.path} is of an older version of minimind; go on with its run by --resume up to the "
            "next checkpoint, and decay from that."
        )
    phase = stable_phase(config, settings["total_steps"], state.ending)
    if phase is None:
        raise CheckpointError(
            f"{checkpoint.path} is of a run with --lr-schedule {config.lr_schedule}, which has no stable "
            "phase to decay from; train the run with --lr-schedule wsd or constant."
        )
    first, last = phase
    if first <= state.step <= last:
        return
    what = "still in its warm-up" if state.step < first else "already in its decay"
    fitting = [one for one in stored_checkpoints(checkpoint.path.parent) if first <= one.step <= last]
    advice = f"give --from-step {_listed(fitting)}" if fitting else "none of its checkpoints is"
    raise CheckpointError(
        f"{checkpoint.path} is {what}: the stable phase of its run is from step {first} to step {last}; "
        f"{advice}. Runs keep more with --keep-every."
    )


def _listed(checkpoints: list[StoredCheckpoint]) -> str:
    *others, last = [str(checkpoint.step) for checkpoint in checkpoints]
    return f"{', '.join(others)} or {last}" if others else last
