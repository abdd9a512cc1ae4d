"""The order of documents and rows in one pass, a function of (seed, epoch) alone.

Documents lie in blocks of about 256K tokens, as they follow one another on the disk. A pass permutes the
blocks, and the documents within each block; laid end to end they are the stream that rows are cut from. The
rows of 64 blocks on end, a window, are permuted once more. Reading stays local, nothing as large as the
corpus is ever permuted, and any place of a pass is found without going through what comes before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .shards import TokenShards

WINDOW_BLOCKS = 64

_BLOCKS, _DOCUMENTS, _ROWS = range(3)


@dataclass(frozen=True)
class Window:
    """Rows that follow one another in the order, and the documents that they are cut from.

    Attributes:
        first_row: where in the pass the window's rows begin.
        order: (R,) the i-th row of the window in the order is the one cut at place `order[i]`.
        documents: (n,) ids of the documents, in stream order.
        skip: tokens at the head of `documents` that belong to the rows of the window before; packed only.
    """

    first_row: int
    order: NDArray[np.int64]
    documents: NDArray[np.int64]
    skip: int

    @property
    def end_row(self) -> int:
        """Where in the pass the rows of the next window begin."""
        return self.first_row + len(self.order)


class SequenceOrder:
    """The order of the rows of each pass.

    Attributes:
        num_sequences: sequences in a pass.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        seq_len: int,
        packing: bool,
        seed: int,
        shuffle: bool = True,
        window_blocks: int = WINDOW_BLOCKS,
    ) -> None:
        """Look up the blocks; nothing that grows with the documents is read.

        Args:
            shards: the documents.
            seq_len: inputs in a row.
            packing: rows are cut from the stream; else each document is a row.
            seed: of all permutations.
            shuffle: without it the order is that of the shards.
            window_blocks: blocks in a window.
        """
        self._seq_len, self._packing = seq_len, packing
        self._seed, self._shuffle = seed % 2**64, shuffle
        self._window_blocks = window_blocks
        # (blocks + 1,) the first document of each block, and where it begins: in tokens, or in documents.
        self._bounds = shards.blocks[:, 0]
        self._begins = shards.blocks[:, 1] if packing else self._bounds
        if packing:
            # The last token of the stream is only ever a target.
            self.num_sequences = -(-(shards.num_tokens - 1) // seq_len)
        else:
            self.num_sequences = shards.num_documents

    def windows(self, epoch: int, row: int = 0) -> Iterator[Window]:
        """Yield the windows of a pass, in order, from the one that holds `row` on."""
        blocks = self._permutation(epoch, _BLOCKS, 0, len(self._bounds) - 1)
        sizes = np.diff(self._begins)[blocks]
        # (blocks + 1,) where each block of the pass begins in the stream: in tokens, or in documents.
        begins = np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes)))
        heads = begins[:: self._window_blocks]
        per_row = self._seq_len if self._packing else 1
        # A row belongs to the window in which it begins.
        first_rows = np.append(np.minimum(-(-heads // per_row), self.num_sequences), self.num_sequences)
        first = int(np.searchsorted(first_rows, row, side="right")) - 1
        for window in range(first, len(first_rows) - 1):
            begin, end = int(first_rows[window]), int(first_rows[window + 1])
            if begin < end:
                yield self._window(epoch, window, begin, end, blocks, begins)

    def _window(
        self,
        epoch: int,
        window: int,
        first_row: int,
        end_row: int,
        blocks: NDArray[np.int64],
        begins: NDArray[np.int64],
    ) -> Window:
        # A packed row looks one token ahead, and the last row of a window goes on in the next window's block.
        per_row, ahead = (self._seq_len, 1) if self._packing else (1, 0)
        start, stop = first_row * per_row, min(end_row * per_row + ahead, int(begins[-1]))
        low = int(np.searchsorted(begins, start, side="right")) - 1
        high = int(np.searchsorted(begins, stop, side="left"))
        documents = np.concatenate([self._block(epoch, int(block)) for block in blocks[low:high]])
        skip = start - int(begins[low])
        if not self._packing:
            documents, skip = documents[skip : skip + end_row - first_row], 0
        order = self._permutation(epoch, _ROWS, window, end_row - first_row)
        return Window(first_row, order, documents, skip)

    def _block(self, epoch: int, block: int) -> NDArray[np.int64]:
        """Return the documents of a block in this pass's order."""
        first, end = int(self._bounds[block]), int(self._bounds[block + 1])
        return first + self._permutation(epoch, _DOCUMENTS, block, end - first)

    def _permutation(self, epoch: int, what: int, which: int, size: int) -> NDArray[np.int64]:
        if not self._shuffle:
            return np.arange(size, dtype=np.int64)
        return permutation(self._seed, epoch, (0, which, what), size)


def permutation(seed: int, number: int, stream: tuple[int, int, int], size: int) -> NDArray[np.int64]:
    """Return a permutation that depends on the seed, a number such as the pass, and the stream alone.

    Philox's raw output and a stable sort are fixed for ever, where `Generator.permutation` may change with
    the version of numpy.
    """
    key = np.array([seed, number], np.uint64)
    philox = np.random.Philox(key=key, counter=np.array([0, *stream], np.uint64))
    return np.argsort(philox.random_raw(size), kind="stable").astype(np.int64, copy=False)
