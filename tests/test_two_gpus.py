"""The check that needs two GPUs does run: a part of it in two processes on the CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "two_gpus.py"


@pytest.mark.alone
@pytest.mark.slow
def test_losses_of_two_processes_are_compared_with_those_of_one(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    options = ["--cpu", "--only", "equality", "--precision", "no", "--steps", "6", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [(row["what"], row["passed"]) for row in rows] == [
        ("DDP as 1 GPU, 6 steps, float32", True),
        ("FSDP2 as 1 GPU, 6 steps, float32", True),
    ]
    assert done.stdout.count("PASS ") == 2


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("two_gpus", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["two_gpus"] = module
    spec.loader.exec_module(module)
    return module


def test_rows_fail_that_should(script: ModuleType) -> None:
    def row(*steps: tuple[float, str] | Exception) -> Any:
        jobs: dict[object, Future[Any]] = {}
        for key, values in (
            (("1 GPU", "no"), [(3.0, "a"), (2.0, "b")]),
            ("other", list(steps)),
        ):
            jobs[key] = Future()
            if isinstance(values[0], Exception):
                jobs[key].set_exception(values[0])
            else:
                reports = [{"step": n, "loss": loss, "digest": d} for n, (loss, d) in enumerate(values)]
                jobs[key].set_result(reports)
        return script.Bench.compared(SimpleNamespace(jobs=jobs), "equality", "other", "other", "no")

    assert row((3.0, "a"), (2.000009, "b")).passed
    assert not row((3.0, "a"), (2.00002, "b")).passed
    assert not row((3.0, "a"), (2.0, "c")).passed
    assert not row((3.0, "a")).passed
    assert row(script.RunError("no such device")).measured == "no such device"
    assert not row(script.RunError("no such device")).passed
