"""Several processes do what one does, and end together; launched as a user launches them."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import several
import torch
from safetensors.torch import load_file
from test_pretrain import write_corpus

from minimind import pretrain
from minimind.stored_checkpoint import stored_checkpoints

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")
PATIENCE = 150.0


def environment(tmp: Path, **more: str) -> dict[str, str]:
    """Return the variables of a launch, without those of the test run or of a configured Accelerate."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_", "TORCHELASTIC_"))
    }
    paths = os.pathsep.join([str(HERE.parent), str(HERE), *filter(None, sys.path)])
    return kept | {"PYTHONPATH": paths, "HF_HOME": str(tmp / "hf"), "OMP_NUM_THREADS": "1"} | more


@contextmanager
def launched(words: Sequence[object], tmp: Path, **env: str) -> Iterator[subprocess.Popen[str]]:
    """Start a launcher in a process group of its own, and leave nothing of it behind."""
    process = subprocess.Popen(
        [str(word) for word in words],
        env=environment(tmp, **env),
        cwd=tmp,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        for pid in [*children(process.pid), process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def launch(words: Sequence[object], tmp: Path, **env: str) -> tuple[int, str]:
    """Run a launcher to its end; return its exit code and all that was printed."""
    with launched(words, tmp, **env) as process:
        out, _ = process.communicate(timeout=PATIENCE)
        return process.returncode, out


def children(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def rank_of(pid: int) -> int | None:
    """Return the rank that a process was launched with; None where it is none of the ranks."""
    with suppress(OSError):
        for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            name, _, value = variable.partition(b"=")
            if name == b"RANK":
                return int(value)
    return None


def pid_of(launcher: int, rank: int) -> int:
    """Return the process of a rank, waiting for it to be there."""
    return wait_for(lambda: next((pid for pid in children(launcher) if rank_of(pid) == rank), None))


def wait_for(find: Any) -> Any:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := find():
            return found
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


def rows(out: Path) -> list[dict[str, Any]]:
    with suppress(OSError):
        return [
            json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if line[-1:] == "}"
        ]
    return []


def wait_for_step(out: Path, step: int) -> None:
    wait_for(lambda: any(row["step"] >= step for row in rows(out) if "loss" in row))


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in rows(out) if "loss" in row]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", documents=120)


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of `several` by one process."""
    folder = tmp_path_factory.mktemp("alone")
    # Two threads that share a busy core with others wait for each other most of the time.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, changes in several.RUNS.items():
        result = pretrain(several.config(corpus, folder / name, 1, **changes))
        (folder / f"{name}.json").write_text(json.dumps({"steps": result.steps, "tokens": result.tokens}))
    torch.set_num_threads(threads)
    return folder


@pytest.mark.parametrize(
    ("topology", "processes", "wrapper", "names"),
    [
        ("ddp", 2, "DistributedDataParallel", ["packed", "padded", "accumulated", "untied", "bf16"]),
        ("ddp", 4, "DistributedDataParallel", ["packed", "padded", "accumulated"]),
        ("fsdp2", 2, "FSDPMiniMindForCausalLM", ["packed", "padded", "accumulated", "untied", "bf16"]),
        ("fsdp2", 4, "FSDPMiniMindForCausalLM", ["packed", "padded", "accumulated"]),
        ("hsdp", 4, "FSDPMiniMindForCausalLM", ["packed"]),
    ],
)
def test_several_processes_train_what_one_does(
    corpus: Path,
    alone: Path,
    tmp_path: Path,
    topology: str,
    processes: int,
    wrapper: str,
    names: list[str],
) -> None:
    script = [HERE / "several.py", tmp_path, corpus, topology, *names]
    code, text = launch([*TORCHRUN, "--nproc_per_node", processes, *script], tmp_path)
    assert code == 0, text
    exchanges = {}
    for name in names:
        told = json.loads((tmp_path / f"{name}.json").read_text())
        assert told["wrapped"] == wrapper
        exchanges[name] = told["exchanges"] / told["steps"]
        close = {"abs": 2e-2} if name == "bf16" else {"rel": 1e-5}
        ours, reference = rows(tmp_path / name), rows(alone / name)
        assert losses(tmp_path / name) == pytest.approx(losses(alone / name), **close)
        assert told["tokens"] == json.loads((alone / f"{name}.json").read_text())["tokens"]
        evaluations, expected = ([r for r in x if "val_loss" in r] for x in (ours, reference))
        assert [r["val_tokens"] for r in evaluations] == [r["val_tokens"] for r in expected]
        close = close if name == "bf16" else {"rel": 1e-6 if evaluations[0]["step"] == 0 else 1e-5}
        # Before the first step the weights are the same, so the loss is, but for the order of sums.
        assert evaluations[0]["val_loss"] == pytest.approx(expected[0]["val_loss"], **close)
        if name == "bf16":
            continue
        weights, wanted = (final_weights(folder / name) for folder in (tmp_path, alone))
        assert weights.keys() == wanted.keys()
        for key, tensor in weights.items():
            assert (tensor - wanted[key]).abs().max() < 1e-5, f"{name}: {key}"
    assert min(exchanges.values()) > 0
    # Gradients travel once a step, however many micro-batches it has.
    if "accumulated" in names:
        assert exchanges["accumulated"] == exchanges["packed"]
    if topology == "ddp":
        assert exchanges["packed"] == 1


def final_weights(out: Path) -> dict[str, Any]:
    return load_file(stored_checkpoints(out / "checkpoints")[-1].path / "model.safetensors")


def test_the_runs_compared_have_short_steps_and_learn(alone: Path) -> None:
    """Without these the comparison could pass for nothing."""
    for name in ("packed", "padded"):
        steps = [row for row in rows(alone / name) if "loss" in row]
        assert steps[-1]["epoch"] > 1
        tokens = [later["tokens"] - row["tokens"] for row, later in pairwise(steps)]
        assert min(tokens) < 0.8 * max(tokens)
        assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
        assert math.isfinite(steps[-1]["loss"])
