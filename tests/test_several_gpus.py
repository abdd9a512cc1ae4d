"""The check that needs several GPUs does run: a part of it in two processes on the CPU, and its verdicts."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from threading import Barrier
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "several_gpus.py"


@pytest.mark.alone
@pytest.mark.slow
def test_losses_of_two_processes_are_compared_with_those_of_one(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    options = ["--cpu", "--parts", "equality", "--precision", "no", "--steps", "6", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [(row["what"], row["passed"]) for row in rows] == [
        ("DDP on 2 as 1 GPU, 6 steps, float32", True),
        ("FSDP2 on 2 as 1 GPU, 6 steps, float32", True),
    ]
    assert done.stdout.count("PASS ") == 2


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("several_gpus", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["several_gpus"] = module
    spec.loader.exec_module(module)
    return module


def test_rows_fail_that_should(script: ModuleType) -> None:
    def row(*steps: tuple[float, str] | Exception) -> Any:
        jobs: dict[object, Future[Any]] = {}
        for key, values in (
            ((script.ONE, "no"), [(3.0, "a"), (2.0, "b")]),
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


def bench(script: ModuleType, tmp_path: Path, *args: str) -> Any:
    script.write_corpus = lambda path, size: path  # of this copy of the script
    options = script.parse(["--cpu", "--steps", "2", *args])
    return script.Bench(options, tmp_path, script.time.monotonic() + 9.0, None)


def test_each_way_is_compared_and_launched(script: ModuleType, tmp_path: Path) -> None:
    two, four = (bench(script, tmp_path, "--gpus", gpus) for gpus in ("2", "4"))
    assert list(map(str, two.ways)) == ["DDP on 2", "FSDP2 on 2"]
    assert list(map(str, four.ways)) == ["DDP on 2", "FSDP2 on 2", "DDP on 4", "FSDP2 on 4", "HSDP on 4"]
    assert [", ".join(map(str, chain)) for chain in four.chains] == [
        "1 GPU, DDP on 4, DDP on 2",
        "DDP on 4, FSDP2 on 4, DDP on 4",
    ]
    # The same global batch for 1, 2 and all processes, also where four is no multiple of them.
    assert [bench(script, tmp_path, "--gpus", n).small_step for n in ("2", "6", "8")] == [8, 24, 16]
    four.options.cpu = False
    (hsdp,) = four.hsdp
    command = " ".join(four.command(hsdp, ("--max-steps", 2)))
    assert "--num_processes 4" in command
    assert "--parallelism_config_dp_replicate_size 2 --parallelism_config_dp_shard_size 2 -m mini" in command
    assert "--multi_gpu" in " ".join(four.command(four.ways[0], ()))
    assert "accelerate" not in " ".join(four.command(script.ONE, ()))


def test_single_gpus_are_timed_at_once_each_on_its_own(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    four = bench(script, tmp_path, "--gpus", "4")
    four.options.cpu = False
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    together, seen = Barrier(4), []

    def run(name: str, way: Any, args: Any, deadline: float, device: int) -> list[dict[str, Any]]:
        seen.append(four.environment(device)["CUDA_VISIBLE_DEVICES"])
        together.wait(5)
        return [
            {"step": n, "tokens": 100 * n, "elapsed": n + float(n >= 20), "memory_gb": 2.0} for n in range(41)
        ]

    monkeypatch.setattr(four, "run", run)
    speeds = four.measure_alone("minimind-3, 32")
    assert sorted(seen) == ["3", "5", "6", "7"]
    assert len(speeds) == 4
    assert four.measure_alone("minimind-3, 32") == speeds
    speed = speeds[0]
    # Of 40 steps the first fifth and the last are not counted; one takes twice as long.
    assert speed.tokens == pytest.approx(100 * 31 / 32)
    assert (speed.slowest, speed.memory) == (0.5, 2.0)


def test_speeds_are_judged_by_the_goals_on_gpus_alone(script: ModuleType, tmp_path: Path) -> None:
    two = bench(script, tmp_path)
    ddp, model = script.Way("DDP", 2), "minimind-3, 128"
    # On CPUs one run stands for all that are alone; on GPUs each is measured.
    alone = {
        (name, script.ONE, "", device): speed
        for device in (None, 0, 1)
        for name, speed in (
            (model, script.Speed(104.0 if device else 100.0, 1.0, 1.0)),
            ("minimind-3, 32", script.RunError("out of time")),
        )
    }
    two.speeds = alone | {
        (model, ddp, "", None): script.Speed(195.0, 0.98, 1.0),
        (model, ddp, "--optimizer adamw", None): script.Speed(200.0, 1.0, 1.0),
        (model, ddp, "--save-interval 15", None): script.Speed(190.0, 1.0, 1.0),
    }
    assert {row.passed for row in two.speed()} == {None, False}  # the run that failed
    two.options.cpu = False
    scaling, missing, muon, slowest = two.speed()
    measured = "195 / (100 to 104 each) = 95.6%, 97.5% of the slowest times 2, slowest report 98%, 1.0 GB"
    assert (scaling.measured, scaling.passed) == (measured, False)
    assert (missing.measured, missing.passed) == ("out of time", False)
    assert (muon.measured, muon.wanted, muon.passed) == ("2.5% of a step", "<= 3%", True)
    assert (slowest.measured, slowest.passed) == ("98.0% of the median", True)
    (saves,) = two.saves()
    assert (saves.measured, saves.passed) == ("190 / 195 = 97.4%", False)
    assert script.goals(4).large_batch < script.goals(2).large_batch


@pytest.mark.parametrize("args", [["--gpus", "1", "--cpu"], ["--gpus", "999"], ["--parts", "speeds"]])
def test_what_cannot_be_checked_here_is_refused(
    script: ModuleType, args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        script.parse(args)
    assert end.value.code == 2
    assert args[-1] in capsys.readouterr().err or "two or more are needed" in capsys.readouterr().err


def test_a_run_that_takes_too_long_is_ended_with_its_processes(script: ModuleType, tmp_path: Path) -> None:
    two = bench(script, tmp_path)
    sleeper = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(99)'])"
    two.command = lambda way, args: [sys.executable, "-c", sleeper]
    began = script.time.monotonic()
    with pytest.raises(script.RunError, match="out of time"):
        two.run("sleeper", script.ONE, (), deadline=began + 0.3)
    assert script.time.monotonic() - began < 9
    assert not [p for p in psutil.Process().children(recursive=True) if "sleep(99)" in " ".join(p.cmdline())]
