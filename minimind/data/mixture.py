"""The order of sequences when each source of --data has a weight.

Each source is an endless stream of source epochs, each a new permutation of its documents. A window takes the
next documents of every stream in proportion to the weights, so the shares hold in each window to within one
document per source. The documents of a window are permuted together and cut into sequences, which are
permuted once more.

A training epoch has as many tokens as all sources together. The next epoch continues each stream where the
previous one ended. The order is a function of (seed, position); any position is found by arithmetic, one
sorted list of blocks and one block of documents per source.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .document_index import BLOCK_TOKENS, Part
from .sampler import WINDOW_BLOCKS, Window, permutation
from .shards import TokenShards

_BLOCKS, _DOCUMENTS, _SEQUENCES, _WINDOW = range(4)


class MixedOrder:
    """The weighted order of sequences; has the interface of `sampler.SequenceOrder`."""

    def __init__(
        self,
        shards: TokenShards,
        weights: Sequence[float],
        *,
        seq_len: int,
        packing: bool,
        seed: int,
        window_tokens: int = WINDOW_BLOCKS * BLOCK_TOKENS,
    ) -> None:
        """Compute how much of each source an epoch and a window take.

        Args:
            shards: the documents, with one part per weight.
            weights: share of each source; they sum to 1.
        """
        self._offsets = shards.offsets
        self._packing, self._seed = packing, seed % 2**64
        # A packed sequence reads one token ahead; the last one of a window may end in the next window.
        self._per_sequence, self._ahead = (seq_len, 1) if packing else (1, 0)
        self._streams = [
            _Stream(shards, part, number, packing=packing, seed=self._seed)
            for number, part in enumerate(shards.parts)
        ]
        self.num_sequences, amounts = _epoch(shards.parts, weights, seq_len=seq_len, packing=packing)
        self._windows_per_epoch = -(-shards.num_tokens // window_tokens)
        self._paces = [amount / self._windows_per_epoch for amount in amounts]
        # Consecutive windows share a sequence.
        self._documents = lru_cache(maxsize=2)(self._window_documents)
        # The start of a window, in tokens or documents over all epochs.
        self._begin = lru_cache(maxsize=8)(
            lambda window: sum(stream.cut(self._cut(pace, window)) for stream, pace in self._with_paces())
        )

    def windows(self, epoch: int, sequence: int = 0) -> Iterator[Window]:
        """Yield the windows of an epoch, in order, from the one that holds `sequence` on."""
        start, stop = epoch * self.num_sequences, (epoch + 1) * self.num_sequences
        window = self._find(start + sequence)
        first = max(self._first_sequence(window), start)
        while first < stop:
            end = min(self._first_sequence(window + 1), stop)
            if first < end:
                yield self._window(epoch, window, first, end, start)
            window, first = window + 1, end

    def _find(self, sequence: int) -> int:
        """Return the window in which a sequence begins, counted over all epochs."""
        # A stream lags its pace by less than one position, or leads it by less than one document.
        place = (sequence + len(self._streams)) * self._windows_per_epoch
        window = place // self.num_sequences + 2
        while self._first_sequence(window) > sequence:
            window -= 1
        return window

    def _first_sequence(self, window: int) -> int:
        """Return the first sequence that begins in the window, counted over all epochs."""
        return -(-self._begin(window) // self._per_sequence)

    def _window(
        self, epoch: int, window: int, first_sequence: int, end_sequence: int, epoch_start: int
    ) -> Window:
        begin = self._begin(window)
        start = first_sequence * self._per_sequence - begin
        stop = end_sequence * self._per_sequence + self._ahead - begin
        pieces: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        reached = 0
        while reached < stop:
            documents, sizes = self._documents(window + len(pieces))
            pieces.append((documents, sizes))
            reached += int(sizes.sum())
        documents = np.concatenate([piece[0] for piece in pieces])
        ends = np.cumsum(np.concatenate([piece[1] for piece in pieces]))
        low = int(np.searchsorted(ends, start, side="right"))
        high = int(np.searchsorted(ends, stop, side="left")) + 1
        skip = start - int(ends[low - 1] if low else 0)
        order = permutation(self._seed, epoch, (0, window, _SEQUENCES), end_sequence - first_sequence)
        return Window(first_sequence - epoch_start, order, documents[low:high], skip)

    def _window_documents(self, window: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the documents of a window, permuted, and their sizes in tokens or documents."""
        pieces = [
            stream.documents(self._cut(pace, window), self._cut(pace, window + 1))
            for stream, pace in self._with_paces()
        ]
        documents = np.concatenate(pieces)
        documents = documents[permutation(self._seed, window, (0, 0, _WINDOW), len(documents))]
        if not self._packing:
            return documents, np.ones_like(documents)
        return documents, self._offsets[documents + 1] - self._offsets[documents]

    def _with_paces(self) -> Iterator[tuple[_Stream, float]]:
        return zip(self._streams, self._paces, strict=True)

    @staticmethod
    def _cut(pace: float, window: int) -> int:
        # Multiplied, not accumulated, so that rounding errors do not grow with the run.
        return int(pace * window)


class _Stream:
    """The documents of one source, repeated without end.

    Positions are in tokens when packing, otherwise in documents.
    """

    def __init__(self, shards: TokenShards, part: Part, number: int, *, packing: bool, seed: int) -> None:
        """Take the split's blocks that lie in the source, cut at its first and last document."""
        self._offsets, self._packing, self._seed = shards.offsets, packing, seed
        # Key 0 belongs to the permutations that all sources share.
        self._key = number + 1
        blocks = shards.blocks
        low = int(np.searchsorted(blocks[:, 0], part.first_document, side="right"))
        high = int(np.searchsorted(blocks[:, 0], part.end_document, side="left"))
        edges = [(i, int(shards.offsets[i])) for i in (part.first_document, part.end_document)]
        # (blocks + 1, 2)
        table = np.concatenate((np.array(edges[:1]), blocks[low:high], np.array(edges[1:])))
        self._bounds = table[:, 0]
        self._sizes = np.diff(table[:, int(packing)])
        self.size = int(self._sizes.sum())
        self._source_epoch = lru_cache(maxsize=3)(self._blocks_of_epoch)
        self._block = lru_cache(maxsize=4)(self._documents_of_block)
        self._at = lru_cache(maxsize=8)(self._find)

    def cut(self, place: int) -> int:
        """Return the first position at or after `place` where a document begins."""
        number, _, _, at = self._at(place)
        return number * self.size + at

    def documents(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the documents that begin in [start, stop), in order."""
        number, block, first, _ = self._at(start)
        last, last_block, end, _ = self._at(stop)
        pieces = [np.empty(0, np.int64)]
        while (number, block) <= (last, last_block):
            blocks, _ = self._source_epoch(number)
            if block == len(blocks):
                number, block = number + 1, 0
                continue
            whole = (number, block) < (last, last_block)
            pieces.append(self._block(number, int(blocks[block]))[first : None if whole else end])
            block, first = block + 1, 0
        return np.concatenate(pieces)

    def _find(self, place: int) -> tuple[int, int, int, int]:
        """Return the source epoch, the block in its order, the document in the block, and its position."""
        number, rest = divmod(place, self.size)
        blocks, begins = self._source_epoch(number)
        block = int(np.searchsorted(begins, rest, side="right")) - 1
        documents = self._block(number, int(blocks[block]))
        if not self._packing:
            return number, block, rest - int(begins[block]), rest
        lengths = self._offsets[documents + 1] - self._offsets[documents]
        starts = int(begins[block]) + np.cumsum(lengths) - lengths
        document = int(np.searchsorted(starts, rest, side="left"))
        if document < len(starts):
            return number, block, document, int(starts[document])
        # A document longer than a block is followed by empty blocks, which are harmless.
        return number, block + 1, 0, int(begins[block + 1])

    def _blocks_of_epoch(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the permuted blocks of a source epoch, and (blocks + 1,) their starts."""
        blocks = permutation(self._seed, number, (self._key, 0, _BLOCKS), len(self._sizes))
        return blocks, np.concatenate((np.zeros(1, np.int64), np.cumsum(self._sizes[blocks])))

    def _documents_of_block(self, number: int, block: int) -> NDArray[np.int64]:
        first, end = int(self._bounds[block]), int(self._bounds[block + 1])
        return first + permutation(self._seed, number, (self._key, block, _DOCUMENTS), end - first)


def source_epochs(
    parts: Sequence[Part], weights: Sequence[float], *, seq_len: int, packing: bool
) -> tuple[float, ...]:
    """Return how often a training epoch reads the documents of each source."""
    _, amounts = _epoch(parts, weights, seq_len=seq_len, packing=packing)
    sizes = [part.num_tokens if packing else part.num_documents for part in parts]
    return tuple(amount / size for amount, size in zip(amounts, sizes, strict=True))


def _epoch(
    parts: Sequence[Part], weights: Sequence[float], *, seq_len: int, packing: bool
) -> tuple[int, list[float]]:
    """Return the sequences of an epoch, and what it takes of each source, in tokens or documents."""
    if packing:
        num_sequences = -(-(sum(part.num_tokens for part in parts) - 1) // seq_len)
        return num_sequences, [weight * num_sequences * seq_len for weight in weights]
    # A document gives at most T inputs; weights hold for the mean document length of the source.
    inputs = [_inputs(part, seq_len) for part in parts]
    documents = [
        weight * sum(inputs) * part.num_documents / max(own, 1)
        for weight, part, own in zip(weights, parts, inputs, strict=True)
    ]
    num_sequences = max(round(sum(documents)), 1)
    return num_sequences, [amount * num_sequences / sum(documents) for amount in documents]


def _inputs(part: Part, seq_len: int) -> int:
    lengths, counts = part.length_counts
    return int((lengths - 1).clip(max=seq_len) @ counts)
