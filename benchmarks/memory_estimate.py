"""The estimate of a run's memory against the peak of real steps on a GPU.

Each line is a `benchmark` of a few steps in a separate process. On a CPU there is no peak to compare with:
--allow-cpu shows that the script runs, and the estimates.

    python benchmarks/memory_estimate.py
    python benchmarks/memory_estimate.py --case minimind-3:64:512 -- --optimizer muon
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile

import torch

# Preset, sequences of a micro-batch, tokens of a sequence.
CASES = (
    "minimind2-small:32:512",
    "minimind2-small:128:512",
    "minimind-3:32:512",
    "minimind-3:128:512",
    "minimind-3:16:2048",
    "minimind2:64:512",
    "350m:4:2048",
    "350m:16:2048",
    "1b:2:2048",
    "1b:8:2048",
)
# Beyond the default: what changes the formula.
VARIANTS: dict[str, tuple[str, ...]] = {
    "default": (),
    "accumulation": ("--accumulation-steps", "2"),
    "muon": ("--optimizer", "muon"),
    "recompute": ("--activation-checkpointing",),
    "not compiled": ("--no-compile",),
    "float32": ("--mixed-precision", "no"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--case", action="append", metavar="PRESET:ROWS:LENGTH", help="repeatable")
    parser.add_argument(
        "--variants", action="store_true", help="also other options, on the first case with minimind-3"
    )
    parser.add_argument("--allow-cpu", action="store_true")
    parser.add_argument("extra", nargs="*", help="further options of pretrain, after --")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.allow_cpu:
        sys.exit("no CUDA GPU here; give --allow-cpu to run all the same")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, torch {torch.__version__}, {datetime.date.today()}")
    print(f"{'case':<26}{'variant':<14}{'estimate':>10}{'measured':>10}{'error':>8}")
    cases = options.case or list(CASES)
    for case in cases:
        show(case, "default", options.extra)
    if options.variants:
        case = next((case for case in cases if case.startswith("minimind-3")), cases[0])
        for name, args in list(VARIANTS.items())[1:]:
            show(case, name, [*args, *options.extra])


def show(case: str, variant: str, extra: list[str]) -> None:
    """Print one line."""
    preset, size, length = case.split(":")
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "minimind_cli", "pretrain", "--plan", "--json", "--preset", preset),
            *("--batch-size", size, "--max-seq-len", length, "--output-dir", os.path.join(folder, "out")),
            *("--tracker", "none", *extra),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{case:<26}{variant:<14}failed: {done.stderr.strip().splitlines()[-1]}", flush=True)
        return
    plan = json.loads(done.stdout)
    estimate, measured = plan["memory_bytes"]["peak"], plan["memory_measured_bytes"]
    columns = [f"{estimate / 1e9:.2f} GB", "-", "-"]
    if measured is not None:
        columns[1:] = [f"{measured / 1e9:.2f} GB", f"{estimate / measured - 1:+.1%}"]
    elif plan["problems"]:
        columns[1] = "none fits"
    print(f"{case:<26}{variant:<14}{columns[0]:>10}{columns[1]:>10}{columns[2]:>8}", flush=True)


if __name__ == "__main__":
    main()
