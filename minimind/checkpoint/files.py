"""Checkpoint folders on disk: file names, verification by SHA-256, and lookup.

torch is imported only when tensors are read, so that listing checkpoints is fast.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from ..io.reading import open_regular, parse_json, read_bytes

if TYPE_CHECKING:
    import torch

FORMAT = 1
MODEL, OPTIMIZER, TRAINER = "model.safetensors", "optimizer.safetensors", "trainer.json"
_FILES = {MODEL, OPTIMIZER, TRAINER}
MANIFEST, BEST = "manifest.json", "best.json"
_NAME = re.compile(r"step-(\d{8,})")
# Types of the values of `trainer.json` that are read one by one.
_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("state", "settings", "versions", "trackers", "callbacks"), dict),
    **dict.fromkeys(("step", "tokens"), (int, NoneType)),
    "param_groups": list,
}


@dataclass(frozen=True)
class StoredCheckpoint:
    """One checkpoint folder.

    Attributes:
        step: optimizer steps done when it was written.
    """

    path: Path
    step: int

    @cached_property
    def trainer(self) -> Mapping[str, Any]:
        """Contents of `trainer.json`: everything that is not a tensor.

        Raises:
            CheckpointError: when `trainer.json` cannot be read, or has values of the wrong type.
        """
        found = _read_json(self.path / TRAINER)
        for name, kind in _KINDS.items():
            if name in found and not isinstance(found[name], kind):
                raise CheckpointError(f"{self.path / TRAINER} is damaged: {name} has the wrong type.")
        return found

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return folder_bytes(self.path)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the parameters by name, on the CPU; a tied one under its first name only."""
        return _read_tensors(self.path / MODEL)

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """Return the optimizer's tensors, named `parameter|field`, on the CPU."""
        return _read_tensors(self.path / OPTIMIZER)

    def verify(self, *, contents: bool = True) -> None:
        """Check that every file exists with the recorded size and (with `contents`) SHA-256.

        Raises:
            CheckpointError: naming the first file that is wrong.
        """
        manifest = _read_json(self.path / MANIFEST)
        files = manifest.get("files")
        if manifest.get("format") != FORMAT or not isinstance(files, dict) or set(files) != _FILES:
            raise CheckpointError(
                f"{self.path / MANIFEST} is not format {FORMAT}: damaged, or by another version of minimind."
            )
        if manifest.get("step") != self.step:
            raise CheckpointError(f"{self.path / MANIFEST} is damaged: its step is not {self.step}.")
        for name, recorded in files.items():
            _verify_file(self.path / name, recorded, contents=contents)

    def problem(self, *, contents: bool = True) -> str | None:
        """Return why the checkpoint cannot be used, or None; see `verify`."""
        try:
            self.verify(contents=contents)
        except CheckpointError as error:
            return str(error)
        return None


def folder_name(step: int) -> str:
    """Return the name of the folder for a step."""
    return f"step-{step:08d}"


def is_checkpoint_name(name: str) -> bool:
    """Whether a folder name is that of a checkpoint."""
    return _NAME.fullmatch(name) is not None


def folder_bytes(path: Path) -> int:
    """Return the size of all files in a folder, 0 if it does not exist."""
    num_bytes = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):
                num_bytes += os.stat(os.path.join(folder, name)).st_size
    return num_bytes


def stored_checkpoints(folder: Path) -> list[StoredCheckpoint]:
    """Return the checkpoints in a folder, oldest first, unverified."""
    if not folder.is_dir():
        return []
    named = ((_NAME.fullmatch(child.name), child) for child in folder.iterdir())
    return sorted(
        (StoredCheckpoint(child, int(match[1])) for match, child in named if match and child.is_dir()),
        key=lambda checkpoint: checkpoint.step,
    )


def latest_checkpoint(
    folder: Path, on_damaged: Callable[[str], None] | None = None, *, exclude: Collection[str] = ()
) -> StoredCheckpoint | None:
    """Return the newest checkpoint in a folder that verifies, or None.

    Args:
        on_damaged: called with one sentence per newer checkpoint that is skipped as damaged.
    """
    for checkpoint in reversed(stored_checkpoints(folder)):
        if checkpoint.path.name in exclude:
            continue
        problem = checkpoint.problem()
        if problem is None:
            return checkpoint
        if on_damaged is not None:
            on_damaged(f"checkpoint {checkpoint.path.name} is skipped: {problem}")
    return None


def open_checkpoint(path: Path, on_damaged: Callable[[str], None] | None = None) -> StoredCheckpoint:
    """Return a verified checkpoint.

    Args:
        path: a checkpoint folder; or a run folder or its `checkpoints` folder, for the newest that verifies.
        on_damaged: as for `latest_checkpoint`.

    Raises:
        CheckpointError: when there is none, or the named one is damaged; the message names the file.
    """
    if (path / MANIFEST).exists() or _NAME.fullmatch(path.name):
        if not path.is_dir():
            raise CheckpointError(f"there is no checkpoint at {path}.")
        step = _read_json(path / MANIFEST).get("step")
        if not isinstance(step, int):
            raise CheckpointError(f"{path / MANIFEST} is damaged: it has no step.")
        checkpoint = StoredCheckpoint(path, step)
        checkpoint.verify()
        return checkpoint
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = latest_checkpoint(folder, on_damaged)
    if found is None:
        damaged = len(stored_checkpoints(folder))
        why = f"all {damaged} checkpoints are damaged" if damaged else "there is no checkpoint"
        raise CheckpointError(f"{why} in {folder}; name another run or checkpoint, or start a new run.")
    return found


def best_checkpoint(folder: Path) -> tuple[int, float] | None:
    """Return step and validation loss of the best checkpoint in a folder, or None."""
    try:
        record = parse_json(read_bytes(folder / BEST))
        step, val_loss = int(record["step"]), float(record["val_loss"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    return (step, val_loss) if (folder / folder_name(step)).is_dir() else None


def _verify_file(file: Path, recorded: Any, *, contents: bool) -> None:
    if not isinstance(recorded, dict) or set(recorded) != {"bytes", "sha256"}:
        raise CheckpointError(f"{file.parent / MANIFEST} is damaged: it does not describe {file.name}.")
    try:
        size = file.stat().st_size
        if size != recorded["bytes"]:
            raise CheckpointError(f"{file} has {size} bytes, not the {recorded['bytes']} of {MANIFEST}.")
        if contents and _sha256(file) != recorded["sha256"]:
            raise CheckpointError(f"{file} is damaged: checksum mismatch with {MANIFEST}.")
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing.") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}).") from error


def _sha256(file: Path) -> str:
    with open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = parse_json(read_bytes(file))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing.") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: it is not JSON.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is damaged: it is not a JSON object.")
    return value


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        open_regular(file).close()
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}).") from error
