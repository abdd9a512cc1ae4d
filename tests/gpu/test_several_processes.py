"""What `benchmarks/several_gpus.py` checks without measuring speed, on up to four GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
GPUS = min(torch.cuda.device_count(), 4)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="needs two CUDA GPUs")]


@pytest.mark.parametrize("part", ["equality", "resume", "killed"])
def test_several_gpus_train_as_one_and_end_together(part: str, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    script = ROOT / "benchmarks" / "several_gpus.py"
    command = [sys.executable, str(script), "--gpus", str(GPUS), "--parts", part, "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    rows = json.loads(file.read_text())["rows"]
    assert rows, done.stderr
    assert [row for row in rows if not row["passed"]] == [], done.stdout + done.stderr
