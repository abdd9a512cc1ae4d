"""How fast text becomes token shards, against the tokenizer alone on the same documents in the same run."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from synthetic_text import write_jsonl

from minimind.config.options import PretrainConfig
from minimind.data.files import find_files
from minimind.data.prepare import prepare_data
from minimind.data.readers import Reading, TextFile
from minimind.tokenizer import load_tokenizer

BATCH = 4096  # documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", action="append", help="text files; default: synthetic text")
    parser.add_argument("--megabytes", type=int, default=50, help="size of the synthetic text")
    parser.add_argument("--tokenizer", help="a tokenizer.json or its folder; default: the shipped one")
    parser.add_argument("--rounds", type=int, default=3, help="the best of so many is shown")
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        if not args.data:
            args.data = [f"{scratch}/text.jsonl"]
            write_jsonl(Path(args.data[0]), args.megabytes * 1_000_000)
        texts = [
            text
            for path in find_files(args.data, "--data")
            for text in TextFile(path, "--data").documents(Reading())
        ]
        size = sum(len(text.encode()) for text in texts) / 1e6
        print(f"{len(texts):,} documents, {size:.1f} MB of text")
        print(
            f"{'round':>5}  {'bare encode_batch':>18}  {'files to shards':>16}  {'ratio':>6}  {'CPU time':>8}"
        )
        best = [float("inf"), float("inf")]
        for number in range(args.rounds):
            # The bare tokenizer gets ready batches from memory, and its result is thrown away.
            start = time.perf_counter(), time.process_time()
            for first in range(0, len(texts), BATCH):
                tokenizer.encode_batch(texts[first : first + BATCH])
            bare, bare_cpu = time.perf_counter() - start[0], time.process_time() - start[1]
            config = PretrainConfig(data=tuple(args.data), cache_dir=f"{scratch}/cache-{number}")
            start = time.perf_counter(), time.process_time()
            prepare_data(config, tokenizer)
            whole, whole_cpu = time.perf_counter() - start[0], time.process_time() - start[1]
            best = [min(best[0], bare), min(best[1], whole)]
            print(
                f"{number:>5}  {size / bare:>13.2f} MB/s  {size / whole:>11.2f} MB/s  {bare / whole:>6.1%}  "
                f"{whole_cpu / bare_cpu:>8.1%}"
            )
        print(f" best  {size / best[0]:>13.2f} MB/s  {size / best[1]:>11.2f} MB/s  {best[0] / best[1]:>6.1%}")


if __name__ == "__main__":
    main()
