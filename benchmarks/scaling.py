"""How speed and memory grow with the micro-batch and the sequence length.

Each cell is measured by `minimind-train bench`: real steps on random tokens, in one process, compiled for its
shape. Longer sequences cost more FLOPs per token, in attention. `cost` is the time per token relative to that
of the shortest sequences measured with as many sequences; `FLOP` is its arithmetic likewise. Cost should grow
no faster: `grows` is the ratio of the two.

    python benchmarks/scaling.py --preset minimind-3 --seconds 2
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from minimind.config.presets import PRESETS, preset_config
from minimind.errors import ConfigError
from minimind.planning.benchmark import benchmark

# A cell is skipped whose memory, in proportion to that of a smaller one, would be more than this share.
USABLE_MEMORY = 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", default="minimind-3", choices=PRESETS)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[8, 32, 128])
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--seconds", type=float, default=2.0, help="measured time of each cell")
    parser.add_argument("--minutes", type=float, default=6.0, help="begin no cell that would end later")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), help="default: the preset's")
    parser.add_argument("--json", metavar="PATH", help="write the results there")
    options = parser.parse_args()
    deadline = time.perf_counter() + 60 * options.minutes
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    title = f"{name}, torch {torch.__version__}, {datetime.date.today()}; {options.preset}"
    print(title, flush=True)
    cells: dict[tuple[int, int], dict[str, Any]] = {}
    longest = 0.0
    for size, length in order(options.batch_sizes, options.lengths):
        began = time.perf_counter()
        if began + longest > deadline:
            print(f"no time for {size} x {length}", file=sys.stderr, flush=True)
            continue
        if (expected := expected_memory(cells, size * length)) is not None:
            print(f"{size} x {length}: would need some {expected:.0f} GB", file=sys.stderr, flush=True)
            continue
        changes = {} if options.optimizer is None else {"optimizer": options.optimizer}
        cell = measure(options.preset, size, length, options.seconds, changes)
        longest = max(longest, time.perf_counter() - began)
        if cell is not None:
            cells[size, length] = cell
    print(table(cells))
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": title, "cells": list(cells.values())}, indent=1))


def order(batch_sizes: list[int], lengths: list[int]) -> list[tuple[int, int]]:
    """Return the cells: the row and the column of the middle first, should time run out."""
    middle = sorted(batch_sizes)[len(batch_sizes) // 2]
    cells = [(size, length) for size in sorted(batch_sizes) for length in sorted(lengths)]
    return sorted(cells, key=lambda cell: (cell[0] != middle and cell[1] != 512, cell[0] != middle, cell))


def expected_memory(cells: dict[tuple[int, int], dict[str, Any]], tokens: int) -> float | None:
    """Return the memory (10^9 bytes) that so many tokens would need, None where that is not too much."""
    smaller = [cell for cell in cells.values() if cell["batch_size"] * cell["max_seq_len"] <= tokens]
    if not smaller or not torch.cuda.is_available():
        return None
    nearest = max(smaller, key=lambda cell: cell["batch_size"] * cell["max_seq_len"])
    # Weights and moments do not grow.
    fixed = 16 * nearest["parameters"] / 1e9
    share = tokens / (nearest["batch_size"] * nearest["max_seq_len"])
    expected = fixed + max(nearest["memory_gb"] - fixed, 0.0) * share
    return expected if expected > USABLE_MEMORY * torch.cuda.mem_get_info()[1] / 1e9 else None


def measure(
    preset: str, size: int, length: int, seconds: float, changes: dict[str, Any]
) -> dict[str, Any] | None:
    """Return the measurement of one cell, None where it does not fit or would take too long."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        result = benchmark(preset_config(preset, batch_size=size, max_seq_len=length, **changes), seconds)
    except ConfigError as error:
        print(f"{size} x {length}: {error}", file=sys.stderr, flush=True)
        return None
    finally:
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if result.reduced:
        print(f"{size} x {length}: a step would take long here", file=sys.stderr, flush=True)
        return None
    print(
        f"{size} x {length}: {result.tokens_per_second:,.0f} tokens/s, start {result.start_seconds:.0f} s",
        file=sys.stderr,
        flush=True,
    )
    return dataclasses.asdict(result)


def table(cells: dict[tuple[int, int], dict[str, Any]]) -> str:
    """Return the cells, and how the cost of a token grows with the length, as a markdown table."""
    head = ("batch size", "length", "tokens/s", "memory", "MFU", "of matmul", "cost", "FLOP", "grows")
    lines = ["| " + " | ".join(head) + " |", "|" + "---:|" * len(head)]
    for (size, length), cell in sorted(cells.items()):
        base = cells[size, min(other for of, other in cells if of == size)]
        cost = base["tokens_per_second"] / cell["tokens_per_second"]
        flops = cell["flops_per_token"] / base["flops_per_token"]
        mfu = "-" if cell["mfu"] is None else f"{cell['mfu']:.1%}"
        lines.append(
            f"| {size} | {length} | {cell['tokens_per_second']:,.0f} | {cell['memory_gb']:.1f} GB | {mfu} | "
            f"{cell['matmul_share']:.1%} | {cost:.2f} | {flops:.2f} | {cost / flops:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
