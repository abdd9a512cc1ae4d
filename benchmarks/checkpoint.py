"""Time what a checkpoint of a 64M-parameter run costs: how long training waits, writing, verifying, loading.

Run with `python benchmarks/checkpoint.py [--folder FOLDER] [--repeats N] [--device cpu]`.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from minimind.checkpoint.state_dict import gather_state_dict, load_state_dict, reserve_host_memory
from minimind.checkpoint.store import CheckpointStore

Result = TypeVar("Result")


class Weights(nn.Module):
    """The parameters of the `minimind-3` preset, without its arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6400, 768)
        for layer in range(8):
            shapes = (
                (768, 768),
                (384, 768),
                (384, 768),
                (768, 768),
                (2432, 768),
                (2432, 768),
                (768, 2432),
                (768,),
            )
            for number, shape in enumerate(shapes):
                self.register_parameter(f"layer{layer}_{number}", nn.Parameter(torch.randn(shape) * 0.02))


def timed(work: Callable[[], Result]) -> tuple[float, Result]:
    """Return how many seconds `work` took, and its result."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def measure(folder: Path, repeats: int, device: str) -> list[tuple[str, float]]:
    """Save and load `repeats` times; return rows of (what, seconds)."""
    accelerator = Accelerator(cpu=device == "cpu")
    model = Weights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
    model, optimizer = accelerator.prepare(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    reserved, held = timed(lambda: reserve_host_memory(accelerator, model, optimizer))
    held.clear()
    store = CheckpointStore(folder, keep=1)
    blocked: list[float] = []
    written: list[float] = []
    for step in range(1, repeats + 1):
        seconds, snapshot = timed(partial(gather_state_dict, accelerator, model, optimizer, {"step": step}))
        assert snapshot is not None
        returned, _ = timed(partial(store.save, snapshot))
        num_bytes = snapshot.num_bytes
        del snapshot
        finished, _ = timed(store.wait_until_written)
        store.wait()
        blocked.append(seconds + returned)
        written.append(returned + finished)
        gc.collect()
    verified, checkpoint = timed(store.latest)
    loaded, _ = timed(lambda: load_state_dict(accelerator, model, optimizer, checkpoint))
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}, {num_bytes / 1e6:.0f} MB of state")
    return [
        ("host memory set aside, once", reserved),
        ("training waits, first save", blocked[0]),
        ("training waits, later saves (median)", median(blocked[1:])),
        ("training waits, later saves (worst)", max(blocked[1:])),
        ("written and on the disk (median)", median(written)),
        ("found and verified", verified),
        ("restored", loaded),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for what, seconds in measure(Path(folder), max(arguments.repeats, 2), arguments.device):
            print(f"{what:40} {seconds * 1000:9.1f} ms")


if __name__ == "__main__":
    main()
