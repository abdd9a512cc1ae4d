"""Runs that end as runs end in practice: killed at any moment, or with a full disk."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minimind import pretrain
from minimind.checkpoint.files import latest_checkpoint, stored_checkpoints
from support.tiny_runs import STEPS, assert_same_end, tiny, write_corpus

TESTS = Path(__file__).parents[1]
# benchmarks/kill_storm.py and `full_disk_runs.py FOLDER 30` are the long versions.
KILLS = {1: 16, 2: 5}
MOMENTS = 4


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    # One thread each: a process with threads cannot fork safely, and results do not depend on the machine.
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **single, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}
    command = [sys.executable, str(TESTS / "support" / name), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_at_any_moment_resumes_to_the_same_end(tmp_path: Path, processes: int) -> None:
    """Weights, moments, reports and delivered model equal those of a run that nobody killed."""
    done = run_script("killed_runs.py", tmp_path, KILLS[processes], 1, processes)
    logs = "\n".join(log.read_text()[-2000:] for log in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    happened = json.loads(done.stdout)
    assert happened["kills"] == KILLS[processes]
    assert happened["while tokenizing"] >= 1
    writing = ("during a save", "during a removal", "during the final write")
    if processes == 1:
        assert sum(happened[name] for name in writing) >= 3


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limits")
@pytest.mark.parametrize(
    ("kind", "advice"), [("too large", "ulimit -f"), ("forbidden", "allow writing there")]
)
def test_a_disk_that_refuses_does_not_end_a_run(tmp_path: Path, kind: str, advice: str) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    straight = tiny(corpus, tmp_path / "straight")
    pretrain(straight)
    # Saves fall due after steps 4, 8, 12 and 16; the disk refuses those of 8 and 12.
    done = run_script("failing_disk.py", tmp_path, kind, 13)
    assert done.returncode == 0, done.stderr
    checkpoints = tmp_path / "run" / "checkpoints"
    # The page of the run is too large as well.
    lines = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    warnings = [line for line in lines if "report.html" not in line]
    assert [f"step {step} was not saved" in line for step, line in zip((8, 12, 13), warnings, strict=True)]
    assert all(advice in line and "Earlier checkpoints are untouched" in line for line in warnings)
    (left,) = stored_checkpoints(checkpoints)
    assert (left.step, left.problem()) == (4, None)
    assert not list(checkpoints.glob(".step-*"))
    # The state of step 4 is good: going on from it, the disk working again, ends as if nothing had been.
    checkpoints.chmod(0o755)
    pretrain(dataclasses.replace(straight, output_dir=str(tmp_path / "run"), resume="auto"))
    assert_same_end(tmp_path / "run", tmp_path / "straight")


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limits")
def test_a_disk_that_takes_files_again_gets_the_next_checkpoint(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus.jsonl")
    done = run_script("failing_disk.py", tmp_path, "too large", STEPS)
    assert done.returncode == 0, done.stderr
    newest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert newest.step == STEPS


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="needs a tmpfs, which only root mounts"
)
def test_a_disk_that_is_full_for_a_while_loses_no_report(tmp_path: Path) -> None:
    """The end equals that of an undisturbed run to the last bit, after a resume where the run had to stop."""
    done = run_script("full_disk_runs.py", tmp_path, MOMENTS)
    logs = "\n".join(log.read_text()[-2000:] for log in tmp_path.glob("log-*"))
    assert done.returncode == 0, done.stderr + logs
    happened = json.loads(done.stdout)
    assert (happened["moments"], happened["tracebacks"]) == (MOMENTS, 0)
    assert happened["warnings"] > 0
