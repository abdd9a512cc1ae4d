"""Launches of several processes, as a user would start them, and a look at what they do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")
# Seconds until a launch counts as hung: several times what the longest needs on two busy cores.
TIMEOUT = 400.0
FEW_STEPS = ("--max-steps", 2)


def environment(tmp: Path, **more: str) -> dict[str, str]:
    """Return the variables of a launch, without those of the test run or of a configured Accelerate."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_", "TORCHELASTIC_"))
    }
    paths = os.pathsep.join([str(HERE.parent), str(HERE), *filter(None, sys.path)])
    return kept | {"PYTHONPATH": paths, "HF_HOME": str(tmp / "hf"), "OMP_NUM_THREADS": "1"} | more


@contextmanager
def launched(args: Sequence[object], tmp: Path, **env: str) -> Iterator[subprocess.Popen[str]]:
    """Start a launcher in a separate process group, and leave nothing of it behind."""
    process = subprocess.Popen(
        [str(word) for word in args],
        env=environment(tmp, **env),
        cwd=tmp,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        for pid in [*children(process.pid), process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        print(process.communicate()[0])  # shown where a test fails


def launch(args: Sequence[object], tmp: Path, **env: str) -> tuple[int, str]:
    """Run a launcher to its end; return its exit code and all that was printed."""
    with launched(args, tmp, **env) as process:
        out, _ = process.communicate(timeout=TIMEOUT)
        return process.returncode, out


def children(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def rank_of(pid: int) -> int | None:
    """Return the rank that a process was launched with; None where it is none of the ranks."""
    with suppress(OSError):
        for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            name, _, value = variable.partition(b"=")
            if name == b"RANK":
                return int(value)
    return None


def pid_of(launcher: int, rank: int) -> int:
    """Return the process of a rank, waiting for it to be there."""
    return wait_for(lambda: next((pid for pid in children(launcher) if rank_of(pid) == rank), None))


def wait_for(find: Any) -> Any:
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        if found := find():
            return found
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


def rows(out: Path) -> list[dict[str, Any]]:
    with suppress(OSError):
        return [
            json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if line[-1:] == "}"
        ]
    return []


def wait_for_step(out: Path, step: int) -> None:
    wait_for(lambda: any(row["step"] >= step for row in rows(out) if "loss" in row))


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in rows(out) if "loss" in row]


def command(corpus: Path, out: Path, *more: object) -> list[object]:
    """Return the arguments of a run as small as those of `several`, endless by default."""
    shape = "--hidden-size 32 --num-hidden-layers 2 --num-attention-heads 4 --num-key-value-heads 2"
    run = "--max-seq-len 64 --batch-size 4 --epochs 100000 --log-interval 1 --eval-batches 1 --tracker none"
    places = ("--data", corpus, "--cache-dir", corpus.parent / "cache", "--output-dir", out)
    return ["pretrain", *shape.split(), *run.split(), *places, *more]


def torchrun(code: str, corpus: Path, out: Path, *more: object, restarts: int = 0) -> list[object]:
    """Return a launch of two processes that run some Python before the command line."""
    script = (
        f"import os, sys; rank = int(os.environ['RANK'])\n{code}\nfrom minimind_cli.app import main; main()"
    )
    launcher = (*TORCHRUN, "--nproc_per_node", 2, "--max_restarts", restarts, "--no-python", sys.executable)
    return [*launcher, "-c", script, *command(corpus, out, *more)]
