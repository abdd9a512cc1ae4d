"""What saving costs a run: wall time of the same steps with a checkpoint every 50 of them and with none.

Two `pretrain` runs on the same text alternate, so that both see the same load of the machine. Time is counted
from report to report, saving included; warm-up and the last save are not.

    python benchmarks/saving_cost.py --preset minimind-3 --batch-size 128 --steps 300
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from pretrain_throughput import write_corpus

NEVER = 1_000_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", default="minimind-3")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--save-interval", type=int, default=50)
    parser.add_argument("extra", nargs="*", help="further options of pretrain, after --")
    options = parser.parse_args()
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
    print(f"ratio {speeds[options.save_interval] / speeds[NEVER]:.3f}")


def run(interval: int, options: argparse.Namespace, data: str, folder: Path) -> list[dict[str, Any]]:
    out = folder / f"run-{interval}"
    command = [
        *(sys.executable, "-m", "minimind_cli", "pretrain", "--preset", options.preset, "--data", data),
        *("--batch-size", options.batch_size, "--epochs", 10_000, "--max-steps", options.steps),
        *("--log-interval", max(options.steps // 30, 1), "--save-interval", interval),
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


if __name__ == "__main__":
    main()
