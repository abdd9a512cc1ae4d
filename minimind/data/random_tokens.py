"""Made-up text in the form of token shards, for measurements of speed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .shards import ShardWriter, TokenShards, token_dtype

# Tokens of a document, on average.
_DOCUMENT = 300


def random_shards(folder: Path, vocab_size: int) -> TokenShards:
    """Write a few million random tokens in documents of varied length; the same on every call.

    Args:
        folder: made here.
        vocab_size: token ids are below it.
    """
    rng = np.random.default_rng(0)
    folder.mkdir()
    writer = ShardWriter(folder, "train", token_dtype(vocab_size))
    for _ in range(4):
        lengths = rng.geometric(1 / _DOCUMENT, size=2000).astype(np.int64) + 2
        tokens = rng.integers(0, vocab_size, int(lengths.sum())).astype(token_dtype(vocab_size))
        writer.append(tokens, lengths)
    return TokenShards(folder, "train", writer.close(), "random")
