"""Time from the start of the program to its first new step: a new run, or resumed early or late in an epoch.

The position in an epoch is found without replaying what came before it, so resuming near the end of a large
epoch must take as long as resuming at its start, and little longer than a start from nothing: what is added
is reading and verifying the checkpoint. Text is tokenized before the clock starts. Each time is that of a
separate process, from its launch to the line of its first new step in metrics.jsonl; processor time tells
what it is where the machine has other things to do.

    python benchmarks/resume.py --preset minimind2-small --size 200
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from synthetic_text import write_jsonl

from minimind.checkpoint.files import latest_checkpoint
from minimind.checkpoint.store import CheckpointStore, Snapshot

LIMIT = 1.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--size", type=int, default=200, help="megabytes of text in an epoch")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-seq-len", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=5, help="the shortest is shown")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_jsonl(folder / "corpus.jsonl", options.size * 10**6)
        # Leaves the token cache, files in the page cache, and a checkpoint at the start of the epoch.
        first_step(folder, options, "early", "--max-steps", "2", "--save-interval", "1")
        early = latest_checkpoint(folder / "early" / "checkpoints")
        assert early is not None
        sequences = sequences_per_epoch(folder / "early")
        late_sequence = sequences - sequences % options.batch_size - 10 * options.batch_size
        move(early.path, folder / "late", late_sequence, options.batch_size)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        print(
            f"{device}, torch {torch.__version__}, {datetime.date.today()}; {sequences:,} sequences per epoch"
        )
        cases = {
            "from nothing": ("none", []),
            f"resumed at sequence {2 * options.batch_size}": ("early", ["--resume"]),
            f"resumed at sequence {late_sequence:,}": ("late", ["--resume"]),
        }
        # Alternate, so that other load on the machine affects all alike.
        seconds: dict[str, list[tuple[float, float]]] = {case: [] for case in cases}
        for number in range(options.repeat):
            for case, (start, args) in cases.items():
                run = f"{start}-{number}"
                if start != "none":
                    subprocess.run(["cp", "-r", folder / start, folder / run], check=True)
                seconds[case].append(first_step(folder, options, run, *args))
    # What else the machine does only ever makes a start longer.
    shortest = {
        case: [min(column) for column in zip(*values, strict=True)] for case, values in seconds.items()
    }
    ratios = {
        case: [mine / base for mine, base in zip(values, shortest["from nothing"], strict=True)]
        for case, values in shortest.items()
    }
    print(f"{'':<28}{'by the clock':>20}{'processor time':>20}")
    for case, values in shortest.items():
        columns = zip(values, ratios[case], strict=True)
        print(f"{case:<28}" + "".join(f"{value:>10.2f} s{ratio:>6.2f} x" for value, ratio in columns))
    if any(min(pair) > LIMIT for pair in ratios.values()):
        sys.exit(f"a resumed run took more than {LIMIT} times as long")


def first_step(folder: Path, options: argparse.Namespace, run: str, *args: str) -> tuple[float, float]:
    """Return the seconds from a launch to the first new step, by the clock and of processor time."""
    out = folder / run
    command = [
        *(sys.executable, "-m", "minimind_cli", "pretrain", "--preset", options.preset),
        *("--data", folder / "corpus.jsonl", "--cache-dir", folder / "cache", "--output-dir", out),
        *("--batch-size", options.batch_size, "--max-seq-len", options.max_seq_len, "--log-interval", 1),
        *("--max-steps", 10**6, "--save-interval", 10**6, "--tracker", "none", *args),
    ]
    seen = reports(out)
    began = time.perf_counter()
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while reports(out) <= seen and process.poll() is None:
        time.sleep(0.005)
    seconds = time.perf_counter() - began
    used = psutil.Process(process.pid).cpu_times() if process.poll() is None else None
    if "--max-steps" not in args:
        process.kill()
    _, errors = process.communicate()
    if reports(out) <= seen:
        sys.exit(f"{run} made no step:\n{errors}")
    return seconds, used.user + used.system if used is not None else 0.0


def reports(out: Path) -> int:
    """Return how many steps a run has reported."""
    file = out / "metrics.jsonl"
    return file.read_text().count('"loss"') if file.exists() else 0


def sequences_per_epoch(out: Path) -> int:
    """Return the sequences of an epoch, from how far a run says it is after so many of them."""
    checkpoint = latest_checkpoint(out / "checkpoints")
    assert checkpoint is not None
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    epoch = [line["epoch"] for line in lines if "epoch" in line][-1]
    return round(checkpoint.trainer["state"]["row"] / epoch)


def move(checkpoint: Path, out: Path, sequence: int, batch_size: int) -> None:
    """Copy a run's checkpoint to another run, as that of a step late in the epoch."""
    stored = latest_checkpoint(checkpoint.parent)
    assert stored is not None
    step = sequence // batch_size
    state = {**stored.trainer["state"], "step": step, "row": sequence}
    trainer = {**stored.trainer, "step": step, "state": state}
    store = CheckpointStore(out / "checkpoints", 1)
    store.save(Snapshot(step, stored.weights(), stored.optimizer_state(), trainer))
    store.wait()


if __name__ == "__main__":
    main()
