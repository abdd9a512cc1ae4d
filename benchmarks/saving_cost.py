"""What verified saves and cache checks cost a run that saves every 50 steps.

Two `pretrain` runs on the same text, with and without checkpoints, are compared by the clock, from report to
report, saving included; warm-up and the last save are not. On a machine with other load the second figure is
better: within the run that saves, all intervals between reports against the mean of those without a save.
The checks of the token cache are timed alone, and related to the tokens that the run read.

    python benchmarks/saving_cost.py --preset minimind-3 --batch-size 128 --steps 300
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from pretrain_throughput import write_corpus

from minimind.data.checksums import corrupt_chunk

TOKEN_BYTES = 2
NEVER = 1_000_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", default="minimind-3")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--save-interval", type=int, default=50)
    parser.add_argument("extra", nargs="*", help="further options of pretrain, after --")
    options = parser.parse_args()
    if options.save_interval % 10:
        parser.error("--save-interval is divided into ten reports: give a multiple of 10.")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, torch {torch.__version__}, {datetime.date.today()}")
    with tempfile.TemporaryDirectory() as folder:
        data = write_corpus(Path(folder) / "corpus.jsonl")
        speeds = {}
        for interval in (NEVER, options.save_interval):
            rows = run(interval, options, data, Path(folder))
            speeds[interval] = tokens_per_wall_second(rows, options.steps)
            saving = next(row["total_saving"] for row in reversed(rows) if "total_saving" in row)
            saves = options.steps // interval + 1
            name = "no checkpoints" if interval == NEVER else f"one every {interval} steps"
            print(
                f"{name:<24}{speeds[interval]:>12,.0f} tokens/s by the clock"
                f"{1000 * saving / saves:>10.0f} ms blocked by a save"
            )
            if interval != NEVER:
                print(f"within this run saving cost {100 * cost_within(rows, options):.2f}% of its time")
        print(f"ratio {speeds[options.save_interval] / speeds[NEVER]:.3f}")
        rate = checked_bytes_per_second(Path(folder) / "cache")
        share = 100 * TOKEN_BYTES * speeds[NEVER] / rate
        print(f"checks of the token cache: {rate / 1e6:,.0f} MB/s, {share:.4f}% of the time of a run")


def run(interval: int, options: argparse.Namespace, data: str, folder: Path) -> list[dict[str, Any]]:
    out = folder / f"run-{interval}"
    command = [
        *(sys.executable, "-m", "minimind_cli", "pretrain", "--preset", options.preset, "--data", data),
        *("--batch-size", options.batch_size, "--epochs", 10_000, "--max-steps", options.steps),
        *("--log-interval", max(options.save_interval // 10, 1), "--save-interval", interval),
        *("--eval-interval", NEVER, "--eval-batches", 1, "--tracker", "none"),
        *("--output-dir", out, "--cache-dir", folder / "cache", *options.extra),
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def tokens_per_wall_second(rows: list[dict[str, Any]], steps: int) -> float:
    """Return tokens by the clock from after the warm-up, a fifth of the steps, to before the last step."""
    reports = [row for row in rows if "tokens_per_second" in row and steps // 5 <= row["step"] < steps]
    first, last = reports[0], reports[-1]
    return (last["tokens"] - first["tokens"]) / (last["elapsed"] - first["elapsed"])


def cost_within(rows: list[dict[str, Any]], options: argparse.Namespace) -> float:
    """Return the share of time by which intervals with a save are longer, over whole periods of saving."""
    reports = [row for row in rows if "tokens_per_second" in row and "elapsed" in row]
    periods = range(options.save_interval, options.steps - options.save_interval, options.save_interval)
    at = {row["step"]: row["elapsed"] for row in reports}
    stride = max(options.save_interval // 10, 1)
    quiet, whole = [], 0.0
    for start in periods:
        ends = range(start + stride, start + options.save_interval + 1, stride)
        spans = [at[end] - at[end - stride] for end in ends]
        quiet += spans[len(spans) // 2 : -1]  # a save is blocking at the end, and written after the beginning
        whole += sum(spans)
    return whole / (len(periods) * (options.save_interval // stride) * mean(quiet)) - 1


def checked_bytes_per_second(cache: Path) -> float:
    """Return how fast the blocks of a token cache are compared with their checksums."""
    file = max(cache.glob("*/train-*.bin"), key=lambda path: path.stat().st_size)
    began = time.perf_counter()
    repeats = max((1 << 28) // file.stat().st_size, 1)
    for _ in range(repeats):
        assert corrupt_chunk(file) is None
    return repeats * file.stat().st_size / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
