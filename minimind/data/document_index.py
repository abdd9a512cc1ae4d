"""The index of the documents of a split: written during the build, read in constant memory.

A split `train` has three files, all int64:

- `train.offsets`: the start of each document, and the end of the last one.
- `train.blocks`: (blocks + 1, 2), the first document of each block and its start. A block is about 256K
  tokens, so the table has 6 MB for 100 billion tokens. An epoch starts by reading it.
- `train.lengths`: (3, L), the source of --data, a document length that occurs in it, and its count.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .checksums import ChecksummedFile

BLOCK_TOKENS = 1 << 18


@dataclass(frozen=True)
class Part:
    """The consecutive documents of one source of --data.

    Attributes:
        end_document: index after the last one.
        length_counts: (2, L) document lengths, ascending, and their counts.
    """

    first_document: int
    end_document: int
    length_counts: NDArray[np.int64]

    @property
    def num_documents(self) -> int:
        """Documents of the source."""
        return self.end_document - self.first_document

    @property
    def num_tokens(self) -> int:
        """Tokens of the source, including start and end tokens."""
        lengths, counts = self.length_counts
        return int(lengths @ counts)


class IndexWriter:
    """Writes the index of one split; memory grows only with the number of distinct lengths."""

    def __init__(self, folder: Path, split: str, block_tokens: int = BLOCK_TOKENS) -> None:
        """Create the files.

        Args:
            split: `train` or `validation`.
            block_tokens: a block starts with the first document at or after a multiple of this.
        """
        self.num_documents = self.num_tokens = 0
        self._folder, self._split, self._block_tokens = folder, split, block_tokens
        self._last_begin = -1
        self._lengths: Counter[tuple[int, int]] = Counter()
        self._offsets = ChecksummedFile(folder / f"{split}.offsets")
        self._blocks = ChecksummedFile(folder / f"{split}.blocks")
        self._offsets.write(np.zeros(1, np.int64).tobytes())

    def append(self, lengths: NDArray[np.int64], part: int = 0) -> None:
        """Add documents by their lengths in tokens, at least 1; `part` must not decrease."""
        ends = self.num_tokens + np.cumsum(lengths, dtype=np.int64)
        begins = ends - lengths
        marks = np.append(self._last_begin, begins) // self._block_tokens
        heads = np.flatnonzero(marks[1:] > marks[:-1])
        self._blocks.write(np.stack((self.num_documents + heads, begins[heads]), axis=1).tobytes())
        self._offsets.write(ends.tobytes())
        self._last_begin, self.num_tokens = int(begins[-1]), int(ends[-1])
        self.num_documents += len(lengths)
        values, counts = np.unique(lengths, return_counts=True)
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            self._lengths[part, value] += count

    def close(self) -> None:
        """Force the files to the disk."""
        end = (self.num_documents, self.num_tokens)
        # A last document that spans further multiples adds an empty block, which is part of the order.
        reaches = (self.num_tokens - 1) // self._block_tokens > self._last_begin // self._block_tokens
        ends = [end] * (1 + (reaches and self.num_documents > 0))
        self._blocks.write(np.array(ends, np.int64).tobytes())
        lengths = ChecksummedFile(self._folder / f"{self._split}.lengths")
        rows = [(*key, count) for key, count in sorted(self._lengths.items())]
        lengths.write(np.array(rows, np.int64).reshape(-1, 3).T.tobytes())
        for written in (self._offsets, self._blocks, lengths):
            written.close()

    def abandon(self) -> None:
        """Close the files of a build that failed."""
        self._offsets.abandon()
        self._blocks.abandon()


def read_blocks(folder: Path, split: str) -> NDArray[np.int64]:
    """Return (blocks + 1, 2): the first document of each block and its start; the last row is the end."""
    return np.fromfile(folder / f"{split}.blocks", np.int64).reshape(-1, 2)


def read_parts(folder: Path, split: str) -> tuple[Part, ...]:
    """Return the parts of a split, one per source of --data up to the last one with documents."""
    table = np.fromfile(folder / f"{split}.lengths", np.int64).reshape(3, -1)
    parts: list[Part] = []
    end = 0
    for number in range(int(table[0, -1]) + 1 if table.size else 0):
        length_counts = table[1:, table[0] == number]
        first, end = end, end + int(length_counts[1].sum())
        parts.append(Part(first, end, length_counts))
    return tuple(parts)


def read_length_counts(folder: Path, split: str) -> NDArray[np.int64]:
    """Return (2, L): the document lengths of a split, ascending, and their counts."""
    _, lengths, counts = np.fromfile(folder / f"{split}.lengths", np.int64).reshape(3, -1)
    values, where = np.unique(lengths, return_inverse=True)
    return np.stack((values, np.bincount(where, counts, len(values)).astype(np.int64)))
