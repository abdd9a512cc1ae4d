"""Folders of runs that were never trained, with the numbers that a test needs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minimind.config.options import CONFIG_SECTIONS, PretrainConfig
from minimind.config.schema import write_toml

CONFIG = PretrainConfig(hidden_size=64, head_dim=8, intermediate_size=192, vocab_size=6400)
TOKENS_A_STEP = 1000
ENVIRONMENT = {
    "git": {"commit": "a" * 40, "changed": False},
    "python": "3.12.1",
    "packages": {"minimind": "0.1.0", "torch": "2.13.0"},
    "device": "cpu",
    "gpus": [],
    "launch": {"processes": 1, "kind": "one process", "precision": "no", "compiled": False},
    "fingerprints": {"training text": "d" * 32, "tokenizer": "e" * 64, "mixture": "none"},
}


def make_run(
    folder: Path,
    losses: Sequence[float | None] = (4.0, 3.0, 2.5),
    bits: Mapping[int, float] | None = None,
    *,
    seconds_a_step: float = 2.0,
    resumed_at: int | None = None,
    tokens_a_step: int = TOKENS_A_STEP,
    environment: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Write a run with a report every 10 steps.

    Args:
        folder: of the run.
        losses: of the reports.
        bits: validation bits per byte by step; the loss is twice that.
        seconds_a_step: by the clock of the run.
        resumed_at: the step after which the clock restarted.
        tokens_a_step: trained.
        environment: what differs from `ENVIRONMENT`; None as a value leaves a key out.
        options: what differs from `CONFIG`.
    """
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(
        write_toml(dataclasses.replace(CONFIG, **options), CONFIG_SECTIONS), encoding="utf-8"
    )
    facts = {key: value for key, value in {**ENVIRONMENT, **(environment or {})}.items() if value is not None}
    (folder / "environment.json").write_text(json.dumps(facts), encoding="utf-8")
    evaluations = {0: 2.0, 10: 1.5, 30: 1.0} if bits is None else bits
    lines: list[dict[str, Any]] = []
    for number in range(len(losses) + 1):
        step = 10 * number
        time = f"2026-01-02T03:04:{step % 60:02d}.000+00:00"
        if step:
            before = resumed_at if resumed_at is not None and step > resumed_at else 0
            report = {
                "loss": losses[number - 1],
                "learning_rate": 1e-3 / number,
                "tokens": step * tokens_a_step,
                "epoch": step / 20,
                "elapsed": (step - before) * seconds_a_step,
                "tokens_per_second": tokens_a_step / seconds_a_step,
            }
            lines.append({"step": step, "time": time, "kind": "train", **report})
        if step in evaluations:
            value = evaluations[step]
            lines.append(
                {
                    **{"step": step, "time": time, "kind": "evaluation"},
                    **{"val_loss": 2 * value, "val_bits_per_byte": value},
                }
            )
    text = "\n".join(json.dumps(line) for line in lines) + "\n"
    # A run that goes on may be read in the middle of a line.
    (folder / "metrics.jsonl").write_text(text + '{"step": 40, "lo', encoding="utf-8")
    return folder
