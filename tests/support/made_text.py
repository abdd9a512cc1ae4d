"""Text, tokens and a tokenizer made for tests of the data pipeline."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minimind.data.shards import ShardWriter, TokenShards, token_dtype


class ByteTokenizer:
    """One id a byte, after the three special ids."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2
    unknown_token_id = None

    def __init__(self, vocab_size: int = 300, bos: bool = True) -> None:
        self.vocab_size = vocab_size
        if not bos:
            self.bos_token_id = None
        self.calls = 0

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.vocab_size} {self.bos_token_id}".encode()).hexdigest()

    def rules(self) -> dict:
        return {}

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        self.calls += 1
        return [[byte + 3 for byte in text.encode()] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i - 3 for i in ids if i > 2).decode()

    def bytes_per_token(self) -> np.ndarray:
        return (np.arange(self.vocab_size) >= 3).astype(np.float32)


def write_shards(
    folder: Path,
    lengths: Sequence[int],
    shard_tokens: int = 1 << 28,
    block_tokens: int = 32,
    parts: Sequence[int] = (),
) -> TokenShards:
    """Write documents of these lengths whose tokens are all different: 0, 1, 2, …

    `parts` tells which entry of --data each document belongs to, all to the first where it is empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(folder, "train", token_dtype(1 << 20), shard_tokens, block_tokens)
    start = 0
    for length, part in zip(lengths, parts or [0] * len(lengths), strict=True):
        writer.append(np.arange(start, start + length), np.array([length], np.int64), part)
        start += length
    return TokenShards(folder, "train", writer.close(), "f")


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path
