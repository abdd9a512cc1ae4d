"""Load optimizer steps as device tensors, built ahead in a thread and copied while the device computes.

Shapes: B sequences of a micro-batch, T input tokens of a sequence.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, fields
from queue import Empty, Full, Queue
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from .batch_plan import BatchPlan
from .batching import StepBuilder, StepCounts
from .mixture import MixedOrder
from .packing import IGNORED, Piece, SequenceArrays
from .sampler import WINDOW_BLOCKS, SequenceOrder
from .shards import TokenShards

Item = TypeVar("Item")

_POLL_SECONDS = 0.1
_STEPS_AHEAD = 4
# Trim to a multiple of this length, which suits matrix units.
_TRIM_TO = 32

_Tensors = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that one process runs at once; all have the same shapes, unless padding is trimmed.

    Attributes:
        input_ids: (B, T) int64.
        shift_labels: (B, T) int64, the token after each input; -100 is ignored by the loss.
        document_ids: (B, T) int32, index of the document in the sequence; None for one document each.
        position_ids: (B, T) int32, position in sequence and document; None for one document each.
    """

    input_ids: torch.Tensor
    shift_labels: torch.Tensor
    document_ids: torch.Tensor | None
    position_ids: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class StepBatch(StepCounts):
    """This process's part of one optimizer step, one micro-batch per accumulation step."""

    micro_batches: tuple[MicroBatch, ...]


class Loader:
    """Yields the steps of each epoch over a split.

    Attributes:
        steps_per_epoch: optimizer steps per epoch; the last may have fewer sequences.
        tokens_per_epoch: real input tokens per epoch. Packed: all tokens except the last of the stream.
            Padded: all tokens of each document except the last, at most T. With weights: full sequences, or
            the mean over as many documents.
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
        window_blocks: int = WINDOW_BLOCKS,
    ) -> None:
        """Compute the sizes of an epoch; no tokens are read yet.

        Args:
            shards: the tokens of one split.
            packing: documents end to end in full sequences; otherwise one document per sequence.
            seed: determines the order, together with the epoch.
            device: where the tensors go.
            pad_token_id: input id of padding.
            shuffle: False keeps the order of the shards in every epoch.
            trim: drop trailing columns that are padding in all sequences of a step. Saves computation, but
                shapes change between steps, so compiled code recompiles.
            weights: share of the tokens of each part of the shards, summing to 1; empty reads every document
                once per epoch.
            window_blocks: blocks that are read at a time without weights; see `SequenceOrder`.
        """
        self._shards, self._plan = shards, plan
        self._trim = trim and not packing
        self._device = torch.device(device)
        order: SequenceOrder | MixedOrder
        if weights:
            order = MixedOrder(shards, weights, seq_len=seq_len, packing=packing, seed=seed)
        else:
            order = SequenceOrder(
                shards,
                seq_len=seq_len,
                packing=packing,
                seed=seed,
                shuffle=shuffle,
                window_blocks=window_blocks,
            )
        self._builder = StepBuilder(shards, order, seq_len, packing, plan, process_index, pad_token_id)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self.sequences_per_epoch = order.num_sequences
        self.steps_per_epoch = -(-self.sequences_per_epoch // plan.global_batch_size)
        if packing:
            self.tokens_per_epoch = self.sequences_per_epoch * seq_len if weights else shards.num_tokens - 1
        else:
            lengths, counts = shards.length_counts
            self.tokens_per_epoch = int((lengths - 1).clip(max=seq_len) @ counts)

    def steps(
        self, epoch: int, first_sequence: int = 0, *, epochs: int | None = 1
    ) -> Generator[StepBatch, None, None]:
        """Yield the steps of epochs from the global position `first_sequence` of the first, found directly.

        Args:
            epochs: how many; None for no end. The first steps of an epoch are built during the last steps of
                the one before.
        """
        steps = self._builder.steps(epoch, first_sequence, epochs=epochs)
        for step, tensors in self._prefetched((step, step.arrays) for step in steps):
            counts = {field.name: getattr(step, field.name) for field in fields(StepCounts)}
            yield StepBatch(micro_batches=self._micro_batches(tensors), **counts)

    def sample(self, count: int) -> Iterator[MicroBatch]:
        """Yield the first micro-batch of steps over `count` sequences, spread evenly over the split."""
        for _, tensors in self._prefetched((None, arrays) for arrays in self._builder.sample(count)):
            yield self._micro_batches(tensors)[0]

    def step(self, epoch: int, first_sequence: int) -> StepBatch:
        """Return the step of an epoch that begins at the global position `first_sequence`."""
        with closing(self.steps(epoch, first_sequence)) as steps:
            return next(steps)

    def pieces(self, epoch: int, first_sequence: int) -> list[tuple[int, list[Piece]]]:
        """Return the position in the epoch and the pieces of each sequence of `step(epoch, first_sequence)`.

        Sequences are in the order of the micro-batches; padding has no pieces.
        """
        return self._builder.pieces(epoch, first_sequence)

    def tokens(self, piece: Piece) -> list[int]:
        """Return the tokens of a piece, including the target after its last input."""
        start = int(self._shards.offsets[piece.document]) + piece.start
        stop = min(start + piece.length + 1, int(self._shards.offsets[piece.document + 1]))
        return self._shards.tokens(start, stop).tolist()

    def _prefetched(
        self, steps: Iterator[tuple[Item, SequenceArrays]]
    ) -> Generator[tuple[Item, _Tensors], None, None]:
        """Yield each item with its arrays on the device."""

        def copy(pair: tuple[Item, SequenceArrays]) -> tuple[Item, _Tensors, torch.cuda.Event | None]:
            return pair[0], *self._to_device(pair[1])

        for item, tensors, copied in prefetch(map(copy, steps), _STEPS_AHEAD):
            if copied is not None:
                _synchronize(tensors, copied)
            yield item, tensors

    def _to_device(self, arrays: SequenceArrays) -> tuple[_Tensors, torch.cuda.Event | None]:
        """Start the non-blocking copy of a step; runs in the prefetch thread."""
        wide = torch.from_numpy(_trimmed(arrays.wide) if self._trim else arrays.wide)
        narrow = None if arrays.narrow is None else torch.from_numpy(arrays.narrow)
        if self._stream is None:
            return (wide.to(self._device), narrow if narrow is None else narrow.to(self._device)), None
        with torch.cuda.stream(self._stream):
            wide = wide.pin_memory().to(self._device, non_blocking=True)
            if narrow is not None:
                narrow = narrow.pin_memory().to(self._device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return (wide, narrow), copied

    def _micro_batches(self, tensors: _Tensors) -> tuple[MicroBatch, ...]:
        wide, narrow = tensors
        size = self._plan.micro_batch_size
        # (2, A*B, T) to A times (B, T)
        inputs, labels = (part.split(size) for part in wide)
        nothing = (None,) * len(inputs)
        documents, positions = (nothing, nothing) if narrow is None else (p.split(size) for p in narrow)
        return tuple(map(MicroBatch, inputs, labels, documents, positions))


def evaluation_batches(
    shards: TokenShards,
    *,
    seq_len: int,
    packing: bool,
    batch_size: int,
    process_index: int,
    num_processes: int,
    device: torch.device | str,
    max_sequences: int | None = None,
    pad_token_id: int = 0,
) -> Iterator[MicroBatch]:
    """Yield one process's micro-batches of a split, in the order of the shards.

    Every process gets the same number; padding at the end has no targets. Of a split with more than
    `max_sequences`, so many are evaluated, spread evenly over it: the same for any batch size and number of
    processes.
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
        # The order is that of the shards for any window size; a sample reads few sequences of each window.
        window_blocks=1 if max_sequences is not None else WINDOW_BLOCKS,
    )
    if max_sequences is not None and max_sequences < loader.sequences_per_epoch:
        yield from loader.sample(max_sequences)
        return
    for step in loader.steps(0):
        yield step.micro_batches[0]


def _trimmed(wide: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return inputs and labels (2, B, T) without the trailing columns that have no target."""
    used = np.flatnonzero((wide[1] != IGNORED).any(axis=0))
    length = int(used[-1]) + 1 if len(used) else 1
    return np.ascontiguousarray(wide[:, :, : -(-length // _TRIM_TO) * _TRIM_TO])


def _synchronize(tensors: _Tensors, copied: torch.cuda.Event) -> None:
    """Make the current stream wait for the copy, and keep the memory until that stream has used it."""
    current = torch.cuda.current_stream()
    current.wait_event(copied)
    for tensor in tensors:
        if tensor is not None:
            tensor.record_stream(current)


class _End:
    """Marks the end of the items and carries the error, if any."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def prefetch(items: Iterator[Item], depth: int) -> Iterator[Item]:
    """Yield the items of an iterator that runs in a thread at most `depth` items ahead.

    Its exceptions are raised here. Closing or deleting this generator stops the thread.
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
        except BaseException as error:  # Raised by the consumer, which would hang otherwise.
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
