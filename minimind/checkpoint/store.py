"""Full training states on disk: written in the background, published whole, rotated, never half there.

A checkpoint is written beside its place under a hidden name, forced to the disk and then renamed, so whatever
kills the process or the machine leaves complete checkpoints and hidden remains, which `clean` removes.
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
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..io.atomic import sync_folder, write_file
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

# Free space asked for beyond the tensors themselves: JSON, directory entries, what others write meanwhile.
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
    """A training state on the host, which nothing changes any more.

    Attributes:
        step: optimizer steps done.
        weights: parameters and buffers by name, a tied one once.
        moments: the optimizer's tensors under `parameter|field`.
        trainer: everything else; must be representable in JSON.
    """

    step: int
    weights: Mapping[str, torch.Tensor]
    moments: Mapping[str, torch.Tensor]
    trainer: Mapping[str, Any]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensors in (self.weights, self.moments) for tensor in tensors.values())

    def first_not_finite(self) -> str | None:
        """Return the name of a tensor that holds a NaN or an infinity, None where all are finite."""
        for tensors in (self.weights, self.moments):
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and tensor.numel():
                    # One pass without a temporary; NaN comes through as both extremes.
                    low, high = torch.aminmax(tensor)
                    if not (math.isfinite(low) and math.isfinite(high)):
                        return name
        return None

    def is_finite(self) -> bool:
        """Whether no tensor holds a NaN or an infinity."""
        return self.first_not_finite() is None


class CheckpointStore:
    """The checkpoints of one run. One process writes; any may read.

    Attributes:
        last_error: why the last save failed, None where it did not.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        *,
        keep_every: int | None = None,
        on_error: Callable[[CheckpointError], None] | None = None,
    ) -> None:
        """Name the folder; nothing is touched yet.

        Args:
            folder: holds the checkpoints; made at the first save.
            keep: newest checkpoints that rotation leaves, besides the best.
            keep_every: rotation also leaves those of every so many steps; None for none of them.
            on_error: called from the writing thread when a save fails; training may go on.
        """
        self.folder = Path(folder)
        self.keep = keep
        self.keep_every = keep_every
        self.last_error: CheckpointError | None = None
        self._on_error = on_error
        self._abandoned: set[str] = set()
        # The interpreter joins the thread of an executor at exit, so a checkpoint being written is finished.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last_job: Future[object] | None = None

    def entries(self) -> list[StoredCheckpoint]:
        """Return all checkpoints, oldest first, unverified."""
        return stored_checkpoints(self.folder)

    def latest(self, on_damaged: Callable[[str], None] | None = None) -> StoredCheckpoint | None:
        """Return the newest checkpoint of this run that verifies, leaving out those that `rewind` gave up.

        `on_damaged` hears of each that was passed over.
        """
        return latest_checkpoint(self.folder, on_damaged, without=self._abandoned)

    @staticmethod
    def open(path: Path, on_damaged: Callable[[str], None] | None = None) -> StoredCheckpoint:
        """Return the verified checkpoint at a path; see `open_checkpoint`.

        Raises:
            CheckpointError: when there is none or it is damaged.
        """
        return open_checkpoint(Path(path), on_damaged)

    def best(self) -> tuple[int, float] | None:
        """Return step and validation loss of the best checkpoint, None while there is none."""
        return best_checkpoint(self.folder)

    def save(self, snapshot: Snapshot, *, first: Callable[[], object] | None = None) -> float:
        """Write a snapshot in the background; wait first for one that is still being written.

        Args:
            snapshot: what to write.
            first: done in the background before anything is written, such as waiting for what must be on the
                disk before the checkpoint is; must not raise.

        Returns:
            Seconds that the caller was kept waiting for the earlier one.
        """
        waited = self.settle()
        # Encoded here, because the caller may change what it handed over.
        trainer = json.dumps(dict(snapshot.trainer), indent=1).encode()
        # Popped by the job: a finished job may linger in the executor, but its snapshot must not.
        held = [snapshot]
        self._submit(lambda: self._save(held.pop(), trainer, first))
        return waited

    def mark_best(self, step: int, val_loss: float) -> None:
        """Keep the checkpoint of `step` from rotation if no kept one has a lower validation loss.

        Does nothing where no checkpoint of that step was written. Done in the background, after the saves
        that were asked for before.
        """
        failed = f"step {step} was not marked as the best"
        self._submit(lambda: self._reported(failed, lambda: self._mark_best(step, val_loss)))

    def rewind(self, step: int) -> None:
        """Say that the run goes on from `step`: newer checkpoints go once the next one is safe."""
        self._abandoned = {entry.path.name for entry in self.entries() if entry.step > step}

    def settle(self) -> float:
        """Wait until nothing is being written; return the seconds that took. Never raises."""
        start = time.perf_counter()
        if self._last_job is not None:
            wait_for([self._last_job])
        return time.perf_counter() - start

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            CheckpointError: when the last save failed.
        """
        self.settle()
        if self.last_error is not None:
            raise self.last_error

    def clean(self) -> None:
        """Remove what a killed process left half-done. Only for the one process that writes."""
        if not self.folder.is_dir():
            return
        for left in self.folder.glob(".step-*"):
            name, _, what = left.name[1:].partition(".")
            if what.startswith("replaced") and not (self.folder / name).exists():
                left.rename(self.folder / name)
            else:
                shutil.rmtree(left, ignore_errors=True)
        (self.folder / f".{BEST}.tmp").unlink(missing_ok=True)

    def _submit(self, work: Callable[[], object]) -> None:
        self._last_job = self._writer.submit(work)

    def _save(self, snapshot: Snapshot, trainer: bytes, first: Callable[[], object] | None) -> None:
        self.last_error = None
        if first is not None:
            first()
        failed = f"the checkpoint of step {snapshot.step} was not saved"
        if self._reported(failed, lambda: self._write(snapshot, trainer)):
            self._reported("an old checkpoint was not removed", self._rotate)

    def _reported(self, failed: str, work: Callable[[], None]) -> bool:
        """Return whether `work` ended well; otherwise report why, in words that start with `failed`."""
        try:
            work()
            return True
        except OSError as error:
            advice = _ADVICE.get(error.errno or 0, "see whether the disk is sound")
            problem = f"{error.strerror or error} at {error.filename or self.folder}; {advice}."
        except CheckpointError as error:
            problem = str(error)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}."
        # A new exception without a cause: the traceback of the old one would keep the snapshot in memory.
        self.last_error = CheckpointError(f"{failed}: {problem} Earlier checkpoints are untouched.")
        if self._on_error is not None:
            self._on_error(self.last_error)
        return False

    def _write(self, snapshot: Snapshot, trainer: bytes) -> None:
        if (name := snapshot.first_not_finite()) is not None:
            raise CheckpointError(
                f"{name} is not finite; go on from an earlier one with a lower --learning-rate."
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
                OPTIMIZER: write_tensors(temporary / OPTIMIZER, snapshot.moments),
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
        replaced = final.with_name(f".{final.name}.replaced-{os.getpid()}")
        if final.exists():
            # A folder cannot be renamed over another; until the new one is in place `clean` would undo this.
            final.rename(replaced)
        try:
            temporary.rename(final)
        except OSError:
            if replaced.exists():
                replaced.rename(final)
            raise
        sync_folder(self.folder)
        best = self.best()
        if best is not None and folder_name(best[0]) in self._abandoned:
            (self.folder / BEST).unlink()  # or the mark would pass to a later checkpoint of the same step
        self._abandoned.discard(final.name)
        shutil.rmtree(replaced, ignore_errors=True)

    def _rotate(self) -> None:
        current = [entry for entry in self.entries() if entry.path.name not in self._abandoned]
        best = self.best()
        kept = {entry.path.name for entry in current[-self.keep :]}
        if best is not None:
            kept.add(folder_name(best[0]))
        if self.keep_every is not None:
            kept |= {entry.path.name for entry in current if entry.step % self.keep_every == 0}
        for entry in self.entries():
            if entry.path.name not in kept:
                expired = entry.path.with_name(f".{entry.path.name}.deleted-{os.getpid()}")
                # Renamed first, so that a half-deleted folder never looks like a checkpoint.
                entry.path.rename(expired)
                shutil.rmtree(expired, ignore_errors=True)

    def _mark_best(self, step: int, val_loss: float) -> None:
        name = folder_name(step)
        if name in self._abandoned or not (self.folder / name).is_dir() or not math.isfinite(val_loss):
            return
        best = self.best()
        if best is not None and best[1] <= val_loss and folder_name(best[0]) not in self._abandoned:
            return
        temporary = self.folder / f".{BEST}.tmp"
        write_file(temporary, [json.dumps({"step": step, "val_loss": val_loss}).encode()])
        temporary.replace(self.folder / BEST)
        sync_folder(self.folder)
        self._rotate()


def _check_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes + _SPACE_MARGIN:
        raise OSError(
            errno.ENOSPC,
            f"it needs {(num_bytes + _SPACE_MARGIN) / 1e6:.0f} MB and {free / 1e6:.0f} MB are free",
            str(folder),
        )
