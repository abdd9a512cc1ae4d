"""Saves checkpoints in a background thread, atomically, and rotates old ones.

A checkpoint is written under a hidden name, flushed to the disk and renamed. A kill or power cut leaves
complete checkpoints and hidden temporary folders, which `clean` removes.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..io.atomic import publish_folder, sync_folder, write_file, write_text
from ..io.safetensors import write_tensors
from .files import (
    BEST,
    FORMAT,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    TRAINER,
    StoredCheckpoint,
    best_checkpoint,
    folder_name,
    latest_checkpoint,
    open_checkpoint,
    stored_checkpoints,
)

# Free space required beyond the tensors: JSON, directory entries, other writers.
_SPACE_MARGIN = 16 << 20
_ADVICE = {
    errno.ENOSPC: "free space there, or lower --keep-checkpoints",
    errno.EDQUOT: "your quota is used up; free space there, or lower --keep-checkpoints",
    errno.EFBIG: "the limit on the size of a file is too low; raise it (ulimit -f)",
    errno.EROFS: "the file system is read-only; remount it, or use another --output-dir",
    errno.EACCES: "allow writing there, or use another --output-dir",
    errno.EPERM: "allow writing there, or use another --output-dir",
}


@dataclass(frozen=True)
class Snapshot:
    """An immutable copy of the training state in host memory.

    Attributes:
        step: optimizer steps done.
        weights: parameters and buffers by name, a tied one once.
        optimizer_state: the optimizer's tensors, named `parameter|field`.
        trainer: everything else; must be JSON-serializable.
        wait: returns when the tensors have arrived; call it before reading them.
    """

    step: int
    weights: Mapping[str, torch.Tensor]
    optimizer_state: Mapping[str, torch.Tensor]
    trainer: Mapping[str, Any]
    wait: Callable[[], None] = lambda: None

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.nbytes for tensor in (*self.weights.values(), *self.optimizer_state.values()))

    def first_not_finite(self) -> str | None:
        """Return the name of the first tensor with a NaN or infinity, or None."""
        for name, tensor in (*self.weights.items(), *self.optimizer_state.items()):
            if tensor.is_floating_point() and tensor.numel():
                # One scan without a temporary; a NaN appears as both extremes.
                low, high = torch.aminmax(tensor)
                if not (math.isfinite(low) and math.isfinite(high)):
                    return name
        return None


class CheckpointStore:
    """The checkpoints of one run. Only one process writes.

    Attributes:
        last_error: why the last save failed, or None.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        *,
        keep_every: int | None = None,
        on_error: Callable[[CheckpointError], None] | None = None,
    ) -> None:
        """Store the arguments; the disk is not touched.

        Args:
            folder: holds the checkpoints; created by the first save.
            keep: number of newest checkpoints that rotation keeps, besides the best.
            keep_every: rotation also keeps checkpoints of multiples of this step.
            on_error: called from the background thread when a save fails.
        """
        self.folder = Path(folder)
        self.keep = keep
        self.keep_every = keep_every
        self.last_error: CheckpointError | None = None
        self._on_error = on_error
        self._abandoned: set[str] = set()
        self._valid: dict[str, bool] = {}
        # The interpreter joins executor threads at exit, so a save in progress completes.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last_job: Future[object] | None = None

    def entries(self) -> list[StoredCheckpoint]:
        """Return all checkpoints, oldest first, unverified."""
        return stored_checkpoints(self.folder)

    def latest(self, on_damaged: Callable[[str], None] | None = None) -> StoredCheckpoint | None:
        """Return the newest checkpoint that verifies and was not abandoned; see `latest_checkpoint`."""
        return latest_checkpoint(self.folder, on_damaged, exclude=self._abandoned)

    @staticmethod
    def open(path: Path, on_damaged: Callable[[str], None] | None = None) -> StoredCheckpoint:
        """Return the verified checkpoint at a path; see `open_checkpoint`.

        Raises:
            CheckpointError: when there is none or it is damaged.
        """
        return open_checkpoint(Path(path), on_damaged)

    def best(self) -> tuple[int, float] | None:
        """Return step and validation loss of the best checkpoint, or None."""
        return best_checkpoint(self.folder)

    def save(self, snapshot: Snapshot, *, first: Callable[[], object] | None = None) -> float:
        """Write a snapshot in the background, after waiting for the previous save.

        Args:
            first: called in the background before the checkpoint is written, for example to flush other files
                that must be on the disk before it. If it raises, the checkpoint is not saved.

        Returns:
            Seconds spent waiting for the previous save.
        """
        waited = self.wait_until_written()
        # Encoded here: the caller may change the dict afterwards.
        trainer = json.dumps(dict(snapshot.trainer), indent=1).encode()
        # Popped by the job: the executor may keep a finished job, but must not keep its snapshot.
        held = [snapshot]
        self._last_job = self._writer.submit(lambda: self._save(held.pop(), trainer, first))
        return waited

    def mark_best(self, step: int, val_loss: float) -> None:
        """Protect the checkpoint of `step` from rotation, unless the marked one has a lower validation loss.

        Does nothing if that checkpoint does not exist. Runs in the background, after earlier saves.
        """
        failed = f"step {step} was not marked as the best"
        mark = partial(self._mark_best, step, val_loss)
        self._last_job = self._writer.submit(self._attempt, failed, mark)

    def forget_best(self) -> None:
        """Remove the mark of the best checkpoint; rotation may then delete that checkpoint."""
        (self.folder / BEST).unlink(missing_ok=True)

    def rewind(self, step: int) -> None:
        """Continue from `step`: newer checkpoints are removed once the next one is written."""
        self._abandoned = {entry.path.name for entry in self.entries() if entry.step > step}

    def wait_until_written(self) -> float:
        """Wait for background work and return the seconds that took. Never raises."""
        start = time.perf_counter()
        if self._last_job is not None:
            wait_for([self._last_job])
        return time.perf_counter() - start

    def wait(self) -> None:
        """Wait for background work.

        Raises:
            CheckpointError: when the last save failed.
        """
        self.wait_until_written()
        if self.last_error is not None:
            raise self.last_error

    def clean(self) -> None:
        """Remove temporary files of a killed process. Only the process that writes may call this."""
        if not self.folder.is_dir():
            return
        for left in self.folder.glob(".step-*"):
            name, _, what = left.name[1:].partition(".")
            if what.startswith("replaced") and not (self.folder / name).exists():
                left.rename(self.folder / name)
            else:
                shutil.rmtree(left, ignore_errors=True)
        (self.folder / f".{BEST}.tmp").unlink(missing_ok=True)

    def _save(self, snapshot: Snapshot, trainer: bytes, first: Callable[[], object] | None) -> None:
        self.last_error = None

        def write() -> None:
            snapshot.wait()
            if first is not None:
                first()
            self._write(snapshot, trainer)

        failed = f"the checkpoint of step {snapshot.step} was not saved"
        if self._attempt(failed, write):
            self._attempt("an old checkpoint was not removed", self._rotate)

    def _attempt(self, failed: str, work: Callable[[], None]) -> bool:
        """Run `work`; return whether it succeeded, else report an error that starts with `failed`."""
        try:
            work()
            return True
        except OSError as error:
            advice = _ADVICE.get(error.errno or 0, "check the disk")
            problem = f"{error.strerror or error} at {error.filename or self.folder}; {advice}."
        except CheckpointError as error:
            problem = str(error)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}."
        # A new exception without a cause: the old traceback would keep the snapshot in memory.
        self.last_error = CheckpointError(f"{failed}: {problem} Earlier checkpoints are untouched.")
        if self._on_error is not None:
            self._on_error(self.last_error)
        return False

    def _write(self, snapshot: Snapshot, trainer: bytes) -> None:
        if (name := snapshot.first_not_finite()) is not None:
            raise CheckpointError(
                f"{name} is not finite; resume from an earlier one with a lower --learning-rate."
            )
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            sync_folder(self.folder.parent)
        _check_space(self.folder, snapshot.num_bytes + len(trainer))
        temporary = self.folder / f".{folder_name(snapshot.step)}.tmp-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            files = {
                MODEL: write_tensors(temporary / MODEL, snapshot.weights),
                OPTIMIZER: write_tensors(temporary / OPTIMIZER, snapshot.optimizer_state),
                TRAINER: write_file(temporary / TRAINER, [trainer]),
            }
            manifest = {"format": FORMAT, "step": snapshot.step, "files": files}
            write_file(temporary / MANIFEST, [json.dumps(manifest, indent=1).encode()])
            sync_folder(temporary)
            self._publish(temporary, self.folder / folder_name(snapshot.step))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _publish(self, temporary: Path, final: Path) -> None:
        publish_folder(temporary, final, final.with_name(f".{final.name}.replaced-{os.getpid()}"))
        best = self.best()
        if best is not None and folder_name(best[0]) in self._abandoned:
            (self.folder / BEST).unlink()  # or the mark would apply to a later checkpoint of the same step
        self._abandoned.discard(final.name)
        self._valid[final.name] = True

    def _rotate(self) -> None:
        stored = [entry for entry in self.entries() if entry.path.name not in self._abandoned]
        current = list(filter(self._verified, stored))
        best = self.best()
        kept = {entry.path.name for entry in current[-self.keep :]}
        if best is not None:
            kept.add(folder_name(best[0]))
        if self.keep_every is not None:
            kept |= {entry.path.name for entry in current if entry.step % self.keep_every == 0}
        for entry in self.entries():
            if entry.path.name not in kept:
                expired = entry.path.with_name(f".{entry.path.name}.deleted-{os.getpid()}")
                # Renamed first: a half-deleted folder must not look like a checkpoint.
                entry.path.rename(expired)
                shutil.rmtree(expired, ignore_errors=True)

    def _verified(self, entry: StoredCheckpoint) -> bool:
        """Whether a checkpoint is valid; each is read once, and those written here are known to be valid."""
        if entry.path.name not in self._valid:
            self._valid[entry.path.name] = entry.problem() is None
        return self._valid[entry.path.name]

    def _mark_best(self, step: int, val_loss: float) -> None:
        name = folder_name(step)
        if name in self._abandoned or not (self.folder / name).is_dir() or not math.isfinite(val_loss):
            return
        best = self.best()
        if best is not None and best[1] <= val_loss and folder_name(best[0]) not in self._abandoned:
            return
        write_text(self.folder / BEST, json.dumps({"step": step, "val_loss": val_loss}))
        self._rotate()


def _check_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes + _SPACE_MARGIN:
        raise OSError(
            errno.ENOSPC,
            f"it needs {(num_bytes + _SPACE_MARGIN) / 1e6:.0f} MB and {free / 1e6:.0f} MB are free",
            str(folder),
        )
