"""How long a GPU does nothing between the kernels of training: from the trace of `pretrain --profile`.

    python benchmarks/gpu_idle.py --preset minimind-3 --batch-size 128
    python benchmarks/gpu_idle.py --batch-size 32 -- --no-cuda-graphs

The trace has steps 10 to 14 of a run on the text in Python, and what the GPU still did of the one before.
Idle is what no kernel and no copy covers of the time from the first of them to the last.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

# How the profiler files work of the device.
CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
STEPS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", default="minimind-3")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--max-seq-len", type=int, default=512)
    parser.add_argument("extra", nargs="*", help="further options of pretrain, after --")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA GPU here")
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, {datetime.date.today()}; {options.preset}")
    print(f"{'size':>6}{'recorded':>12}{'idle':>8}", flush=True)
    for size in options.batch_size:
        with tempfile.TemporaryDirectory() as folder:
            span, idle = measure(options, size, Path(folder))
        print(f"{size:>6}{span * 1e3:>9.1f} ms{idle:>8.1%}", flush=True)


def measure(options: argparse.Namespace, size: int, folder: Path) -> tuple[float, float]:
    """Return the seconds that were recorded, and the share of them in which the device did nothing."""
    command = [
        *(sys.executable, "-m", "minimind_cli", "pretrain", "--preset", options.preset, "--profile"),
        *("--batch-size", size, "--max-seq-len", options.max_seq_len, "--epochs", 1000, "--max-steps", STEPS),
        *("--val-fraction", 0, "--tracker", "none", "--save-interval", 1_000_000, "--log-interval", 10),
        # What is measured stands for a long run, which compiles.
        *("--compile", "--output-dir", folder / "run", *options.extra),
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
    (path,) = (folder / "run" / "profile").iterdir()
    events = json.loads(path.read_text())["traceEvents"]
    span, idle = idle_share(
        (event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") in CATEGORIES
    )
    return span / 1e6, idle


def idle_share(intervals: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Return the length from the first to the last of some intervals, and the share that none covers."""
    ordered = sorted(intervals)
    began = reached = ordered[0][0]
    idle = 0.0
    for start, end in ordered:
        idle += max(start - reached, 0.0)
        reached = max(reached, end)
    return reached - began, idle / (reached - began)


if __name__ == "__main__":
    main()
