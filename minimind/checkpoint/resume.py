"""Finds the run that --resume continues, and refuses one that has lost its checkpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.options import AUTO, CONFIG_SCHEMA
from ..config.schema import read_toml
from ..errors import CheckpointError, ConfigError, UserError
from ..io.atomic import resolved
from ..run_folder import RunFolder
from ..tracking.metrics_file import read_metrics
from .files import StoredCheckpoint, stored_checkpoints


@dataclass(frozen=True)
class RunToResume:
    """Where a command with --resume takes its options from.

    Attributes:
        config: the file of options, or None if the command has to name them.
        output_dir: the folder to continue in, if the command does not name one.
        note: one sentence for the user, or None.
    """

    config: Path | None = None
    output_dir: str | None = None
    note: str | None = None


def run_to_resume(resume: str, output_dir: str | None, *, complete: bool) -> RunToResume:
    """Return the options that a command with --resume continues with.

    Args:
        resume: `auto`, or a run folder or a checkpoint in one.
        output_dir: --output-dir, None if it is not given.
        complete: the command itself names data and model, so that it can also start a run.

    Raises:
        ConfigError: when there is no run to resume.
    """
    if resume == AUTO:
        folder = RunFolder(_expanded(output_dir or CONFIG_SCHEMA["output_dir"].default))
        if folder.config.is_file():
            return RunToResume(
                folder.config, note=f"Continuing with the options of {folder.config}; flags override them."
            )
        if not complete:
            raise ConfigError(
                f"{folder.path} holds no run to resume; check --output-dir, or name --data and a --preset "
                "to start one there."
            )
        return RunToResume()
    found = containing_run(_expanded(resume))
    if found is None:
        return RunToResume()
    options = f"the options of {found.config}; flags override them"
    if output_dir is None:
        return RunToResume(found.config, str(found.path), f"Continuing in {found.path} with {options}.")
    if resolved(_expanded(output_dir)) == resolved(found.path):
        return RunToResume(found.config, note=f"Continuing with {options}.")
    return RunToResume(
        found.config, note=f"Starting from the checkpoint {resume} in {output_dir} with {options}."
    )


def _expanded(path: str) -> Path:
    # Unlike Path.expanduser, never raise for an unknown user: the option is checked later.
    return Path(os.path.expanduser(path))


def containing_run(path: Path) -> RunFolder | None:
    """Return the run of a run folder, of its `checkpoints` folder or of a checkpoint in it, or None."""
    path = path.absolute()
    for folder in (path, path.parent, path.parent.parent):
        if RunFolder(folder).config.is_file() and (
            folder == path or path.is_relative_to(folder / "checkpoints")
        ):
            return RunFolder(folder)
    return None


def resume_source(resume: str | None, folder: RunFolder) -> str | None:
    """Return `resume`, with `auto` in place of the path of the run's own folder."""
    if resume not in (None, AUTO) and resolved(Path(resume)) in (
        resolved(folder.path), resolved(folder.checkpoints)
    ):  # fmt: skip
        return AUTO
    return resume


def check_resumable(folder: RunFolder) -> None:
    """Refuse to resume a run whose checkpoints are all missing or damaged; nothing is written.

    A folder without a run, and a run that was killed before its first checkpoint, are accepted: they start at
    step 0. Checksums are verified later, when the checkpoint is loaded.

    Raises:
        CheckpointError: naming what is missing or damaged.
    """
    stored = stored_checkpoints(folder.checkpoints)
    if stored:
        if all(checkpoint.problem(contents=False) for checkpoint in stored):
            raise all_damaged(stored)
        return
    if any(folder.checkpoints.glob(".step-*.replaced-*")):  # the store restores it
        return
    steps = _last_step(folder)
    missing = None
    if folder.checkpoints.is_symlink() and not folder.checkpoints.exists():
        missing = f"{folder.checkpoints} links to {folder.checkpoints.readlink()}, which does not exist"
    elif folder.model.exists() or steps > 2 * _first_save(folder):
        # The second save waits for the first, so such a run had a checkpoint.
        missing = f"{folder.checkpoints} has none"
    elif folder.checkpoints.is_symlink() and steps:
        missing = f"{folder.checkpoints}, a link, has none"
    if missing is not None:
        raise CheckpointError(
            f"{folder.path} holds a run of {steps:,} steps or more, but its checkpoints are missing: "
            f"{missing}. Mount or restore them, or start a new run in another --output-dir."
        )


def check_parts(source: str, folder: RunFolder, given: Mapping[str, Any]) -> None:
    """Refuse to resume a run without the parts of the caller that it was trained with; before any work.

    Args:
        source: `auto`, or the path of a checkpoint or run.
        folder: of the run.
        given: parts that the caller passes, by the names of the arguments of `pretrain`.

    Raises:
        CheckpointError: naming the parts.
    """
    path = folder.checkpoints if source == AUTO else Path(source)
    found = stored_checkpoints(path / "checkpoints") or stored_checkpoints(path)
    checkpoint = found[-1] if found else StoredCheckpoint(path, 0)
    saved: Mapping[str, Any] = {}
    with suppress(CheckpointError, KeyError, TypeError):  # loading it names the damage
        saved = checkpoint.trainer["settings"].get("custom_parts", {})
    if (missing := missing_parts(saved, given)) is not None:
        raise CheckpointError(f"cannot resume from {checkpoint.path}: {missing}")


def missing_parts(saved: Mapping[str, str | None], now: Mapping[str, Any]) -> str | None:
    """Return a sentence if a run lacks parts that it was trained with, else None.

    Args:
        saved: names of the parts in a checkpoint, None for those of minimind.
        now: the parts, or their names, that the run has now.
    """
    missing = {part: name for part, name in saved.items() if name and not now.get(part)}
    if not missing:
        return None
    listed = ", ".join(f"{part} {name}" for part, name in missing.items())
    given = ", ".join(f"{part}=..." for part in missing)
    return (
        f"the run was trained with parts of a Python program ({listed}); resume it there, by calling "
        f"minimind.pretrain(config, {given}) with them again."
    )


def all_damaged(stored: list[StoredCheckpoint]) -> CheckpointError:
    """Return the error for a run without a valid checkpoint."""
    problems = [checkpoint.problem(contents=False) or checkpoint.problem() for checkpoint in stored]
    count = f"all {len(stored)} checkpoints are" if len(stored) > 1 else "the only checkpoint is"
    return CheckpointError(
        f"{count} damaged in {stored[0].path.parent}: {problems[-1]} Restore one from a copy, "
        "or start a new run in another --output-dir."
    )


def finished_run(folder: RunFolder, total_steps: int) -> dict[str, Any] | None:
    """Return the training state of the last checkpoint, if the run has trained and written its final model.

    Args:
        total_steps: of the run as it would continue.
    """
    stored = stored_checkpoints(folder.checkpoints)
    if not stored or stored[-1].step < total_steps or stored[-1].problem() is not None:
        return None
    if not (folder.model / "model.safetensors").is_file() and not any(
        folder.model.glob("model-*.safetensors")
    ):
        return None
    # The totals are written after the model.
    totals = [line["step"] for line in read_metrics(folder.metrics) if "total_elapsed" in line]
    if not totals or totals[-1] != stored[-1].step or not (folder.model / "tokenizer.json").is_file():
        return None
    return dict(stored[-1].trainer["state"])


def _last_step(folder: RunFolder) -> int:
    with suppress(OSError):
        return max((line["step"] for line in read_metrics(folder.metrics)), default=0)
    return 0


def _first_save(folder: RunFolder) -> int:
    """Return the step of the first checkpoint of a run, by its options."""
    values: dict[str, Any] = {}
    with suppress(UserError):
        values = read_toml(folder.config)
    intervals = [
        values.get("save_interval", CONFIG_SCHEMA["save_interval"].default),
        values.get("keep_every"),
    ]
    return min((number for number in intervals if isinstance(number, int) and number > 0), default=1)
