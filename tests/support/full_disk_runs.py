"""Fills the disk of a run at many moments, for a while, and compares its end with an undisturbed run.

Called as root with a folder and the number of moments; mounts a tmpfs there. Prints one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch
import torch._dynamo  # accelerate loads it late

import minimind.training.pretrain  # noqa: F401 - loads all that a run needs
from minimind.config.options import PretrainConfig
from minimind.errors import UserError
from support.tiny_runs import assert_same_end, last_checkpoint, tiny, write_corpus

MODULE = sys.modules["minimind.training.pretrain"]
BLOCK = bytes(1 << 12)


def start(config: PretrainConfig, log: Path) -> int:
    """Fork a process that runs `pretrain` and exits as the command line does; return its id."""
    if child := os.fork():
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        MODULE.pretrain(config, quiet=False, handle_signals=True)
        code = 0
    except UserError as error:
        print("error:", error)
        code = 2
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def fill(folder: Path) -> Path:
    """Use up every byte of a file system."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for block in (BLOCK * 64, BLOCK, b"x"):
            with suppress(OSError):
                while True:
                    file.write(block)
    return filler


def main(folder: Path, moments: int) -> None:
    corpus = write_corpus(folder / "corpus.jsonl")
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], check=True)
    changes = {"log_interval": 1, "save_interval": 3, "epochs": 4, "tracker": ("tensorboard",)}
    straight = tiny(corpus, folder / "straight", **changes)
    count: Counter[str] = Counter()
    try:
        began = time.monotonic()
        assert os.waitstatus_to_exitcode(os.waitpid(start(straight, folder / "log"), 0)[1]) == 0
        span = time.monotonic() - began
        last_step = last_checkpoint(Path(straight.output_dir)).step
        for number in range(moments):
            out, log = disk / f"run-{number}", folder / f"log-{number}"
            config = dataclasses.replace(straight, output_dir=str(out))
            child = start(config, log)
            time.sleep(1.1 * span * number / moments)
            filler = fill(disk)
            time.sleep(0.15 * span)
            filler.unlink()
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            count[f"exit {code}"] += 1
            # Resumed where it had to stop, or where its last save met the full disk, which must be warned of.
            missed = f"the checkpoint of step {last_step} was not saved" in log.read_text()
            count["last save missed"] += missed
            if code or missed:
                resumed = dataclasses.replace(config, resume="auto")
                assert os.waitstatus_to_exitcode(os.waitpid(start(resumed, log), 0)[1]) == 0, log.read_text()
            count["warnings"] += log.read_text().count("warning: ")
            count["tracebacks"] += log.read_text().count("Traceback")
            left = [path.name for path in out.rglob(".*")]
            assert not left, left
            assert_same_end(out, Path(straight.output_dir))
            count["moments"] += 1
            subprocess.run(["rm", "-r", out], check=True)
    finally:
        subprocess.run(["umount", disk], check=True)
    print(json.dumps({**count, "seconds": round(time.monotonic() - began), "span": span}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
