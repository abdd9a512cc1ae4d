"""Cut the documents of a window into sequences: packed end to end, or one document per sequence.

Shapes: B sequences of a batch, T input tokens of a sequence, R sequences of a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from .sampler import Window
from .shards import TokenShards

IGNORED = -100


@dataclass(frozen=True)
class Piece:
    """The part of a document in one sequence; its last token may only be a target.

    Attributes:
        document: index in the split.
        start: its first token in the sequence, counted from the start of the document.
        length: input tokens.
    """

    document: int
    start: int
    length: int


@dataclass(frozen=True)
class SequenceArrays:
    """Sequences as arrays; initially padding without targets.

    Attributes:
        wide: (2, B, T) int64: inputs, and labels shifted so that `labels[t]` follows `inputs[t]`.
        narrow: (2, B, T) int32: document ids and positions; None when each sequence is one document.
    """

    wide: NDArray[np.int64]
    narrow: NDArray[np.int32] | None

    @classmethod
    def blank(cls, count: int, seq_len: int, *, packing: bool, pad_token_id: int) -> SequenceArrays:
        """Return `count` padding sequences."""
        wide = np.empty((2, count, seq_len), np.int64)
        wide[0], wide[1] = pad_token_id, IGNORED
        if not packing:
            return cls(wide, None)
        narrow = np.zeros((2, count, seq_len), np.int32)
        narrow[1] = np.arange(seq_len, dtype=np.int32)
        return cls(wide, narrow)


class PackedSequences:
    """Documents end to end, cut into sequences of T inputs.

    A document that is cut continues in the next sequence. Nothing is truncated: a sequence reads one token
    ahead for its last label, so each token except the first of a document is a target exactly once. Positions
    start at 0 in each sequence and each document, and attention crosses neither.

    Attributes:
        inputs: (R,) real input tokens of each sequence, in the order in which they are cut.
        targets: (R,) targets of each sequence.
        identities: (R, 4) first document, its first token, last document, end of its tokens.
    """

    def __init__(self, shards: TokenShards, window: Window, seq_len: int, pad_token_id: int) -> None:
        self._shards, self._seq_len, self._pad = shards, seq_len, pad_token_id
        num_sequences = len(window.order)
        first, end = shards.offsets[window.documents], shards.offsets[window.documents + 1]
        # Positions are relative to the window's first token; the first document may begin before it.
        stops = np.cumsum(end - first) - window.skip
        starts = stops - (end - first)
        used = (stops > 0) & (starts < num_sequences * seq_len + 1)
        documents, starts, stops, first = (a[used] for a in (window.documents, starts, stops, first))
        length = min(int(stops[-1]), num_sequences * seq_len + 1)
        self._documents, self._starts, self._stops = documents, starts, stops
        # Start in the shards and length of each document's part in this window.
        self._spans = (first - np.minimum(starts, 0), np.minimum(stops, length) - np.maximum(starts, 0))
        # (R*T+1,) whether a document begins here; padding counts as documents of one token.
        self._begins = np.zeros(num_sequences * seq_len + 1, bool)
        self._begins[starts[starts >= 0]] = True
        self._begins[length:] = True
        edges = np.arange(num_sequences + 1) * seq_len
        # The last token of the stream has no label, so it is no input.
        self.inputs = np.diff(np.minimum(edges, length - 1))
        self.targets = seq_len - np.add.reduceat(self._begins[1:], edges[:-1], dtype=np.int64)
        head = np.searchsorted(stops, edges[:-1], side="right")
        last = np.minimum(edges[1:], length) - 1
        tail = np.searchsorted(stops, last, side="right")
        self.identities = np.stack(
            (documents[head], edges[:-1] - starts[head], documents[tail], last + 1 - starts[tail]), axis=1
        )

    def load(self) -> PackedSequences:
        """Read the tokens of the window, which the first `fill` does otherwise; return the object."""
        _ = self._tokens
        return self

    def fill(self, arrays: SequenceArrays, at: NDArray[np.bool_], which: NDArray[np.int64]) -> None:
        """Write the sequences `which` of the window to the positions `at` of `arrays`."""
        assert arrays.narrow is not None
        # (B, T+1) with the token ahead; views, so that only the chosen sequences are copied.
        tokens = sliding_window_view(self._tokens, self._seq_len + 1)[:: self._seq_len][which]
        begins = sliding_window_view(self._begins, self._seq_len + 1)[:: self._seq_len][which]
        arrays.wide[0, at] = tokens[:, :-1]
        arrays.wide[1, at] = np.where(begins[:, 1:], np.int64(IGNORED), tokens[:, 1:])
        begins[:, 0] = False
        heads = begins[:, :-1]
        places = np.arange(self._seq_len, dtype=np.int32)
        arrays.narrow[0, at] = np.cumsum(heads, axis=1, dtype=np.int32)
        arrays.narrow[1, at] = places - np.maximum.accumulate(heads * places, axis=1)

    def pieces(self, sequence: int) -> list[Piece]:
        """Return the pieces of a sequence; the k-th piece has document id k."""
        begin = sequence * self._seq_len
        end = begin + int(self.inputs[sequence])
        first = int(np.searchsorted(self._stops, begin, side="right"))
        stop = int(np.searchsorted(self._starts, end, side="left"))
        columns = (a[first:stop].tolist() for a in (self._documents, self._starts, self._stops))
        return [
            Piece(document, max(begin - start, 0), min(end, last) - max(begin, start))
            for document, start, last in zip(*columns, strict=True)
        ]

    @cached_property
    def _tokens(self) -> NDArray[Any]:
        """(R*T+1,) the tokens of the window, padded after the end of the stream."""
        first, lengths = self._spans
        tokens = self._shards.gather(first, lengths)
        self._shards.release_pages()
        return np.append(tokens, np.full(len(self._begins) - len(tokens), self._pad, tokens.dtype))


class PaddedSequences:
    """One document per sequence, truncated to T inputs and padded; interface of `PackedSequences`."""

    def __init__(self, shards: TokenShards, window: Window, seq_len: int, pad_token_id: int) -> None:
        self._shards, self._seq_len, self._pad = shards, seq_len, pad_token_id
        # The previous window is not read again in this epoch.
        shards.release_pages()
        self._first = shards.offsets[window.documents]
        lengths = shards.offsets[window.documents + 1] - self._first
        # The last token of a document is only a target.
        self.inputs = np.minimum(lengths - 1, seq_len)
        self.targets = self.inputs
        ids = window.documents
        self.identities = np.stack((ids, np.zeros_like(ids), ids, self.inputs), axis=1)

    def load(self) -> PaddedSequences:
        """Return the object: tokens are read with each step."""
        return self

    def fill(self, arrays: SequenceArrays, at: NDArray[np.bool_], which: NDArray[np.int64]) -> None:
        """Write the sequences `which` of the window to the positions `at` of `arrays`."""
        inputs = self.inputs[which, None]
        places = np.arange(self._seq_len + 1)
        tokens = np.full((len(which), self._seq_len + 1), self._pad, np.int64)
        tokens[places <= inputs] = self._shards.gather(self._first[which], self.inputs[which] + 1)
        real = places[:-1] < inputs
        arrays.wide[0, at] = np.where(real, tokens[:, :-1], self._pad)
        arrays.wide[1, at] = np.where(real, tokens[:, 1:], IGNORED)

    def pieces(self, sequence: int) -> list[Piece]:
        """Return the one piece of a sequence."""
        return [Piece(int(self.identities[sequence, 0]), 0, int(self.inputs[sequence]))]


WindowSequences = PackedSequences | PaddedSequences
