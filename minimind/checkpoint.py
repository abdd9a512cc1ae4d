"""Full training states on disk: written in the background, published whole, rotated, never half there.

A checkpoint is written beside its place under a hidden name, forced to the disk and then renamed, so whatever
kills the process or the machine leaves complete checkpoints and hidden remains, which `clean` removes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import struct
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError
from .stored_checkpoint import (
    FORMAT,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    TRAINER,
    StoredCheckpoint,
    folder_name,
    latest_checkpoint,
    open_checkpoint,
    stored_checkpoints,
)

# Free space asked for beyond the tensors themselves: JSON, directory entries, what others write meanwhile.
_SPACE_MARGIN = 16 << 20
_BEST = "best.json"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
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
        self, folder: Path, keep: int, *, on_error: Callable[[CheckpointError], None] | None = None
    ) -> None:
        """Name the folder; nothing is touched yet.

        Args:
            folder: holds the checkpoints; made at the first save.
            keep: newest checkpoints that rotation leaves, besides the best.
            on_error: called from the writing thread when a save fails; training may go on.
        """
        self.folder = Path(folder)
        self.keep = keep
        self.last_error: CheckpointError | None = None
        self._on_error = on_error
        self._abandoned: set[str] = set()
        # The interpreter joins the thread of an executor at exit, so a checkpoint being written is finished.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last_job: Future[None] | None = None

    def entries(self) -> list[StoredCheckpoint]:
        """Return all checkpoints, oldest first, unverified."""
        return stored_checkpoints(self.folder)

    def latest(self, on_damaged: Callable[[str], None] | None = None) -> StoredCheckpoint | None:
        """Return the newest checkpoint that verifies; `on_damaged` hears of each that was passed over."""
        return latest_checkpoint(self.folder, on_damaged)

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

    def save(self, snapshot: Snapshot) -> float:
        """Write a snapshot in the background; wait first for one that is still being written.

        Returns:
            Seconds that the caller was kept waiting for the earlier one.
        """
        waited = self.settle()
        # Encoded here, because the caller may change what it handed over.
        trainer = json.dumps(dict(snapshot.trainer), indent=1).encode()
        self._submit(lambda: self._save(snapshot, trainer))
        return waited

    def mark_best(self, step: int, val_loss: float) -> None:
        """Keep the checkpoint of `step` from rotation if no kept one has a lower validation loss.

        Does nothing where no checkpoint of that step was written. Done in the background, after the saves
        that were asked for before.
        """
        self._submit(lambda: self._mark_best(step, val_loss))

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
        """Remove what a killed process left half-written or half-deleted. Only for the process that writes."""
        if not self.folder.is_dir():
            return
        for left in self.folder.glob(".step-*"):
            name, _, what = left.name[1:].partition(".")
            if what.startswith("replaced") and not (self.folder / name).exists():
                left.rename(self.folder / name)
            else:
                shutil.rmtree(left, ignore_errors=True)
        (self.folder / f".{_BEST}.tmp").unlink(missing_ok=True)

    def _submit(self, work: Callable[[], None]) -> None:
        self._last_job = self._writer.submit(work)

    def _save(self, snapshot: Snapshot, trainer: bytes) -> None:
        problem = None
        try:
            self._write(snapshot, trainer)
        except OSError as error:
            advice = _ADVICE.get(error.errno or 0, "see whether the disk is sound")
            problem = f"{error.strerror or error} at {error.filename or self.folder}; {advice}."
        except CheckpointError as error:
            problem = str(error)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if problem is None:
            self.last_error = None
            return
        # A new exception without a cause: the traceback of the old one would keep the snapshot in memory.
        self.last_error = CheckpointError(
            f"the checkpoint of step {snapshot.step} was not saved: {problem} Earlier checkpoints are untouched."
        )
        if self._on_error is not None:
            self._on_error(self.last_error)

    def _write(self, snapshot: Snapshot, trainer: bytes) -> None:
        if (name := snapshot.first_not_finite()) is not None:
            raise CheckpointError(
                f"{name} is not finite; go on from an earlier one with a lower --learning-rate."
            )
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            _sync_folder(self.folder.parent)
        _check_space(self.folder, snapshot.num_bytes + len(trainer))
        temporary = self.folder / f".{folder_name(snapshot.step)}.tmp-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            files = {
                MODEL: _write_tensors(temporary / MODEL, snapshot.weights),
                OPTIMIZER: _write_tensors(temporary / OPTIMIZER, snapshot.moments),
                TRAINER: _write_file(temporary / TRAINER, [trainer]),
            }
            manifest = {"format": FORMAT, "step": snapshot.step, "files": files}
            _write_file(temporary / MANIFEST, [json.dumps(manifest, indent=1).encode()])
            _sync_folder(temporary)
            self._publish(temporary, self.folder / folder_name(snapshot.step))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._rotate()

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
        _sync_folder(self.folder)
        self._abandoned.discard(final.name)
        shutil.rmtree(replaced, ignore_errors=True)

    def _rotate(self) -> None:
        current = [entry for entry in self.entries() if entry.path.name not in self._abandoned]
        best = self.best()
        spared = {entry.path.name for entry in current[-self.keep :]}
        if best is not None and folder_name(best[0]) not in self._abandoned:
            spared.add(folder_name(best[0]))
        for entry in self.entries():
            if entry.path.name not in spared:
                doomed = entry.path.with_name(f".{entry.path.name}.deleted-{os.getpid()}")
                # Renamed first, so that a half-deleted folder never looks like a checkpoint.
                entry.path.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)
        self._abandoned.clear()

    def _mark_best(self, step: int, val_loss: float) -> None:
        best = self.best()
        if not (self.folder / folder_name(step)).is_dir() or not math.isfinite(val_loss):
            return
        if best is not None and best[1] <= val_loss and folder_name(best[0]) not in self._abandoned:
            return
        temporary = self.folder / f".{_BEST}.tmp"
        try:
            _write_file(temporary, [json.dumps({"step": step, "val_loss": val_loss}).encode()])
            temporary.replace(self.folder / _BEST)
            _sync_folder(self.folder)
            self._rotate()
        except OSError as error:
            self.last_error = CheckpointError(
                f"{error.filename}: {error.strerror}; the best was not recorded."
            )
            if self._on_error is not None:
                self._on_error(self.last_error)


def best_checkpoint(folder: Path) -> tuple[int, float] | None:
    """Return step and validation loss of the best checkpoint in a folder, None where none is marked."""
    try:
        record = json.loads((folder / _BEST).read_bytes())
        step, val_loss = int(record["step"]), float(record["val_loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (step, val_loss) if (folder / folder_name(step)).is_dir() else None


def _check_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes + _SPACE_MARGIN:
        raise OSError(
            errno.ENOSPC,
            f"it needs {(num_bytes + _SPACE_MARGIN) / 1e6:.0f} MB and {free / 1e6:.0f} MB are free",
            str(folder),
        )


def _write_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Write the safetensors format: length of the header, header in JSON, then the bytes end to end.

    Written here rather than by the library, which holds the interpreter's lock meanwhile and so would stop
    training, and which hides the number of an operating system's error.
    """
    header: dict[str, Any] = {}
    offset = 0
    # Wide types first, so that every tensor is aligned to its own width.
    ordered = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in ordered:
        tensor = tensors[name]
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    data = (tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy() for name in ordered)
    return _write_file(file, [struct.pack("<Q", len(encoded)), encoded, *data])


def _write_file(file: Path, parts: list[Any]) -> dict[str, Any]:
    """Write bytes-like parts to a new file and force them to the disk; return their size and SHA-256."""
    digest, size = hashlib.sha256(), 0
    with file.open("wb", buffering=0) as stream:
        for part in parts:
            rest = memoryview(part).cast("B")
            digest.update(rest)
            size += len(rest)
            while rest:  # an unbuffered write may take less than it was given
                rest = rest[stream.write(rest) :]
        os.fsync(stream.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk, so that a rename outlives a power cut."""
    if os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
