"""Tiny runs, and the comparison of two of them to the last bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from minimind.checkpoint.files import MODEL, OPTIMIZER, StoredCheckpoint, latest_checkpoint
from minimind.config.options import PretrainConfig

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "rain",
    "fell",
    "over",
    "quiet",
    "hills",
    "and",
    "nobody",
    "asked",
    "why",
]
STEPS_PER_EPOCH = 10
STEPS = 2 * STEPS_PER_EPOCH
# They fall together in all ways but all at once.
INTERVALS = {"log_interval": 3, "eval_interval": 5, "save_interval": 4}
COMPARED = ("step", "kind", "loss", "learning_rate", "grad_norm", "digest", "tokens", "epoch", "val_loss")


def pretrain_as_command(config: PretrainConfig, **options: Any) -> Any:
    """Train as the command line does: with output and signal handlers."""
    from minimind.training.pretrain import pretrain

    return pretrain(config, quiet=False, handle_signals=True, **options)


def write_corpus(path: Path) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for number in range(50):
            text = " ".join((WORDS * 8)[number % len(WORDS) :][: 12 + 7 * number % 40]) + f" {number}."
            file.write(json.dumps({"text": text}) + "\n")
    return path


def tiny(corpus: Path, out: Path, **changes: Any) -> PretrainConfig:
    config = PretrainConfig(
        data=(str(corpus),),
        cache_dir=str(corpus.parent / "cache"),
        output_dir=str(out),
        val_fraction=0.1,
        max_seq_len=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        dropout=0.1,
        batch_size=4,
        accumulation_steps=2,
        epochs=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        mixed_precision="no",
        compile=False,
        tracker=("none",),
        **INTERVALS,
    )
    return dataclasses.replace(config, **changes)


def reports(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the sums at the end of a part, and without what a clock measured."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: line[name] for name in COMPARED if name in line}
        for line in lines
        if "loss" in line or "val_loss" in line
    ]


def last_checkpoint(out: Path) -> StoredCheckpoint:
    checkpoint = latest_checkpoint(out / "checkpoints")
    assert checkpoint is not None
    return checkpoint


def assert_same_end(out: Path, reference: Path) -> None:
    """Reports, training state, weights, moments and delivered model are equal to the last bit."""
    assert reports(out) == reports(reference)
    ours, theirs = last_checkpoint(out), last_checkpoint(reference)
    assert ours.step == theirs.step
    assert ours.trainer["state"] == theirs.trainer["state"]
    for name in (MODEL, OPTIMIZER):
        assert (ours.path / name).read_bytes() == (theirs.path / name).read_bytes(), name
    delivered = [(folder / "model" / "model.safetensors").read_bytes() for folder in (out, reference)]
    assert delivered[0] == delivered[1]
