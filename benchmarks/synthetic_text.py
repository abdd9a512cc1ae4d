"""Seeded text of any size for benchmarks: words by Zipf's law in documents of varied length."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_POOL_WORDS = 2_000_000


def synthetic_documents(size: int, seed: int = 0) -> Iterator[str]:
    """Yield different documents, of some 1,000 bytes on average and `size` bytes together."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlcumwfgypbvk"))
    words = ["".join(rng.choice(letters, n)) for n in rng.integers(2, 11, 30_000)]
    pool = [words[rank % len(words)] for rank in rng.zipf(1.2, _POOL_WORDS).tolist()]
    written = number = 0
    while written < size:
        length = int(rng.geometric(1 / 160)) + 5
        start = int(rng.integers(0, _POOL_WORDS - length))
        text = f"{number}. " + " ".join(pool[start : start + length]) + "."
        yield text
        written += len(text)
        number += 1


def write_jsonl(path: Path, size: int, seed: int = 0) -> None:
    """Write `synthetic_documents` as JSONL."""
    with path.open("w", encoding="utf-8") as file:
        for text in synthetic_documents(size, seed):
            file.write(json.dumps({"text": text}) + "\n")
