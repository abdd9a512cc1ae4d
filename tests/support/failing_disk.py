"""A run whose disk refuses checkpoints for a while; called with a folder, the kind of refusal, the steps."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Any

from minimind import pretrain
from minimind.training.trainer import Trainer
from support.tiny_runs import tiny

FAILS_FROM, WORKS_AGAIN_FROM = 6, 14
# Reports and configuration fit, weights do not.
LARGEST_FILE = 100_000
NOBODY = 65534


def refuse(kind: str, checkpoints: Path) -> None:
    if kind == "too large":
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, resource.RLIM_INFINITY))
    else:
        checkpoints.chmod(0o555)
        if os.geteuid() == 0:  # root may write everywhere
            os.seteuid(NOBODY)


def allow(kind: str, checkpoints: Path) -> None:
    if kind == "too large":
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    else:
        if os.getuid() == 0:
            os.seteuid(0)
        checkpoints.chmod(0o755)


def main(folder: Path, kind: str, steps: int) -> None:
    out = folder / "run"
    work = Trainer.train_step

    def train_step(run: Any, batch: Any, limit: float) -> Any:
        if run.state.step + 1 == FAILS_FROM:
            refuse(kind, out / "checkpoints")
        elif run.state.step + 1 == WORKS_AGAIN_FROM:
            allow(kind, out / "checkpoints")
        return work(run, batch, limit)

    Trainer.train_step = train_step
    result = pretrain(tiny(folder / "corpus.jsonl", out), stop_after=steps, quiet=False, handle_signals=True)
    sys.exit(0 if result.steps == steps else 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
