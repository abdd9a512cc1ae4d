"""Training speed of `pretrain` on this machine's GPU: JSONL file in, metrics of a real run out.

Runs `pretrain` in a separate process, as a user would, on a JSONL file made of the text that Python
carries, and averages the tokens/s that the run itself reported after warm-up: over all of it, and from the
slowest to the fastest of its parts. Needs a CUDA GPU unless --allow-cpu is given.

    python benchmarks/pretrain_throughput.py --preset minimind-3 --batch-size 128 --seconds 30
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

import torch

from minimind.data.builtin_corpus import builtin_documents

# A part is the mean of so many reports; the first ones are warm-up: compilation, allocator, clocks.
REPORTS_OF_PART = 8
WARMUP_REPORTS = 4
WIDTHS = (12, 24, 7, 9, 9, 7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", action="append", help="repeatable; default minimind-3")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--max-seq-len", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=30.0, help="length of a measured part, roughly")
    parser.add_argument("--parts", type=int, default=3, help="measured one after the other")
    parser.add_argument("--steps", type=int, default=0, help="instead of --seconds: steps to run in all")
    parser.add_argument("--data", help="a JSONL file; default: the embedded text")
    parser.add_argument("--allow-cpu", action="store_true")
    parser.add_argument("extra", nargs="*", help="further options of pretrain, after --")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.allow_cpu:
        sys.exit("no CUDA GPU here; give --allow-cpu to run all the same")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, torch {torch.__version__}, {datetime.date.today()}")
    head = f"{'preset':<18}{'batch':>6}{'T':>6}{'tokens/s':>12}{'of parts':>24}{'MFU':>7}"
    print(head + f"{'memory':>9}{'start':>9}{'wait':>7}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or write_corpus(Path(folder) / "corpus.jsonl")
        for preset in options.preset or ["minimind-3"]:
            measure(preset, options, data, Path(folder))


def write_corpus(path: Path) -> str:
    with path.open("w", encoding="utf-8") as file:
        for text in builtin_documents():
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return str(path)


def measure(preset: str, options: argparse.Namespace, data: str, folder: Path) -> None:
    out = folder / f"run-{preset}"
    steps = options.steps or steps_for(preset, options)
    command = [
        *(sys.executable, "-m", "minimind_cli", "pretrain", "--preset", preset, "--data", data),
        *("--batch-size", options.batch_size, "--max-seq-len", options.max_seq_len),
        *("--epochs", 10_000, "--max-steps", steps, "--log-interval"),
        max(steps // (REPORTS_OF_PART * options.parts + WARMUP_REPORTS), 1),
        *("--save-interval", 1_000_000, "--eval-batches", 2, "--tracker", "none"),
        # What is measured stands for a long run, which compiles.
        *(["--compile"] if torch.cuda.is_available() else []),
        *("--output-dir", out, "--cache-dir", folder / "cache", *options.extra),
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    reports = [row for row in rows if row.get("tokens_per_second")]
    steady = reports[WARMUP_REPORTS:]
    length = len(steady) // options.parts
    if not length:
        sys.exit(f"{steps} steps are too few for {options.parts} parts; give more --steps or fewer --parts")
    parts = [
        mean(row["tokens_per_second"] for row in steady[first : first + length])
        for first in range(0, length * options.parts, length)
    ]
    summary = [
        f"{mean(parts):,.0f}",
        f"{min(parts):,.0f}-{max(parts):,.0f}",
        f"{mean(row['mfu'] for row in steady):.1%}" if steady[0].get("mfu") else "-",
        f"{steady[-1]['memory_gb']:.1f} GB",
        f"{rows[-1]['total_first_steps']:.1f} s",
        f"{mean(row['data_wait'] for row in steady):.1%}",
    ]
    print(f"{preset:<18}{options.batch_size:>6}{options.max_seq_len:>6}", end="")
    print("".join(f"{text:>{width}}" for text, width in zip(summary, WIDTHS, strict=True)), flush=True)


def steps_for(preset: str, options: argparse.Namespace) -> int:
    """Return about how many steps fill the time, from the size of the model and a speed of 400 TFLOP/s."""
    from minimind.config.presets import preset_config
    from minimind.modeling.config import MiniMindConfig

    config = preset_config(preset)
    shape = MiniMindConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        intermediate_size=config.intermediate_size,
    )
    flops = shape.flops_per_token(options.max_seq_len) * options.batch_size * options.max_seq_len
    # The reports before the measured ones are steps too.
    share = 1 + WARMUP_REPORTS / REPORTS_OF_PART / options.parts
    return max(int(options.seconds * options.parts * share * 4e14 / flops), 40)


if __name__ == "__main__":
    main()
