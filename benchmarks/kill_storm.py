"""Kill runs at many moments, resume each, and compare every end with an uninterrupted run to the last bit.

SIGKILL meets runs of one process and of two (gloo, started by torchrun's launcher) during start-up,
tokenization, training, saves, rotation and the final write. Parts of 25 kills run side by side; parts that
are done in --folder are not repeated.

    python benchmarks/kill_storm.py --kills 250 --jobs 8 --folder /tmp/kill_storm
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
KILLS_OF_A_PART = 25
# Bit for bit only there.
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "TOKENIZERS_PARALLELISM": "false"}
ROWS = (
    *("kills", "runs", "before the first step", "while tokenizing", "between the first and the last step"),
    *("during a save", "during a removal", "after the last step", "during the final write"),
    *("killed: all", "killed: launcher", "killed: 0", "killed: 1"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=250, help="half of them of runs of two processes")
    parser.add_argument("--jobs", type=int, default=1, help="parts at a time; each keeps two cores busy")
    parser.add_argument("--folder", type=Path, default=Path("kill_storm"))
    options = parser.parse_args()
    parts = max(-(-options.kills // KILLS_OF_A_PART), 2)
    kills = -(-options.kills // parts)
    began = time.monotonic()
    # Those of two processes first: they take longer.
    plan = sorted(((1 + part % 2, part) for part in range(parts)), reverse=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda one: run_part(options.folder, kills, *one), plan))
    failed = [error for _, error in results if error]
    sums: dict[int, Counter[str]] = {1: Counter(), 2: Counter()}
    for (processes, _), (happened, _) in zip(plan, results, strict=True):
        sums[processes].update(happened)
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, {datetime.date.today()}")
    print(f"{time.monotonic() - began:.0f} s, {options.jobs} parts at a time\n")
    print("| | one process | two processes |\n| --- | --- | --- |")
    for name in ROWS:
        print(f"| {name} | {sums[1][name]} | {sums[2][name]} |")
    print(f"\nparts whose runs did not all end like the uninterrupted one: {len(failed)}")
    for error in failed:
        print(error)
    sys.exit(1 if failed else 0)


def run_part(folder: Path, kills: int, processes: int, seed: int) -> tuple[dict[str, int], str]:
    """Return what happened in a part, and why it failed."""
    place = folder / f"processes-{processes}-seed-{seed}-kills-{kills}"
    result = place / "result.json"
    if not result.exists():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        # One thread each: a process with threads cannot fork safely.
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        path = os.pathsep.join(filter(None, (str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH"))))
        script = ROOT / "tests" / "support" / "killed_runs.py"
        done = subprocess.run(
            [sys.executable, script, place, str(kills), str(seed), str(processes)],
            env={**os.environ, **single, **ON_CPU, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            return {}, f"{place} (its logs are there):\n{done.stderr[-3000:]}"
        result.write_text(done.stdout)
    counts = json.loads(result.read_text())
    print(f"{place.name}: {counts['kills']} kills in {counts['seconds']:.0f} s", flush=True)
    return {name: counts.get(name, 0) for name in ROWS}, ""


if __name__ == "__main__":
    main()
