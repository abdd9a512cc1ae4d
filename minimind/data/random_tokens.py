"""Token shards of random tokens, for speed measurements."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .shards import ShardWriter, TokenShards, token_dtype

# Mean tokens per document.
_DOCUMENT = 300


def random_shards(folder: Path, vocab_size: int) -> TokenShards:
    """Write a few million random tokens in documents of varied lengths; equal on every call.

    Args:
        folder: created here.
        vocab_size: upper limit of the ids.
    """
    rng = np.random.default_rng(0)
    folder.mkdir()
    writer = ShardWriter(folder, "train", token_dtype(vocab_size))
    for _ in range(4):
        lengths = rng.geometric(1 / _DOCUMENT, size=2000).astype(np.int64) + 2
        tokens = rng.integers(0, vocab_size, int(lengths.sum())).astype(token_dtype(vocab_size))
        writer.append(tokens, lengths)
    return TokenShards(folder, "train", writer.close(), "random")
