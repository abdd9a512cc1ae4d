"""Optimizer steps as tensors on the device: rows built ahead in a thread, copied while the device computes.

B rows of a micro-batch, T inputs in a row.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import islice
from queue import Empty, Full, Queue
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ..config.options import PretrainConfig
from .batch_plan import BatchPlan, count_steps
from .batching import StepSequences, step_pieces, step_rows
from .mixture import MixedOrder
from .packing import IGNORED, Piece
from .sampler import SequenceOrder
from .shards import TokenShards

Item = TypeVar("Item")

_POLL_SECONDS = 0.1


_STEPS_AHEAD = 4
# Trimmed rows are as long as a multiple of this, which arithmetic units like.
_TRIM_TO = 32

_Tensors = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class MicroBatch:
    """Rows that one process runs at once; every one has the same shapes, unless padding is trimmed.

    Attributes:
        input_ids: (B, T) int64.
        shift_labels: (B, T) int64, the token that follows each input; -100 where none is to be predicted.
        document_ids: (B, T) int32, counts the documents within a row; None where a row is one document.
        position_ids: (B, T) int32, from 0 at each row and each document; None where a row is one document.
    """

    input_ids: torch.Tensor
    shift_labels: torch.Tensor
    document_ids: torch.Tensor | None
    position_ids: torch.Tensor | None


@dataclass(frozen=True)
class StepBatch:
    """This process's part of one optimizer step; the counts are over all processes.

    Attributes:
        micro_batches: as many as there are accumulation steps, in every step.
        num_targets: labels other than -100.
        num_tokens: real input tokens.
        num_sequences: sequences, fewer than a global batch at the end of a pass.
        epoch: the pass.
        step_in_epoch: the step within the pass.
        digest: tells these rows in this order from any others.
    """

    micro_batches: tuple[MicroBatch, ...]
    num_targets: int
    num_tokens: int
    num_sequences: int
    epoch: int
    step_in_epoch: int
    digest: str


class Loader:
    """Yields the steps of each pass over a split.

    Attributes:
        sequences_per_epoch: sequences in an epoch.
        steps_per_epoch: optimizer steps in a pass; the last may be short.
        tokens_per_epoch: real input tokens in a pass. Packed: all tokens but the last of the stream. Padded:
            of each document all tokens but the last, at most T. With weights: full rows, or what the
            documents of so many rows hold on average.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        seq_len: int,
        packing: bool,
        plan: BatchPlan,
        seed: int,
        process_index: int,
        device: torch.device | str,
        pad_token_id: int = 0,
        shuffle: bool = True,
        trim: bool = False,
        weights: Sequence[float] = (),
    ) -> None:
        """Work out the sizes of a pass; nothing is read yet.

        Args:
            shards: the tokenized text.
            seq_len: T.
            packing: documents end to end in full rows; else one document a row.
            plan: sizes of a step.
            seed: of the order, together with the pass.
            process_index: which part of each step is this process's.
            device: where the tensors go.
            pad_token_id: input where there is no token.
            shuffle: without it every pass has the order of the shards.
            trim: cut off columns that are padding in all rows of a step. Less to compute, but shapes change,
                which compiled code would pay for.
            weights: share of the tokens that each part of the shards gives, 1 in all; without them every
                pass reads all documents once.
        """
        self._shards, self._seq_len, self._packing, self._plan = shards, seq_len, packing, plan
        self._process_index, self._pad_token_id = process_index, pad_token_id
        self._trim = trim and not packing
        self._device = torch.device(device)
        self._order: SequenceOrder | MixedOrder
        if weights:
            self._order = MixedOrder(shards, weights, seq_len=seq_len, packing=packing, seed=seed)
        else:
            self._order = SequenceOrder(shards, seq_len=seq_len, packing=packing, seed=seed, shuffle=shuffle)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self.sequences_per_epoch = self._order.num_sequences
        self.steps_per_epoch = -(-self.sequences_per_epoch // plan.global_batch_size)
        if packing:
            self.tokens_per_epoch = self.sequences_per_epoch * seq_len if weights else shards.num_tokens - 1
        else:
            lengths, counts = shards.length_counts
            self.tokens_per_epoch = int((lengths - 1).clip(max=seq_len) @ counts)

    def steps(self, epoch: int, row: int = 0) -> Generator[StepBatch, None, None]:
        """Yield the steps of a pass from global row `row` on; finding that row does not replay the others."""
        steps = step_rows(
            self._shards,
            self._order,
            seq_len=self._seq_len,
            packing=self._packing,
            plan=self._plan,
            process_index=self._process_index,
            pad_token_id=self._pad_token_id,
            epoch=epoch,
            row=row,
        )
        for step, tensors, copied in prefetch(map(self._to_device, steps), _STEPS_AHEAD):
            if copied is not None:
                _hand_over(tensors, copied)
            yield self._step_batch(step, tensors)

    def step(self, epoch: int, row: int) -> StepBatch:
        """Return the step of a pass that begins at global row `row`."""
        with closing(self.steps(epoch, row)) as steps:
            return next(steps)

    def pieces(self, epoch: int, row: int) -> list[tuple[int, list[Piece]]]:
        """Return the number in the pass and the pieces of documents of each row of `step(epoch, row)`.

        The rows are in the order of the micro-batches; one of padding has no pieces.
        """
        return step_pieces(
            self._shards,
            self._order,
            seq_len=self._seq_len,
            packing=self._packing,
            plan=self._plan,
            process_index=self._process_index,
            epoch=epoch,
            row=row,
        )

    def tokens(self, piece: Piece) -> list[int]:
        """Return the tokens of a piece, with the last target that is no input."""
        start = int(self._shards.offsets[piece.document]) + piece.start
        stop = min(start + piece.length + 1, int(self._shards.offsets[piece.document + 1]))
        return self._shards.tokens(start, stop).tolist()

    def _to_device(self, step: StepSequences) -> tuple[StepSequences, _Tensors, torch.cuda.Event | None]:
        """Start the copy of a step's rows; runs in the thread."""
        wide = torch.from_numpy(_trimmed(step.rows.wide) if self._trim else step.rows.wide)
        narrow = None if step.rows.narrow is None else torch.from_numpy(step.rows.narrow)
        if self._stream is None:
            return step, (wide.to(self._device), narrow if narrow is None else narrow.to(self._device)), None
        with torch.cuda.stream(self._stream):
            wide = wide.pin_memory().to(self._device, non_blocking=True)
            if narrow is not None:
                narrow = narrow.pin_memory().to(self._device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return step, (wide, narrow), copied

    def _step_batch(self, step: StepSequences, tensors: _Tensors) -> StepBatch:
        wide, narrow = tensors
        size = self._plan.micro_batch_size
        # (2, A*B, T) to A times (B, T)
        inputs, labels = (part.split(size) for part in wide)
        nothing = (None,) * len(inputs)
        documents, positions = (nothing, nothing) if narrow is None else (p.split(size) for p in narrow)
        return StepBatch(
            micro_batches=tuple(map(MicroBatch, inputs, labels, documents, positions)),
            num_targets=step.num_targets,
            num_tokens=step.num_tokens,
            num_sequences=step.num_sequences,
            epoch=step.epoch,
            step_in_epoch=step.step_in_epoch,
            digest=step.digest,
        )


def evaluation_batches(
    shards: TokenShards,
    *,
    seq_len: int,
    packing: bool,
    batch_size: int,
    process_index: int,
    num_processes: int,
    device: torch.device | str,
    max_batches: int | None = None,
    pad_token_id: int = 0,
) -> Iterator[MicroBatch]:
    """Yield one process's micro-batches of a split, in the order of the shards.

    Every process gets equally many, `max_batches` at most; rows that are missing at the end have no targets.
    The rows of the first n batches depend only on n and on how many rows all processes run at once.
    """
    plan = BatchPlan(batch_size, 1, num_processes)
    loader = Loader(
        shards,
        seq_len=seq_len,
        packing=packing,
        plan=plan,
        seed=0,
        process_index=process_index,
        device=device,
        pad_token_id=pad_token_id,
        shuffle=False,
    )
    for step in islice(loader.steps(0), max_batches):
        yield step.micro_batches[0]


def _trimmed(wide: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return inputs and labels (2, B, T) without the last columns, where no row has a target."""
    used = np.flatnonzero((wide[1] != IGNORED).any(axis=0))
    length = int(used[-1]) + 1 if len(used) else 1
    return np.ascontiguousarray(wide[:, :, : -(-length // _TRIM_TO) * _TRIM_TO])


def _hand_over(tensors: _Tensors, copied: torch.cuda.Event) -> None:
    """Make the consumer's stream wait for the copy, and keep the memory until that stream is done with it."""
    current = torch.cuda.current_stream()
    current.wait_event(copied)
    for tensor in tensors:
        if tensor is not None:
            tensor.record_stream(current)


def steps_in_all(config: PretrainConfig, loader: Loader, plan: BatchPlan) -> int:
    """Return the number of optimizer steps of a run."""
    # All rows but the last of a pass are full when packed; padded ones are as long as their documents.
    row = config.max_seq_len if config.packing else loader.tokens_per_epoch / loader.sequences_per_epoch
    return count_steps(
        config,
        steps_per_epoch=loader.steps_per_epoch,
        tokens_per_epoch=loader.tokens_per_epoch,
        tokens_per_step=plan.global_batch_size * row,
    )


class _End:
    """Marks the end of the items, and carries the error that ended them."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def prefetch(items: Iterator[Item], depth: int) -> Iterator[Item]:
    """Yield the items of an iterator, which runs in a thread at most `depth` items ahead.

    What it raises is raised here. Closing this generator, or dropping it, stops the thread.
    """
    queue: Queue[Item | _End] = Queue(depth)
    stop = threading.Event()

    def put(item: Item | _End) -> None:
        while not stop.is_set():
            with suppress(Full):
                queue.put(item, timeout=_POLL_SECONDS)
                return

    def produce() -> None:
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    return
            put(_End())
        except BaseException as error:  # The consumer raises it: a silent thread would hang the run.
            put(_End(error))

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while not isinstance(item := queue.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stop.set()
        while True:
            try:
                queue.get_nowait()
            except Empty:
                break
        thread.join()
