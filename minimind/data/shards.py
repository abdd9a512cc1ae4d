"""Tokens on disk: memory-mapped shards of documents end to end, and their index.

A split `train` is the files `train-00000.bin`, `train-00001.bin`, … (tokens, uint16 or uint32, a document
never spans two files) and the index of `document_index`. Each file has checksums; see `checksums`.
"""

from __future__ import annotations

import hashlib
import mmap
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from .checksums import CheckedArray, ChecksummedFile
from .document_index import BLOCK_TOKENS, IndexWriter, read_blocks, read_length_counts, read_parts

SHARD_TOKENS = 1 << 28
# Token files mapped at once; a window of the order reads from at most half as many.
OPEN_SHARDS = 128
_GATHER_TOKENS = 1 << 18
_LONG_SPAN = 128
# Random tokens of one part.
_RANDOM_TOKENS = 600_000


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest unsigned type for all token ids."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


@dataclass(frozen=True)
class SplitIndex:
    """Describes the files of one split.

    Attributes:
        content: hash (hex) of all tokens and document lengths.
        unknown_tokens: count of the unknown token.
        unknown_bytes: mean UTF-8 bytes that an unknown token stands for.
    """

    dtype: str
    shard_tokens: tuple[int, ...]
    num_documents: int
    content: str = ""
    unknown_tokens: int = 0
    unknown_bytes: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens in all shards."""
        return sum(self.shard_tokens)


@dataclass
class ShardWriter:
    """Writes one split in constant memory.

    Attributes:
        shard_tokens: start a new file after this many tokens.
    """

    folder: Path
    split: str
    dtype: np.dtype[Any]
    shard_tokens: int = SHARD_TOKENS
    block_tokens: int = BLOCK_TOKENS
    _written: list[int] = field(default_factory=list, init=False)
    _tokens_file: ChecksummedFile | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._index = IndexWriter(self.folder, self.split, self.block_tokens)
        self._content = hashlib.blake2b(digest_size=16)

    def append(self, tokens: NDArray[Any], lengths: NDArray[np.int64], part: int = 0) -> None:
        """Add documents: their tokens end to end, their lengths, and the source of --data."""
        if not len(lengths):
            return
        if self._tokens_file is None or self._written[-1] >= self.shard_tokens:
            if self._tokens_file is not None:
                self._tokens_file.close()
            self._tokens_file = ChecksummedFile(self.folder / _shard_name(self.split, len(self._written)))
            self._written.append(0)
        data = tokens.astype(self.dtype, copy=False).tobytes()
        self._tokens_file.write(data)
        self._content.update(data)
        self._content.update(lengths.astype(np.int64, copy=False).tobytes())
        self._written[-1] += len(tokens)
        self._index.append(lengths, part)

    def close(self) -> SplitIndex:
        """Force the files to the disk and return the index."""
        if self._tokens_file is not None:
            self._tokens_file.close()
        self._index.close()
        content = self._content.hexdigest()
        return SplitIndex(self.dtype.name, tuple(self._written), self._index.num_documents, content)

    def abandon(self) -> None:
        """Close the files of a build that failed."""
        if self._tokens_file is not None:
            self._tokens_file.abandon()
        self._index.abandon()


class TokenShards:
    """One split of tokenized text, mapped into memory.

    Attributes:
        num_tokens: tokens, including start and end tokens.
        offsets: (documents + 1,) int64, the start of each document; memory-mapped and
            checked on first use.
        blocks: (blocks + 1, 2) int64, the first document of each block and its start.
        parts: the documents of each source of --data.
        length_counts: (2, L) int64, document lengths, ascending, and their counts.
        fingerprint: identifies the documents, the tokenizer and the split.
        content: hash (hex) of all tokens and document lengths.
    """

    def __init__(self, folder: Path, split: str, index: SplitIndex, fingerprint: str) -> None:
        self.num_documents = index.num_documents
        self.num_tokens = index.num_tokens
        self.fingerprint = fingerprint
        self.content = index.content
        self._index = index
        self._dtype = np.dtype(index.dtype)
        self._ends = np.cumsum(index.shard_tokens, dtype=np.int64)
        self._begins = self._ends - np.array(index.shard_tokens, np.int64)
        self._maps: WeakSet[mmap.mmap] = WeakSet()
        # The next window is read in another thread.
        self._maps_lock = threading.Lock()
        # Mapped on first use; limited because each map keeps a file open.
        self._shard = lru_cache(maxsize=OPEN_SHARDS)(
            lambda number: self._open(folder / _shard_name(split, number), self._dtype)
        )
        # A shard that is mapped again is not checked again.
        self._unchecked: dict[Path, NDArray[np.bool_]] = {}
        self.offsets = self._open(folder / f"{split}.offsets", np.dtype(np.int64))
        self.blocks = read_blocks(folder, split)
        self.parts = read_parts(folder, split)
        self.length_counts = read_length_counts(folder, split)

    def _open(self, path: Path, dtype: np.dtype[Any]) -> CheckedArray:
        opened = CheckedArray(path, dtype, self._unchecked.get(path))
        self._unchecked[path] = opened.unchecked
        with self._maps_lock:
            self._maps.add(opened.mapped)
        return opened

    def bytes_per_token(self, tokenizer: Any) -> NDArray[np.float32]:
        """Return (V,) the bytes of each id; the unknown token carries its mean in this split."""
        sizes: NDArray[np.float32] = tokenizer.bytes_per_token()
        if self._index.unknown_tokens:
            sizes[tokenizer.unknown_token_id] = self._index.unknown_bytes
        return sizes

    @property
    def unknown_share(self) -> float:
        """Share of the tokens that are the unknown token."""
        return self._index.unknown_tokens / self.num_tokens

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(documents,) tokens of each document; a new array of 8 bytes a document."""
        return np.diff(self.offsets[:])

    def document(self, i: int) -> NDArray[Any]:
        """Return the tokens of one document."""
        return self.tokens(int(self.offsets[i]), int(self.offsets[i + 1]))

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        """Return the tokens of a span of the split; a view if the span is in one file."""
        shard = int(np.searchsorted(self._ends, start, side="right"))
        parts = []
        while start < stop:
            begin, end = int(self._begins[shard]), min(stop, int(self._ends[shard]))
            parts.append(self._shard(shard)[start - begin : end - begin])
            start, shard = end, shard + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, self._dtype)

    def gather(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[Any]:
        """Return spans of tokens end to end; each span must be within one document."""
        ends = np.cumsum(lengths)
        out = np.empty(int(ends[-1]) if len(ends) else 0, self._dtype)
        shards = np.searchsorted(self._ends, starts, side="right")
        begins = ends - lengths
        # In pieces, which bounds the memory of the indices below.
        bounds = np.unique(np.searchsorted(begins, np.arange(0, len(out), _GATHER_TOKENS)))
        for low, high in pairwise([*bounds.tolist(), len(ends)]):
            for shard in np.unique(shards[low:high]).tolist():
                here = low + np.flatnonzero(shards[low:high] == shard)
                source = starts[here] - int(self._begins[shard])
                tokens = self._shard(shard)
                tokens.check_spans(source, lengths[here])
                _copy_spans(tokens.array, source, out, begins[here], lengths[here])
        return out

    def release_pages(self) -> None:
        """Drop resident pages, so that resident memory does not grow with what was read."""
        if hasattr(mmap, "MADV_DONTNEED"):
            with self._maps_lock:
                maps = list(self._maps)
            for mapped in maps:
                mapped.madvise(mmap.MADV_DONTNEED)


def random_shards(folder: Path, vocab_size: int, lengths: Sequence[int] = ()) -> TokenShards:
    """Write a few million random tokens to a new folder, for speed measurements; equal on every call.

    Args:
        lengths: of documents, in tokens, to draw from; by default they are varied, 300 on average.
    """
    rng = np.random.default_rng(0)
    folder.mkdir()
    writer = ShardWriter(folder, "train", token_dtype(vocab_size))
    for _ in range(4):
        if len(lengths):
            count = max(round(_RANDOM_TOKENS / np.mean(lengths)), 1)
            drawn = rng.choice(np.asarray(lengths, np.int64), count).clip(max=_RANDOM_TOKENS)
        else:
            drawn = rng.geometric(1 / 300, size=_RANDOM_TOKENS // 300).astype(np.int64) + 2
        tokens = rng.integers(0, vocab_size, int(drawn.sum())).astype(token_dtype(vocab_size))
        writer.append(tokens, drawn)
    return TokenShards(folder, "train", writer.close(), "random")


def _copy_spans(
    source: NDArray[Any],
    source_starts: NDArray[np.int64],
    target: NDArray[Any],
    target_starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
) -> None:
    total = int(lengths.sum())
    if total > _LONG_SPAN * len(lengths):
        for a, b, n in zip(source_starts.tolist(), target_starts.tolist(), lengths.tolist(), strict=True):
            target[b : b + n] = source[a : a + n]
        return
    # Short spans: one gather by index is faster than a Python loop.
    within = np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    target[within + np.repeat(target_starts, lengths)] = source[within + np.repeat(source_starts, lengths)]


def _shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.bin"
