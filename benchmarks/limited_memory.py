"""Train the presets on a GPU of which a process may use no more memory than a smaller one has.

For each preset and limit the estimate of `minimind/planning/memory.py` names the largest micro-batch that
fits, and a run of a few steps with it, evaluation and checkpoint included, shows whether it does:

    python benchmarks/limited_memory.py --gigabytes 8 12 16 24
    python benchmarks/limited_memory.py --budgets 40

With --budgets, so many random combinations of budget, size of text, sequence length and limit train what
`--budget` chooses instead: none may run out of memory.

Runs share the GPUs: only memory is measured. The limit holds for PyTorch's allocator; a smaller GPU also has
to hold the CUDA context, half a gigabyte, which is subtracted from it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from synthetic_text import write_jsonl

from minimind.config.presets import preset_config
from minimind.planning.memory import estimate_memory
from minimind.training.setup import resolve_run

PRESETS = ("minimind2-small", "minimind-3", "minimind-3-moe", "minimind2", "350m", "1b")
LARGEST_MICRO_BATCH = 64
CONTEXT_BYTES = 0.5e9
# Of the memory left; `--batch-size auto` leaves as much.
USABLE = 0.92
STEPS = 12
# What --budgets combines.
GIGABYTES = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 24.0)
BUDGETS = ("5s", "10s", "20s", "3M tokens", "20M tokens", "1e15 FLOPs", "1e16 FLOPs")
TEXT_BYTES = (300_000, 3_000_000, 30_000_000)
SEQ_LENS = (None, 128, 512, 2048, 4096)
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


def run(options: tuple[object, ...], limit: float, device: int) -> tuple[float, str]:
    """Train in a process of limited memory; return its peak in GB, and why it failed or an empty string."""
    with tempfile.TemporaryDirectory() as folder:
        always = ("--tracker", "none", "--log-interval", 1, "--output-dir", folder)
        command = [sys.executable, "-c", CHILD, str(limit), *map(str, ("pretrain", *options, *always))]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(device), "HF_HOME": folder}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        metrics = Path(folder) / "metrics.jsonl"
        rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    peak = max((row.get("memory_gb", 0.0) for row in rows), default=0.0)
    words = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return peak, "" if done.returncode == 0 else f"FAILED: {words[-1][:80] if words else ''}"


def train_preset(preset: str, gigabytes: float, device: int) -> str:
    """Run a case and return its line of the table."""
    limit = gigabytes * 1e9 - CONTEXT_BYTES
    case = largest(preset, limit)
    # Not compiled, as a short run is by default; compiled blocks take less memory.
    options = ("--preset", preset, "--batch-size", case.micro_batch, "--max-steps", STEPS, "--no-compile")
    recompute = ("--activation-checkpointing",) if case.recompute else ()
    peak, failed = run((*options, "--eval-batches", 4, *recompute), limit, device)
    how = f"{case.micro_batch}{', recomputed' * case.recompute}"
    return (
        f"| {gigabytes:g} GB | `{preset}` | {how} | {case.estimate / 1e9:.1f} | {failed or f'{peak:.1f}'} |"
    )


def train_budget(number: int, texts: dict[int, Path], device: int) -> str:
    """Run a random combination and return its line of the table."""
    draw = random.Random(number)
    gigabytes, budget = draw.choice(GIGABYTES), draw.choice(BUDGETS)
    size, seq_len = draw.choice(TEXT_BYTES), draw.choice(SEQ_LENS)
    options = ("--budget", budget, "--data", texts[size], *(("--max-seq-len", seq_len) if seq_len else ()))
    peak, failed = run(options, gigabytes * 1e9 - CONTEXT_BYTES, device)
    what = f"{budget} | {size / 1e6:g} MB | {seq_len or 'chosen'}"
    return f"| {number} | {gigabytes:g} GB | {what} | {failed or f'{peak:.1f}'} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[8.0, 12.0, 16.0, 24.0])
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--budgets", type=int, default=0, metavar="N", help="random combinations, no presets")
    parser.add_argument("--jobs", type=int, default=4, help="runs at once on each GPU")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA GPU here")
    gpus = torch.cuda.device_count()
    print(f"{torch.cuda.get_device_name()} x {gpus}, torch {torch.__version__}, {datetime.date.today()}")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs * gpus) as pool:
        if options.budgets:
            texts = {size: Path(folder) / f"{size}.jsonl" for size in TEXT_BYTES}
            for size, path in texts.items():
                write_jsonl(path, size)
            print("| | memory | budget | text | sequence length | peak GB |\n|---:|---|---|---|---|---:|")
            lines = pool.map(lambda i: train_budget(i, texts, i % gpus), range(options.budgets))
        else:
            print("| memory | preset | micro-batch | estimated GB | peak GB |\n|---|---|---|---:|---:|")
            cases = [(preset, limit) for limit in options.gigabytes for preset in options.presets]
            lines = pool.map(lambda i: train_preset(*cases[i], i % gpus), range(len(cases)))
        for line in lines:
            print(line, flush=True)


if __name__ == "__main__":
    main()
