"""A process that has loaded everything and forks runs, killing each at a random moment until one finishes.

Loading torch takes seconds; a fork takes none. Nothing here may start a thread before the last fork.
Called with a folder, the number of kills and a seed; prints one JSON object about what happened.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # accelerate loads it late

import minimind.training.pretrain  # noqa: F401 - loads all that a run needs
from minimind.config.options import PretrainConfig
from support.tiny_runs import assert_same_end, tiny, write_corpus

MODULE = sys.modules["minimind.training.pretrain"]
LEFTOVERS = 3
# A kill waits for such a file at most so long: the run may have ended.
TIMEOUT = 20.0


def hidden_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*"))


def checked_train(run: Any, train: Any = MODULE.Trainer.train) -> None:
    """Refuse to train beside what a killed process left."""
    out = Path(run.config.output_dir)
    # The lock and the mark of the best checkpoint are written by this process.
    left = [name for name in hidden_files(out) if name != ".lock" and "best.json" not in name]
    if left:
        print("left over:", left, file=sys.stderr, flush=True)
        os._exit(LEFTOVERS)
    train(run)


MODULE.Trainer.train = checked_train


def slow_removal(path: Any, *arguments: Any, remove: Any = shutil.rmtree, **options: Any) -> None:
    """Remove a folder so slowly that a kill can meet it."""
    if ".deleted-" in str(path):
        time.sleep(0.02)
    remove(path, *arguments, **options)


shutil.rmtree = slow_removal


def start(config: PretrainConfig) -> int:
    """Fork a process group that runs `pretrain` and exits with 0; return its id."""
    child = os.fork()
    if child:
        os.setpgid(child, child)  # here too, for it may be killed before it comes to it
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        torch.set_num_threads(1)
        log = os.open(f"{config.output_dir}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        MODULE.pretrain(config, quiet=False, handle_signals=True)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int, *, wait: bool = False) -> bool:
    """Whether a child is over; a child that fails is an error."""
    pid, status = os.waitpid(child, 0 if wait else os.WNOHANG)
    if pid and os.waitstatus_to_exitcode(status):
        raise ChildProcessError(os.waitstatus_to_exitcode(status))
    return pid != 0


def kill_at(child: int, deadline: float, pattern: str | None, delay: float) -> bool:
    """Kill a child at a time, or a little after a file appears; return False where it ended before."""
    while time.monotonic() < deadline:
        if ended(child):
            return False
        if pattern is not None and glob.glob(pattern):
            time.sleep(delay)
            break
        time.sleep(0.0005)
    if ended(child):
        return False
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def main(folder: Path, kills: int, seed: int) -> None:
    chance = random.Random(seed)
    corpus = write_corpus(folder / "corpus.jsonl")
    changes = {"epochs": 6, "save_interval": 2, "eval_interval": 4, "eval_batches": 2}
    straight = tiny(corpus, folder / "straight", **changes)
    began = time.monotonic()
    ended(start(straight), wait=True)
    span = time.monotonic() - began
    count: Counter[str] = Counter()
    while count["kills"] < kills:
        number = count["runs"]
        count["runs"] += 1
        config = dataclasses.replace(
            straight,
            output_dir=str(folder / f"run-{number}"),
            cache_dir=str(folder / f"cache-{number}"),
            resume="auto",
        )
        out = Path(config.output_dir)
        while True:
            child = start(config)
            if count["kills"] >= kills:
                ended(child, wait=True)
                break
            # At a random moment, or at start-up, while a checkpoint is written, and so on.
            pattern = chance.choice(
                [None, f"{out}/.lock", f"{config.cache_dir}/*.building-*", f"{out}/checkpoints/.step-*.tmp-*",
                 f"{out}/checkpoints/.step-*.tmp-*/manifest.json", f"{out}/checkpoints/.step-*.deleted-*",
                 f"{out}/.model.tmp", f"{out}/.model.tmp/*.safetensors"]
            )  # fmt: skip
            wait = chance.uniform(0, 0.8 * span) if pattern is None else TIMEOUT
            if not kill_at(child, time.monotonic() + wait, pattern, chance.uniform(0, 0.004)):
                break
            count["kills"] += 1
            left = hidden_files(out) if out.exists() else []
            count["during a save"] += any(".tmp-" in name for name in left)
            count["during a removal"] += any(".deleted-" in name for name in left)
            count["during the final write"] += ".model.tmp" in left
            count["while tokenizing"] += bool(glob.glob(f"{config.cache_dir}/*.building-*"))
            count["before the first step"] += not (out / "metrics.jsonl").exists()
        assert not hidden_files(out), hidden_files(out)
        assert_same_end(out, Path(straight.output_dir))
    print(json.dumps({**count, "seconds": time.monotonic() - began, "span": span}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
