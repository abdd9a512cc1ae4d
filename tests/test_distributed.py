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
        print(process.communicate()[0])  # shown where a test fails


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
        # Compiled processes are compared with an eager one.
        result = pretrain(several.config(corpus, folder / name, 1, **changes | {"compile": False}))
        (folder / f"{name}.json").write_text(json.dumps({"steps": result.steps, "tokens": result.tokens}))
    torch.set_num_threads(threads)
    return folder


@pytest.mark.parametrize(
    ("topology", "processes", "wrapper", "names"),
    [
        ("ddp", 2, "DistributedDataParallel", ["packed", "padded", "accumulated", "untied", "bf16"]),
        ("ddp", 4, "DistributedDataParallel", ["packed", "padded", "accumulated"]),
        (
            "fsdp2",
            2,
            "FSDPMiniMindForCausalLM",
            ["packed", "padded", "accumulated", "untied", "bf16", "compiled"],
        ),
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
        assert evaluations[-1]["val_tokens"] == expected[-1]["val_tokens"]
        close = {"abs": 2e-2} if name == "bf16" else {"rel": 1e-6}
        # The look before the first step takes one batch of each process: mostly the same 8 rows, and weights.
        for number in (-1,) if name == "accumulated" else (0, -1):
            assert evaluations[number]["val_loss"] == pytest.approx(expected[number]["val_loss"], **close)
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
        assert min(tokens) < 0.95 * max(tokens)
        assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
        assert math.isfinite(steps[-1]["loss"])


# --- ways to launch ---------------------------------------------------------------------------------------

SINGLE_NODE = "compute_environment: LOCAL_MACHINE\nnum_machines: 1\nmachine_rank: 0\nnum_processes: 2\n"
# As `accelerate config` writes them.
CONFIGURATIONS = {
    "MULTI_GPU": SINGLE_NODE
    + "distributed_type: MULTI_GPU\nuse_cpu: false\ngpu_ids: all\nmixed_precision: 'no'\n",
    "MULTI_CPU": SINGLE_NODE + "distributed_type: MULTI_CPU\nuse_cpu: true\nmixed_precision: 'no'\n",
    "FSDP2": SINGLE_NODE
    + "distributed_type: FSDP\nuse_cpu: false\nmixed_precision: bf16\nfsdp_config:\n  fsdp_version: 2\n"
    + "  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP\n  fsdp_reshard_after_forward: true\n"
    + "  fsdp_offload_params: false\n  fsdp_cpu_ram_efficient_loading: true\n",
}
FEW_STEPS = ("--max-steps", 2)


def command(corpus: Path, out: Path, *more: object) -> list[object]:
    """Return the words of a run as small as those of `several`, without end unless told."""
    shape = "--hidden-size 32 --num-hidden-layers 2 --num-attention-heads 4 --num-key-value-heads 2"
    run = "--max-seq-len 64 --batch-size 4 --epochs 100000 --log-interval 1 --eval-batches 1 --tracker none"
    places = ("--data", corpus, "--cache-dir", corpus.parent / "cache", "--output-dir", out)
    return ["pretrain", *shape.split(), *run.split(), *places, *more]


def banner_line(text: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith("device:")]
    return line


@pytest.mark.parametrize("way", ["module", "console script", "MULTI_GPU"])
def test_accelerate_launch_trains_together_on_cpus(corpus: Path, tmp_path: Path, way: str) -> None:
    program: list[object] = ["-m", "minimind_cli"]
    options: list[object] = ["--multi_gpu", "--num_processes", 2]
    if way == "console script":
        script = tmp_path / "minimind-train"
        script.write_text("from minimind_cli.app import main\nmain()\n")
        program = [script]
    if way in CONFIGURATIONS:
        (tmp_path / "accelerate.yaml").write_text(CONFIGURATIONS[way])
        options = ["--config_file", tmp_path / "accelerate.yaml"]
    words = command(corpus, tmp_path / "out", *FEW_STEPS)
    code, text = launch([*ACCELERATE, *options, "--main_process_port", 0, *program, *words], tmp_path)
    assert code == 0, text
    assert banner_line(text) == "device: CPU x 2, float32, not compiled"
    assert "no GPU here: 2 processes train together on CPUs." in text
    # One process speaks.
    assert text.count("step 2/2 | loss") == 1
    assert len(losses(tmp_path / "out")) == 2
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        (["--cpu", "--num_processes", 2], "launch with accelerate launch --multi_gpu --num_processes N"),
        (["--config_file", "MULTI_CPU"], "launch with accelerate launch --multi_gpu --num_processes N"),
        (["--config_file", "FSDP2", "--main_process_port", 0], "train with DDP instead: accelerate launch"),
        (["--use_fsdp", "--num_processes", 2, "--main_process_port", 0], "add --fsdp_version 2"),
    ],
)
def test_a_launch_that_would_go_wrong_is_refused_before_any_work(
    corpus: Path, tmp_path: Path, options: list[object], answer: str
) -> None:
    for name, text in CONFIGURATIONS.items():
        (tmp_path / name).write_text(text)
    words = command(corpus, tmp_path / "out", *FEW_STEPS, "--cache-dir", tmp_path / "unused")
    code, text = launch([*ACCELERATE, *options, "-m", "minimind_cli", *words], tmp_path)
    assert code != 0
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert any(answer in line for line in errors), text
    assert len(errors) == len(set(errors))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "unused").exists()


# --- failures ---------------------------------------------------------------------------------------------


def torchrun(code: str, corpus: Path, out: Path, *more: object, restarts: int = 0) -> list[object]:
    """Return a launch of two processes that run some Python before the command line."""
    script = (
        f"import os, sys; rank = int(os.environ['RANK'])\n{code}\nfrom minimind_cli.app import main; main()"
    )
    launcher = (*TORCHRUN, "--nproc_per_node", 2, "--max_restarts", restarts, "--no-python", sys.executable)
    return [*launcher, "-c", script, *command(corpus, out, *more)]


def test_processes_that_are_not_alike_are_named_with_both_values(corpus: Path, tmp_path: Path) -> None:
    code = "sys.argv += ['--learning-rate', str((rank + 1) / 1000)]"
    done, text = launch(torchrun(code, corpus, tmp_path / "out", *FEW_STEPS), tmp_path)
    assert done != 0
    assert (
        "error: the processes are not alike: rank 1 has --learning-rate 0.002 where rank 0 has 0.001." in text
    )
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_process_that_fails_ends_the_others_and_is_named_by_them(corpus: Path, tmp_path: Path) -> None:
    code = """
import minimind.train
forward, calls = minimind.train.forward_loss, []
def fail(*args):
    calls.append(1)
    if rank == 1 and len(calls) == 4: raise ValueError("a fault in the fourth step")
    return forward(*args)
minimind.train.forward_loss = fail"""
    done, text = launch(torchrun(code, corpus, tmp_path / "out"), tmp_path)
    assert done != 0
    assert "rank 1: ValueError: a fault in the fourth step" in text
    assert (
        "error: rank 1 failed with ValueError: a fault in the fourth step; rank 0 went on no further." in text
    )


def test_a_process_that_hangs_ends_the_others_in_time_and_is_named(corpus: Path, tmp_path: Path) -> None:
    code = """
import signal, time, minimind.train
forward, calls = minimind.train.forward_loss, []
def hang(*args):
    calls.append(1)
    if rank == 1 and len(calls) == 4:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(1000)
    return forward(*args)
minimind.train.forward_loss = hang"""
    words = torchrun(code, corpus, tmp_path / "out", "--dist-timeout", "4s")
    with launched(words, tmp_path) as process:
        wait_for_step(tmp_path / "out", 3)
        hanging = time.monotonic()
        text, _ = process.communicate(timeout=PATIENCE)
    assert time.monotonic() - hanging < 25
    assert process.returncode != 0
    assert "error: rank 1 no longer answers: it was killed, hangs, or its machine cannot be reached;" in text


def test_a_run_whose_process_is_killed_twice_goes_on_by_itself(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = torchrun("", corpus, out, "--save-interval", 4, "--dist-timeout", "30s", restarts=2)
    with launched(words, tmp_path) as process:
        for victim in (1, 0):
            started = max((row["step"] for row in rows(out)), default=0)
            pid = pid_of(process.pid, victim)
            wait_for_step(out, started + 9)
            saved = stored_checkpoints(out / "checkpoints")[-1].step
            os.kill(pid, signal.SIGKILL)
            # Rows after the checkpoint are written again: wait for the new processes to take over.
            wait_for(lambda pid=pid, victim=victim: pid_of(process.pid, victim) != pid)
            wait_for(lambda saved=saved: stored_checkpoints(out / "checkpoints")[-1].step > saved)
        os.kill(pid_of(process.pid, 0), signal.SIGTERM)
        text, _ = process.communicate(timeout=PATIENCE)
    assert "restart 1 by the launcher: going on as with --resume." in text
    assert "restart 2 by the launcher: going on as with --resume." in text
    assert text.count("going on from step") == 2
    assert text.count("stopped by SIGTERM") == 1
    steps = [row["step"] for row in rows(out) if "loss" in row]
    assert steps == list(range(1, len(steps) + 1))


# --- two machines -----------------------------------------------------------------------------------------


@pytest.fixture
def machines() -> Iterator[tuple[str, str]]:
    """Two network namespaces joined by a cable."""
    names = (f"mm{os.getpid()}a", f"mm{os.getpid()}b")
    cables = (f"mm{os.getpid() % 10**8}a", f"mm{os.getpid() % 10**8}b")
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("network namespaces are not allowed here")
    try:
        cable = ["ip", "link", "add", cables[0], "netns", names[0], "type", "veth"]
        subprocess.run([*cable, "peer", "name", cables[1], "netns", names[1]], check=True)
        for number, (name, end) in enumerate(zip(names, cables, strict=True)):
            for words in (
                ["addr", "add", f"10.77.0.{number + 1}/24", "dev", end],
                ["link", "set", "lo", "up"],
                ["link", "set", end, "up"],
            ):
                subprocess.run(["ip", "-n", name, *words], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def on_machine(machines: tuple[str, str], number: int, words: list[object]) -> list[object]:
    cable = f"mm{os.getpid() % 10**8}{'ab'[number]}"
    enter = ["ip", "netns", "exec", machines[number], "env", f"GLOO_SOCKET_IFNAME={cable}"]
    place = f"--num_machines 2 --num_processes 2 --machine_rank {number} --main_process_ip 10.77.0.1"
    options = [*f"--multi_gpu {place} --main_process_port 29511".split(), "-m", "minimind_cli"]
    return [*enter, *ACCELERATE, *options, *words]


def test_two_machines_train_together_fail_together_and_go_on(
    corpus: Path, tmp_path: Path, machines: tuple[str, str]
) -> None:
    out = tmp_path / "out"
    words = command(corpus, out, "--save-interval", 4, "--dist-timeout", "20s")
    with (
        launched(on_machine(machines, 1, words), tmp_path) as second,
        launched(on_machine(machines, 0, words), tmp_path) as first,
    ):
        wait_for_step(out, 9)
        os.kill(pid_of(second.pid, 1), signal.SIGKILL)
        text, _ = first.communicate(timeout=PATIENCE)
        second.communicate(timeout=PATIENCE)
    assert first.returncode != 0
    assert second.returncode != 0
    assert "device: CPU x 2" in text
    assert "error: rank 1 no longer answers" in text
    saved = stored_checkpoints(out / "checkpoints")[-1].step
    more = [*words, "--resume", "--max-steps", saved + 3]
    with (
        launched(on_machine(machines, 1, more), tmp_path) as second,
        launched(on_machine(machines, 0, more), tmp_path) as first,
    ):
        text, _ = first.communicate(timeout=PATIENCE)
        second.communicate(timeout=PATIENCE)
    assert (first.returncode, second.returncode) == (0, 0), text
    assert f"going on from step {saved}" in text
    steps = [row["step"] for row in rows(out) if "loss" in row]
    assert steps == list(range(1, saved + 4))
