"""A corpus that a tiny model learns quickly."""

from __future__ import annotations

import json
from pathlib import Path

SENTENCE = "the cat sat on a mat while rain fell over quiet hills and nobody asked why it was so"
WORDS = SENTENCE.split()


def write_corpus(path: Path, documents: int = 300) -> Path:
    """Sentences that a tiny model learns quickly: words in a fixed cycle, from a place that differs."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(documents):
            start, count = number % len(WORDS), 12 + 7 * number % 40
            text = " ".join((WORDS * 8)[start : start + count]) + f" {number}."
            file.write(json.dumps({"text": text}) + "\n")
    return path
