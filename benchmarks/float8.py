"""Train presets in bf16 and in FP8 in turn: speed, memory and loss on the same text with the same seed.

Each run is a whole `pretrain` command, compiled. Speed is the mean over the reports after the first fifth of
the steps, loss the mean over the last tenth:

    python benchmarks/float8.py --presets 350m 1b --batch-sizes 16 8 --data train.jsonl

Differences of the losses within those of two seeds (--seeds 1 2) are noise.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from minimind.modeling import float8

PRECISIONS = ("bf16", "fp8")


class Measured(NamedTuple):
    """What a run reached: tokens/s, memory in GB, and mean loss at the end."""

    speed: float
    memory: float
    loss: float


def train(options: Sequence[object], folder: Path) -> Measured:
    """Run `pretrain` with the options and read its metrics."""
    command = [sys.executable, "-m", "minimind_cli", "pretrain", "--tracker", "none"]
    command += ["--compile", "--log-interval", "1", "--output-dir", str(folder), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr or done.stdout}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    reports = [line for line in lines if "loss" in line]
    steady = reports[len(reports) // 5 :]
    return Measured(
        # The mean of times: reports have equal numbers of tokens.
        statistics.harmonic_mean(line["tokens_per_second"] for line in steady if "tokens_per_second" in line),
        max(line.get("memory_gb", 0.0) for line in reports),
        statistics.fmean(line["loss"] for line in reports[-max(len(reports) // 10, 1) :]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["350m"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16], help="one for each preset")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--optimizer", default="normuon")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--data", nargs="+", default=[], help="default: the built-in text")
    options = parser.parse_args()
    if not float8.available():
        sys.exit("no NVIDIA GPU of compute capability 8.9 or more here")
    if len(options.presets) != len(options.batch_sizes):
        parser.error("--batch-sizes needs one size for each of --presets")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {datetime.date.today()}")
    print("| preset | sequences | seed | precision | tokens/s | memory | loss |")
    print("|---|---:|---:|---|---:|---:|---:|", flush=True)
    for preset, batch_size in zip(options.presets, options.batch_sizes, strict=True):
        for seed in options.seeds:
            found = {}
            for precision in PRECISIONS:
                run = (
                    *("--preset", preset, "--batch-size", batch_size, "--max-steps", options.steps),
                    *("--seed", seed, "--optimizer", options.optimizer, "--mixed-precision", precision),
                    *(word for file in options.data for word in ("--data", file)),
                )
                with tempfile.TemporaryDirectory() as folder:
                    found[precision] = one = train(run, Path(folder) / "run")
                print(
                    f"| `{preset}` | {batch_size} | {seed} | {precision} | {one.speed:,.0f} | "
                    f"{one.memory:.1f} GB | {one.loss:.4f} |",
                    flush=True,
                )
            bf16, fp8 = (found[precision] for precision in PRECISIONS)
            print(
                f"| `{preset}` | {batch_size} | {seed} | fp8 against bf16 | {fp8.speed / bf16.speed:.3f} x | "
                f"{fp8.memory / bf16.memory:.3f} x | {fp8.loss - bf16.loss:+.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
