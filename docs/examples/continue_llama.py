"""Continue the pretraining of a Llama, or of any causal language model of transformers, on your own text.

python continue_llama.py HuggingFaceTB/SmolLM2-135M corpus.jsonl "Once upon a time"
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transformers import pipeline

import minimind
from minimind.training.summary import PretrainResult


def train(model: str, **options: Any) -> PretrainResult:
    """Train a model folder, or a model of the Hub, on `data`; its sizes and its tokenizer are kept."""
    options = {"output_dir": "runs/continued", "lr_schedule": "wsd", **options}
    return minimind.pretrain(minimind.PretrainConfig(from_weight=model, **options), quiet=False)


def complete(folder: Path, prompt: str) -> str:
    """Return the continuation of a prompt by transformers, which needs nothing of minimind."""
    generate = pipeline("text-generation", str(folder))
    return generate(prompt, max_new_tokens=30, return_full_text=False)[0]["generated_text"]


if __name__ == "__main__":
    result = train(sys.argv[1], data=(sys.argv[2],), max_steps=500)
    print(f"{result.bits_per_byte:.4f} bits/byte on held-out data: {complete(result.model_dir, sys.argv[3])}")
