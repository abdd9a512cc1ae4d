"""Time and memory until the first step of a run on a very large corpus.

The index of the documents is written as a build writes it; the tokens are holes in sparse files, so that 100
billion of them fit on a small disk. Each measurement runs in a separate process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from minimind.data.document_index import IndexWriter
from minimind.data.shards import SHARD_TOKENS, SplitIndex, TokenShards

DOCUMENTS_AT_ONCE = 250_000
ROWS = 32  # of a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=float, default=100e9, help="tokens in all")
    parser.add_argument("--document-length", type=int, default=1000, help="mean tokens of a document")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens in a sequence")
    parser.add_argument("--weights", type=float, nargs="*", default=[0.5, 0.3, 0.2], help="of the entries")
    parser.add_argument("--folder", help="where the index is written; default: the temporary folder")
    args = parser.parse_args()

    weights = tuple(weight / sum(args.weights) for weight in args.weights)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        start = time.perf_counter()
        index = _write(Path(scratch), int(args.tokens), args.document_length, len(weights))
        print(
            f"{index.num_tokens:,} tokens in {index.num_documents:,} documents, {len(index.shard_tokens)} "
            f"files; index written in {time.perf_counter() - start:.0f} s"
        )
        print(f"{'order':>9}  {'start':>8}  {'open':>8}  {'first step':>10}  {'memory':>8}  {'after':>8}")
        for order in ("plain", "weighted"):
            for share in (0.0, 0.9):
                _forget(Path(scratch))
                row = _measure(
                    Path(scratch), index, args.seq_len, weights if order == "weighted" else (), share
                )
                print(f"{order:>9}  {share:>8.0%}  {row}", flush=True)


def _write(folder: Path, tokens: int, mean: int, parts: int) -> SplitIndex:
    rng = np.random.default_rng(0)
    writer = IndexWriter(folder, "train")
    files: list[int] = []
    while writer.num_tokens < tokens:
        lengths = rng.geometric(1 / mean, DOCUMENTS_AT_ONCE).astype(np.int64) + 2
        writer.append(lengths, min(writer.num_tokens * parts // tokens, parts - 1))
        if not files or files[-1] >= SHARD_TOKENS:
            files.append(0)
        files[-1] += int(lengths.sum())
    writer.close()
    for number, size in enumerate(files):
        path = folder / f"train-{number:05d}.bin"
        path.touch()
        os.truncate(path, 2 * size)
    return SplitIndex("uint16", tuple(files), writer.num_documents)


def _forget(folder: Path) -> None:
    """Let the system drop what it keeps of the files in memory, where it can be asked to."""
    if hasattr(os, "posix_fadvise"):
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _measure(folder: Path, index: SplitIndex, seq_len: int, weights: tuple[float, ...], share: float) -> str:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(folder, index, seq_len, weights, share, theirs))
    process.start()
    row: str = ours.recv()
    process.join()
    return row


def _work(
    folder: Path,
    index: SplitIndex,
    seq_len: int,
    weights: tuple[float, ...],
    share: float,
    result: Connection,
) -> None:
    from minimind.data.batch_plan import BatchPlan
    from minimind.data.loader import Loader

    def peak() -> float:
        # Linux counts in kilobytes, macOS in bytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)

    def timed(do: Callable[[], object]) -> float:
        start = time.perf_counter()
        do()
        return time.perf_counter() - start

    before = peak()
    start = time.perf_counter()
    shards = TokenShards(folder, "train", index, "")
    plan = BatchPlan(ROWS, 1, 1)
    loader = Loader(
        shards,
        seq_len=seq_len,
        packing=True,
        plan=plan,
        seed=0,
        process_index=0,
        device="cpu",
        weights=weights,
    )
    opened = time.perf_counter() - start
    steps = loader.steps(0, int(loader.sequences_per_epoch * share) // ROWS * ROWS)
    first = timed(lambda: next(steps))
    memory = peak() - before
    rest = timed(lambda: [next(steps) for _ in range(2000)])
    speed = 2000 * ROWS * seq_len / rest / 1e6
    result.send(f"{opened:>6.2f} s  {first:>8.2f} s  {memory:>5.0f} MB  {speed:>6.1f} M/s")


if __name__ == "__main__":
    main()
