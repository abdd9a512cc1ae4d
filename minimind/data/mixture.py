"""The order of rows where each entry of --data is to give a set share of the training tokens.

Every entry is an endless stream: pass after pass over its documents, each in an order of its own, without a
document twice in a pass. Training reads all streams at once, each at a pace in proportion to its weight. The
tokens of a window are the next ones of every stream, as many as its share, so the shares hold in each window,
to within one document of each entry, and not only over a whole run. The documents of a window are permuted
together, laid end to end and cut into rows, which are permuted once more.

An epoch is as many tokens as all entries hold together. Where one ends in the middle of an entry's pass, the
next epoch goes on from there. All of this is a function of (seed, place). Any place is found by arithmetic,
a sorted list of blocks and one block of documents for each entry, whatever came before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .document_index import BLOCK_TOKENS, Part
from .sampler import WINDOW_BLOCKS, Window, permutation
from .shards import TokenShards

_BLOCKS, _DOCUMENTS, _ROWS, _WINDOW = range(4)


class MixedOrder:
    """The order of the rows of each epoch, with weights; has what `sampler.RowOrder` has.

    Attributes:
        num_sequences: sequences in an epoch.
    """

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
        """Work out how much of each entry an epoch and a window take.

        Args:
            shards: the documents, with as many parts as there are weights.
            weights: share of each entry; 1 in all.
            seq_len: inputs in a row.
            packing: rows are cut from the stream; else each document is a row.
            seed: of all permutations.
            window_tokens: about so many tokens in a window.
        """
        self._offsets = shards.offsets
        self._seq_len, self._packing, self._seed = seq_len, packing, seed % 2**64
        self._streams = [
            _Stream(shards, part, number, packing=packing, seed=self._seed)
            for number, part in enumerate(shards.parts)
        ]
        self.num_sequences, amounts = _epoch(shards.parts, weights, seq_len=seq_len, packing=packing)
        self._windows_per_epoch = -(-shards.num_tokens // window_tokens)
        self._paces = [amount / self._windows_per_epoch for amount in amounts]
        # Windows overlap by a row, and a resumed one is asked for again.
        self._documents = lru_cache(maxsize=2)(self._window_documents)
        self._begin = lru_cache(maxsize=8)(self._window_begin)

    def windows(self, epoch: int, row: int = 0) -> Iterator[Window]:
        """Yield the windows of an epoch, in order, from the one that holds `row` on."""
        start, stop = epoch * self.num_sequences, (epoch + 1) * self.num_sequences
        window = self._find(start + row)
        first = max(self._first_row(window), start)
        while first < stop:
            end = min(self._first_row(window + 1), stop)
            if first < end:
                yield self._window(epoch, window, first, end, start)
            window, first = window + 1, end

    def _find(self, row: int) -> int:
        """Return the window in which a row, counted over all epochs, begins."""
        # Each stream is behind its pace by less than one place, or ahead of it to the end of a document.
        place = (row + len(self._streams)) * self._windows_per_epoch
        window = place // self.num_sequences + 2
        while self._first_row(window) > row:
            window -= 1
        return window

    def _first_row(self, window: int) -> int:
        """Return the first row, over all epochs, that begins in the window."""
        per_row = self._seq_len if self._packing else 1
        return -(-self._begin(window) // per_row)

    def _window_begin(self, window: int) -> int:
        """Return where the documents of a window begin, in tokens or documents over all epochs."""
        return sum(stream.cut(self._cut(pace, window)) for stream, pace in self._with_paces())

    def _window(self, epoch: int, window: int, first_row: int, end_row: int, epoch_start: int) -> Window:
        # A packed row looks one token ahead; the last one of a window goes on in the documents of the next.
        per_row, ahead = (self._seq_len, 1) if self._packing else (1, 0)
        begin = self._begin(window)
        start, stop = first_row * per_row - begin, end_row * per_row + ahead - begin
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
        order = permutation(self._seed, epoch, (0, window, _ROWS), end_row - first_row)
        return Window(first_row - epoch_start, order, documents[low:high], skip)

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
        # Multiplied, never summed up, so that rounding does not grow with the run.
        return int(pace * window)


class _Stream:
    """The documents of one entry, pass after pass without end.

    Places are counted in tokens where rows are packed, else in documents.

    Attributes:
        size: of one pass.
    """

    def __init__(self, shards: TokenShards, part: Part, number: int, *, packing: bool, seed: int) -> None:
        """Find the entry's blocks: those of the split, cut where the entry begins and ends."""
        self._offsets, self._packing, self._seed = shards.offsets, packing, seed
        # 0 is the order of what is not one entry's own.
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
        self._pass = lru_cache(maxsize=3)(self._order_of_pass)
        self._block = lru_cache(maxsize=4)(self._order_of_block)
        self._at = lru_cache(maxsize=8)(self._find)

    def cut(self, place: int) -> int:
        """Return the first place at or after `place` where a document begins."""
        number, _, _, at = self._at(place)
        return number * self.size + at

    def documents(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the documents that begin from place `start` on and before `stop`, in order."""
        number, block, first, _ = self._at(start)
        last, last_block, end, _ = self._at(stop)
        pieces = [np.empty(0, np.int64)]
        while (number, block) <= (last, last_block):
            blocks, _ = self._pass(number)
            if block == len(blocks):
                number, block = number + 1, 0
                continue
            whole = (number, block) < (last, last_block)
            pieces.append(self._block(number, int(blocks[block]))[first : None if whole else end])
            block, first = block + 1, 0
        return np.concatenate(pieces)

    def _find(self, place: int) -> tuple[int, int, int, int]:
        """Return a cut: the pass, the block in its order, the document in that, and its place in the pass."""
        number, rest = divmod(place, self.size)
        blocks, begins = self._pass(number)
        block = int(np.searchsorted(begins, rest, side="right")) - 1
        documents = self._block(number, int(blocks[block]))
        if not self._packing:
            return number, block, rest - int(begins[block]), rest
        lengths = self._offsets[documents + 1] - self._offsets[documents]
        starts = int(begins[block]) + np.cumsum(lengths) - lengths
        document = int(np.searchsorted(starts, rest, side="left"))
        if document < len(starts):
            return number, block, document, int(starts[document])
        # Empty blocks may follow, where a document is longer than a block; they do no harm.
        return number, block + 1, 0, int(begins[block + 1])

    def _order_of_pass(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the blocks of a pass, and (blocks + 1,) where each begins in it."""
        blocks = permutation(self._seed, number, (self._key, 0, _BLOCKS), len(self._sizes))
        return blocks, np.concatenate((np.zeros(1, np.int64), np.cumsum(self._sizes[blocks])))

    def _order_of_block(self, number: int, block: int) -> NDArray[np.int64]:
        first, end = int(self._bounds[block]), int(self._bounds[block + 1])
        return first + permutation(self._seed, number, (self._key, block, _DOCUMENTS), end - first)


def passes_per_epoch(
    parts: Sequence[Part], weights: Sequence[float], *, seq_len: int, packing: bool
) -> tuple[float, ...]:
    """Return how many times an epoch reads the documents of each entry."""
    _, amounts = _epoch(parts, weights, seq_len=seq_len, packing=packing)
    sizes = [part.num_tokens if packing else part.num_documents for part in parts]
    return tuple(amount / size for amount, size in zip(amounts, sizes, strict=True))


def _epoch(
    parts: Sequence[Part], weights: Sequence[float], *, seq_len: int, packing: bool
) -> tuple[int, list[float]]:
    """Return the rows of an epoch, and what it takes of each entry: tokens where packed, else documents."""
    if packing:
        num_sequences = -(-(sum(part.num_tokens for part in parts) - 1) // seq_len)
        return num_sequences, [weight * num_sequences * seq_len for weight in weights]
    # A document gives at most T inputs; the weight is met by the mean over the entry's documents.
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
