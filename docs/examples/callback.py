"""A callback that ends a run early, and whose state is part of the checkpoints.

python callback.py corpus.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import minimind


class EarlyStopping(minimind.Callback):
    """Ends the run when the validation loss has not fallen for `patience` evaluations."""

    def __init__(self, patience: int = 3) -> None:
        self.patience, self.best, self.bad = patience, float("inf"), 0

    def on_evaluation(self, run: Any, step: int, metrics: Mapping[str, Any]) -> None:
        """Compare with the best loss so far; after a resume this continues with what it was."""
        improved = metrics["val_loss"] < self.best
        self.best, self.bad = min(metrics["val_loss"], self.best), 0 if improved else self.bad + 1
        if self.bad >= self.patience:
            run.request_stop(f"a validation loss that does not fall below {self.best:.4f}")

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"best": self.best, "bad": self.bad}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.best, self.bad = state["best"], state["bad"]


def train(*, patience: int = 3, **options: Any) -> Any:
    """Train with the preset `tiny`, changed by `options`."""
    config = minimind.preset_config("tiny", output_dir="runs/early", **options)
    return minimind.pretrain(config, callbacks=[EarlyStopping(patience)])


if __name__ == "__main__":
    result = train(data=(sys.argv[1],), epochs=100)
    print(result.steps, result.stopped, result.history.val_losses)
