"""Where the documents of a split begin: written while it is built, read without growing with the corpus.

A split `train` has three files, all int64:

- `train.offsets`: where each document begins, and the end of the last one.
- `train.blocks`: (blocks + 1, 2), the first document of each block and where it begins. A block is about 256K
  tokens; what is read of it at the start of a pass is this small table, 6 MB for 100 billion tokens.
- `train.lengths`: (3, L), which entry of --data, a document length that occurs in it, and how often.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

BLOCK_TOKENS = 1 << 18


@dataclass(frozen=True)
class Part:
    """The documents of one entry of --data, which follow one another in the split.

    Attributes:
        first_document: where they begin.
        end_document: where the documents of the next entry begin.
        length_counts: (2, L) each document length that occurs and how often, ascending.
    """

    first_document: int
    end_document: int
    length_counts: NDArray[np.int64]

    @property
    def num_documents(self) -> int:
        """Documents of the entry."""
        return self.end_document - self.first_document

    @property
    def num_tokens(self) -> int:
        """Tokens of the entry, with those that begin and end documents."""
        lengths, counts = self.length_counts
        return int(lengths @ counts)


class IndexWriter:
    """Writes the index of one split; memory grows with the number of different lengths only."""

    def __init__(self, folder: Path, split: str, block_tokens: int = BLOCK_TOKENS) -> None:
        """Begin the files.

        Args:
            folder: where they go.
            split: `train` or `validation`.
            block_tokens: a block begins with the first document at or after a multiple of this.
        """
        self.num_documents = self.num_tokens = 0
        self._folder, self._split, self._block_tokens = folder, split, block_tokens
        self._last_begin = -1
        self._lengths: Counter[tuple[int, int]] = Counter()
        self._offsets = (folder / f"{split}.offsets").open("wb")
        self._blocks = (folder / f"{split}.blocks").open("wb")
        self._offsets.write(np.zeros(1, np.int64).tobytes())

    def append(self, lengths: NDArray[np.int64], part: int = 0) -> None:
        """Add documents by their lengths in tokens, at least 1; no `part` may be below the one before."""
        ends = self.num_tokens + np.cumsum(lengths, dtype=np.int64)
        begins = ends - lengths
        marks = np.append(self._last_begin, begins) // self._block_tokens
        heads = np.flatnonzero(marks[1:] > marks[:-1])
        self._blocks.write(np.stack((self.num_documents + heads, begins[heads]), axis=1).tobytes())
        self._offsets.write(ends.data)
        self._last_begin, self.num_tokens = int(begins[-1]), int(ends[-1])
        self.num_documents += len(lengths)
        values, counts = np.unique(lengths, return_counts=True)
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            self._lengths[part, value] += count

    def close(self) -> None:
        """Bring everything to the disk."""
        end = (self.num_documents, self.num_tokens)
        # The last document may reach over further multiples: an empty block, which is part of the order.
        reaches = (self.num_tokens - 1) // self._block_tokens > self._last_begin // self._block_tokens
        ends = [end] * (1 + (reaches and self.num_documents > 0))
        self._blocks.write(np.array(ends, np.int64).tobytes())
        with (self._folder / f"{self._split}.lengths").open("wb") as file:
            rows = [(*key, count) for key, count in sorted(self._lengths.items())]
            file.write(np.ascontiguousarray(np.array(rows, np.int64).reshape(-1, 3).T).data)
        for written in (self._offsets, self._blocks):
            written.flush()
            os.fsync(written.fileno())
            written.close()

    def abandon(self) -> None:
        """Close the files of a build that failed."""
        self._offsets.close()
        self._blocks.close()


def read_blocks(folder: Path, split: str) -> NDArray[np.int64]:
    """Return (blocks + 1, 2): the first document of each block and where it begins; the last row ends all."""
    return np.fromfile(folder / f"{split}.blocks", np.int64).reshape(-1, 2)


def read_parts(folder: Path, split: str) -> tuple[Part, ...]:
    """Return what each entry of --data gave to a split, up to the last entry that gave documents."""
    table = np.fromfile(folder / f"{split}.lengths", np.int64).reshape(3, -1)
    parts: list[Part] = []
    end = 0
    for number in range(int(table[0, -1]) + 1 if table.size else 0):
        length_counts = table[1:, table[0] == number]
        first, end = end, end + int(length_counts[1].sum())
        parts.append(Part(first, end, length_counts))
    return tuple(parts)


def read_length_counts(folder: Path, split: str) -> NDArray[np.int64]:
    """Return (2, L): the document lengths of a split, ascending, and how often each occurs."""
    _, lengths, counts = np.fromfile(folder / f"{split}.lengths", np.int64).reshape(3, -1)
    values, where = np.unique(lengths, return_inverse=True)
    return np.stack((values, np.bincount(where, counts, len(values)).astype(np.int64)))
