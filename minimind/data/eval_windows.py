"""Cut a split into evaluation windows: each token except the first of a document is a target exactly once.

Shapes: W windows, B sequences of a batch, T tokens of the longest one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .packing import IGNORED
from .shards import TokenShards


@dataclass(frozen=True)
class EvalWindows:
    """Spans of a split: inputs [start, stop), targets [first_target, stop].

    Attributes:
        start: (W,) int64.
        stop: (W,) int64.
        first_target: (W,) int64, the first target; tokens before it are context only.
    """

    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    first_target: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.start)

    def share(self, process_index: int, num_processes: int) -> EvalWindows:
        """Return the windows of one process, longest first, so that a batch has similar lengths."""
        order = np.argsort(self.start - self.stop, kind="stable")[process_index::num_processes]
        return EvalWindows(self.start[order], self.stop[order], self.first_target[order])


@dataclass(frozen=True)
class EvalBatch:
    """Windows as a batch, padded on the right; see `data.loader.MicroBatch`.

    Attributes:
        input_ids: (B, T) int64.
        labels: (B, T) int64, the token after each, -100 where none counts.
        document_ids: (B, T) int32, None when each sequence is one document.
        position_ids: (B, T) int32, the position within document and sequence.
        documents: (B, T) int64, the document of the split that each belongs to.
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    document_ids: NDArray[np.int32] | None
    position_ids: NDArray[np.int32]
    documents: NDArray[np.int64]


def packed_windows(shards: TokenShards, length: int) -> EvalWindows:
    """Return the sequences of packed training, in order: documents end to end, cut every `length` tokens."""
    start = np.arange(0, max(shards.num_tokens - 1, 0), length, dtype=np.int64)
    return EvalWindows(start, np.minimum(start + length, shards.num_tokens - 1), start + 1)


def document_windows(shards: TokenShards, length: int, stride: int) -> EvalWindows:
    """Return windows within documents.

    A document of more than `length` tokens has several, each beginning `stride` tokens after the one before.
    A token counts in the first window that holds it: all but those of the first windows have at least
    length - stride tokens of context.
    """
    begins, inputs = shards.offsets[:-1], shards.lengths - 1
    counts = np.where(inputs > 0, 1 + -(-np.maximum(inputs - length, 0) // stride), 0)
    document = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = begins[document] + number * stride
    stop = np.minimum(start + length, begins[document] + inputs[document])
    first_target = np.where(number == 0, start + 1, start - stride + length + 1)
    return EvalWindows(start, stop, first_target)


def window_batch(shards: TokenShards, windows: EvalWindows, chosen: slice, pad_token_id: int) -> EvalBatch:
    """Return the chosen windows as a batch."""
    starts, stops, firsts = windows.start[chosen], windows.stop[chosen], windows.first_target[chosen]
    shape = len(starts), int((stops - starts).max())
    inputs, labels = np.full(shape, pad_token_id, np.int64), np.full(shape, IGNORED, np.int64)
    documents = np.zeros(shape, np.int64)
    document_ids = np.zeros(shape, np.int32)
    several = False
    offsets = shards.offsets[:]
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy()
    for sequence, (start, stop, first) in enumerate(zip(starts, stops, firsts, strict=True)):
        tokens = shards.tokens(int(start), int(stop) + 1)
        places = np.arange(start, stop + 1)
        document = np.searchsorted(offsets, places, side="right") - 1
        counts = (document[1:] == document[:-1]) & (places[1:] >= first)
        used = slice(0, len(tokens) - 1)
        inputs[sequence, used] = tokens[:-1]
        labels[sequence, used] = np.where(counts, tokens[1:].astype(np.int64), IGNORED)
        documents[sequence, used] = document[:-1]
        several |= bool(document[-2] != document[0])
        # Padding counts as a further document.
        document_ids[sequence] = document[-2] - document[0] + 1
        document_ids[sequence, used] = document[:-1] - document[0]
        positions[sequence, used] = places[:-1] - np.maximum(offsets[document[:-1]], start)
    return EvalBatch(inputs, labels, document_ids if several else None, positions, documents)
