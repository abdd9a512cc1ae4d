"""A learning rate schedule of your own in a run.

python custom_schedule.py corpus.jsonl
"""

from __future__ import annotations

import math
import sys
from typing import Any

import minimind


def restarts(step: int, total_steps: int, *, cycles: int = 4, warmup: int = 10) -> float:
    """Return the learning rate as a fraction of its peak: cosine with warm restarts (arXiv:1608.03983).

    A pure function of the step, so that a resumed run takes the same steps.
    """
    if step < warmup:
        return (step + 1) / warmup
    position = (step - warmup) / max(total_steps - warmup, 1) * cycles % 1.0
    return 0.1 + 0.9 * (1 + math.cos(math.pi * position)) / 2


def train(**options: Any) -> Any:
    """Train with the preset `tiny`, changed by `options`."""
    config = minimind.preset_config("tiny", output_dir="runs/restarts", **options)
    return minimind.pretrain(config, schedule=restarts)


if __name__ == "__main__":
    print(train(data=(sys.argv[1],)).history.learning_rates)
