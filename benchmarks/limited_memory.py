"""Train the presets on a GPU of which a process may use no more memory than a smaller one has.

For each preset and limit the estimate of `minimind/planning/memory.py` names the largest micro-batch that
fits, and a run of a few steps with it, evaluation and checkpoint included, shows whether it does:

    python benchmarks/limited_memory.py --gigabytes 8 12 16 24

Runs share the GPUs: only memory is measured. The limit holds for PyTorch's allocator; a smaller GPU also has
to hold the CUDA context, half a gigabyte, which is subtracted from it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from minimind.config.presets import preset_config
from minimind.planning.memory import estimate_memory
from minimind.training.setup import resolve_run

PRESETS = ("minimind2-small", "minimind-3", "minimind-3-moe", "minimind2", "350m", "1b")
LARGEST_MICRO_BATCH = 64
CONTEXT_BYTES = 0.5e9
# Of the memory left; `--batch-size auto` leaves as much.
USABLE = 0.92
STEPS = 12
# A child limits its own memory before it trains.
CHILD = """
import sys, torch
from minimind_cli.app import main
share = float(sys.argv[1]) / torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(share)
main(sys.argv[2:])
"""


class Case(NamedTuple):
    """A run: micro-batch, whether blocks are recomputed in the backward pass, and the estimate in bytes."""

    micro_batch: int
    recompute: bool
    estimate: float


def largest(preset: str, limit: float) -> Case:
    """Return the largest micro-batch whose estimate fits, without recomputing where possible.

    Where none does: a single sequence with recomputing, whose run shows whether the estimate is right.
    """
    config = preset_config(preset)
    model_config = resolve_run(config).model_config
    for recompute in (False, True):
        size = LARGEST_MICRO_BATCH
        while size:
            estimate = estimate_memory(
                model_config,
                sequences=size,
                seq_len=config.max_seq_len,
                precision="bf16",
                compiled="no",
                optimizer=config.optimizer,
                recompute=recompute,
                fused=True,
            )
            if estimate.peak <= USABLE * limit:
                return Case(size, recompute, estimate.peak)
            size //= 2
    return Case(1, True, estimate.peak)


def train(preset: str, gigabytes: float, device: int) -> str:
    """Run a case and return its line of the table."""
    limit = gigabytes * 1e9 - CONTEXT_BYTES
    case = largest(preset, limit)
    with tempfile.TemporaryDirectory() as folder:
        # Not compiled, as a short run is by default; compiled blocks take less memory.
        options = (
            *("pretrain", "--preset", preset, "--batch-size", case.micro_batch, "--max-steps", STEPS),
            *("--no-compile", "--tracker", "none", "--eval-batches", 4, "--log-interval", 1),
            *("--output-dir", folder, *(["--activation-checkpointing"] if case.recompute else [])),
        )
        command = [sys.executable, "-c", CHILD, str(limit), *map(str, options)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(device), "HF_HOME": folder}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        metrics = Path(folder) / "metrics.jsonl"
        rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    peak = max((row.get("memory_gb", 0.0) for row in rows), default=0.0)
    how = f"{case.micro_batch}{', recomputed' * case.recompute}"
    words = (done.stderr.strip() or done.stdout.strip()).splitlines()
    state = f"{peak:.1f}" if done.returncode == 0 else f"FAILED: {words[-1][:80] if words else ''}"
    return f"| {gigabytes:g} GB | `{preset}` | {how} | {case.estimate / 1e9:.1f} | {state} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[8.0, 12.0, 16.0, 24.0])
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--jobs", type=int, default=4, help="runs at once on each GPU")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA GPU here")
    gpus = torch.cuda.device_count()
    print(f"{torch.cuda.get_device_name()} x {gpus}, torch {torch.__version__}, {datetime.date.today()}")
    print("| memory | preset | micro-batch | estimated GB | peak GB |\n|---|---|---|---:|---:|", flush=True)
    cases = [(preset, limit) for limit in options.gigabytes for preset in options.presets]
    with ThreadPoolExecutor(options.jobs * gpus) as pool:
        for line in pool.map(lambda i: train(*cases[i], i % gpus), range(len(cases))):
            print(line, flush=True)


if __name__ == "__main__":
    main()
