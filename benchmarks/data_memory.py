"""Peak memory of tokenizing a small and a large file, and of loading the large one, in separate processes."""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

from synthetic_text import write_jsonl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, nargs=2, default=[10, 1000], help="sizes of the two files")
    parser.add_argument("--loader-steps", type=int, default=0, help="also load so many steps of 64 sequences")
    parser.add_argument("--tokenizer", help="a tokenizer.json or its folder; default: the shipped one")
    parser.add_argument("--folder", help="where the text is written; default: the temporary folder")
    args = parser.parse_args()

    peaks = []
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        print(f"{'what':>28}  {'peak memory':>12}  {'seconds':>8}")
        for megabytes in args.megabytes:
            path = Path(scratch, f"{megabytes}.jsonl")
            write_jsonl(path, megabytes * 1_000_000)
            peaks.append(_measure(f"tokenize {megabytes} MB", path, args.tokenizer, 0))
            if args.loader_steps:
                _measure(
                    f"{args.loader_steps} steps of {megabytes} MB", path, args.tokenizer, args.loader_steps
                )
    print(f"difference: {peaks[1] - peaks[0]:.0f} MB")


def _measure(what: str, path: Path, tokenizer: str | None, loader_steps: int) -> float:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    start = time.perf_counter()
    process = context.Process(target=_work, args=(path, tokenizer, loader_steps, theirs))
    process.start()
    peak = ours.recv()
    process.join()
    print(f"{what:>28}  {peak:>9.0f} MB  {time.perf_counter() - start:>8.1f}", flush=True)
    return peak


def _work(path: Path, tokenizer_path: str | None, loader_steps: int, result: Connection) -> None:
    from minimind.config.options import PretrainConfig
    from minimind.data.prepare import prepare_data
    from minimind.tokenizer import load_tokenizer

    config = PretrainConfig(data=(str(path),), cache_dir=str(path.parent / "cache"))
    data = prepare_data(config, load_tokenizer(tokenizer_path))
    if loader_steps:
        _load(data.train, loader_steps)
    # Linux counts in kilobytes, macOS in bytes.
    unit = 1e6 if sys.platform == "darwin" else 1e3
    result.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def _load(shards: object, count: int) -> None:
    from itertools import islice

    from minimind.data.batch_plan import BatchPlan
    from minimind.data.loader import Loader

    plan = BatchPlan(64, 1, 1)
    loader = Loader(shards, seq_len=512, packing=True, plan=plan, seed=0, process_index=0, device="cpu")
    for _ in islice(loader.steps(0), count):
        pass


if __name__ == "__main__":
    main()
