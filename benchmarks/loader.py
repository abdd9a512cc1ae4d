"""Speed of one process that builds sequences, without a model."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from minimind.data.batch_plan import BatchPlan
from minimind.data.loader import Loader
from minimind.data.shards import ShardWriter, TokenShards, token_dtype

VOCAB_SIZE = 6400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=float, default=60e6, help="tokens in the shards")
    parser.add_argument("--document-length", type=int, default=200, help="mean tokens of a document")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences in a micro-batch")
    parser.add_argument("--seq-len", type=int, action="append", help="tokens in a sequence; repeatable")
    parser.add_argument(
        "--weights", type=float, nargs="*", default=[], help="cut the text into entries of these weights"
    )
    parser.add_argument("--device", default="cpu", help="where the tensors go")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        weights = tuple(weight / sum(args.weights) for weight in args.weights)
        shards = _random_shards(Path(folder), int(args.tokens), args.document_length, max(len(weights), 1))
        plan = BatchPlan(args.batch_size, 2, 1)
        print(f"{shards.num_tokens:,} tokens in {shards.num_documents:,} documents, to {args.device}")
        print(
            f"{'packing':>7}  {'length':>6}  {'real tokens/s':>14}  {'positions/s':>13}  {'first step':>10}"
        )
        for packing in (True, False):
            for seq_len in args.seq_len or (512, 2048):
                loader = Loader(
                    shards,
                    seq_len=seq_len,
                    packing=packing,
                    plan=plan,
                    seed=0,
                    process_index=0,
                    device=args.device,
                    weights=weights,
                )
                start = time.perf_counter()
                steps = loader.steps(0)
                next(steps)
                first = time.perf_counter() - start
                for _ in steps:
                    pass
                if args.device.startswith("cuda"):
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - start
                places = loader.sequences_per_epoch * seq_len / seconds / 1e6
                print(
                    f"{'packed' if packing else 'padded':>7}  {seq_len:>6}  "
                    f"{loader.tokens_per_epoch / seconds / 1e6:>12.1f} M  {places:>11.1f} M  {first:>8.2f} s"
                )


def _random_shards(folder: Path, tokens: int, mean: int, parts: int) -> TokenShards:
    rng = np.random.default_rng(0)
    writer = ShardWriter(folder, "train", token_dtype(VOCAB_SIZE))
    written = 0
    while written < tokens:
        lengths = rng.geometric(1 / mean, size=5000).astype(np.int64) + 2
        part = written * parts // tokens
        writer.append(rng.integers(3, VOCAB_SIZE, int(lengths.sum()), dtype=np.uint16), lengths, part)
        written += int(lengths.sum())
    return TokenShards(folder, "train", writer.close(), "random")


if __name__ == "__main__":
    main()
