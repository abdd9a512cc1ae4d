"""The order of documents and sequences in one epoch, a function of (seed, epoch) alone.

Documents are stored in blocks of about 256K tokens. Each epoch permutes the blocks and the documents within
each block. The permuted documents, end to end, are the stream that is cut into sequences. The sequences of 64
consecutive blocks, a window, are permuted once more. Reads stay local, no permutation is as large as the
corpus, and any position of an epoch is found directly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .shards import TokenShards

WINDOW_BLOCKS = 64

_BLOCKS, _DOCUMENTS, _SEQUENCES = range(3)


@dataclass(frozen=True)
class Window:
    """Consecutive sequences of the order, and the documents that they are cut from.

    Attributes:
        first_sequence: position in the epoch of the window's first sequence.
        order: (R,) the i-th sequence of the window is the `order[i]`-th one cut from its documents.
        documents: (n,) ids of the documents, in stream order.
        skip: leading tokens of `documents` that belong to the previous window; packed only.
    """

    first_sequence: int
    order: NDArray[np.int64]
    documents: NDArray[np.int64]
    skip: int

    @property
    def end_sequence(self) -> int:
        """Position in the epoch of the first sequence after the window."""
        return self.first_sequence + len(self.order)


class SequenceOrder:
    """The order of the sequences of each epoch."""

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
        """Read the table of blocks, the only part that grows with the corpus (16 bytes per 256K tokens).

        Args:
            packing: cut sequences from the stream; otherwise each document is one sequence.
            shuffle: False keeps the order of the shards.
        """
        # A packed sequence reads one token ahead; the last one of a window may end in the next window.
        self._per_sequence, self._ahead = (seq_len, 1) if packing else (1, 0)
        self._seed, self._shuffle = seed % 2**64, shuffle
        self._window_blocks = window_blocks
        # (blocks + 1,) the first document of each block, and its start in tokens or documents.
        self._bounds = shards.blocks[:, 0]
        self._begins = shards.blocks[:, 1] if packing else self._bounds
        if packing:
            # The last token of the stream is only ever a target.
            self.num_sequences = -(-(shards.num_tokens - 1) // seq_len)
        else:
            self.num_sequences = shards.num_documents

    def windows(self, epoch: int, sequence: int = 0) -> Iterator[Window]:
        """Yield the windows of an epoch, in order, from the one that holds `sequence` on."""
        blocks = self._permutation(epoch, _BLOCKS, 0, len(self._bounds) - 1)
        sizes = np.diff(self._begins)[blocks]
        # (blocks + 1,) the start of each permuted block in the stream, in tokens or documents.
        begins = np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes)))
        heads = begins[:: self._window_blocks]
        # A sequence belongs to the window in which it begins.
        first_sequences = np.minimum(-(-heads // self._per_sequence), self.num_sequences)
        first_sequences = np.append(first_sequences, self.num_sequences)
        first = int(np.searchsorted(first_sequences, sequence, side="right")) - 1
        for window in range(first, len(first_sequences) - 1):
            begin, end = int(first_sequences[window]), int(first_sequences[window + 1])
            if begin < end:
                yield self._window(epoch, window, begin, end, blocks, begins)

    def _window(
        self,
        epoch: int,
        window: int,
        first_sequence: int,
        end_sequence: int,
        blocks: NDArray[np.int64],
        begins: NDArray[np.int64],
    ) -> Window:
        start = first_sequence * self._per_sequence
        stop = min(end_sequence * self._per_sequence + self._ahead, int(begins[-1]))
        low = int(np.searchsorted(begins, start, side="right")) - 1
        high = int(np.searchsorted(begins, stop, side="left"))
        documents = np.concatenate([self._block(epoch, int(block)) for block in blocks[low:high]])
        skip = start - int(begins[low])
        order = self._permutation(epoch, _SEQUENCES, window, end_sequence - first_sequence)
        return Window(first_sequence, order, documents, skip)

    def _block(self, epoch: int, block: int) -> NDArray[np.int64]:
        """Return the documents of a block, permuted."""
        first, end = int(self._bounds[block]), int(self._bounds[block + 1])
        return first + self._permutation(epoch, _DOCUMENTS, block, end - first)

    def _permutation(self, epoch: int, what: int, which: int, size: int) -> NDArray[np.int64]:
        if not self._shuffle:
            return np.arange(size, dtype=np.int64)
        return permutation(self._seed, epoch, (0, which, what), size)


def permutation(seed: int, number: int, stream: tuple[int, int, int], size: int) -> NDArray[np.int64]:
    """Return a permutation of `size` elements that depends only on the arguments.

    `Generator.permutation` may change between versions of numpy; Philox's raw output does not.
    """
    key = np.array([seed, number], np.uint64)
    philox = np.random.Philox(key=key, counter=np.array([0, *stream], np.uint64))
    return np.argsort(philox.random_raw(size), kind="stable").astype(np.int64, copy=False)
