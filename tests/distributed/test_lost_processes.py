"""When a process fails, is killed, hangs or loses its network, all end, name it, and can resume."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from minimind.checkpoint.files import stored_checkpoints
from minimind.training.pretrain import pretrain
from support.cycle_corpus import write_corpus
from support.launching import (
    ACCELERATE,
    FEW_STEPS,
    TIMEOUT,
    command,
    launch,
    launched,
    pid_of,
    rank_of,
    rows,
    torchrun,
    wait_for,
    wait_for_step,
)
from support.tiny_runs import tiny

pytestmark = [pytest.mark.slow, pytest.mark.alone]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", documents=120)


INPUTS = """
sys.argv += ['--learning-rate', str((rank + 1) / 1000)]
sys.argv[sys.argv.index('--data') + 1] += ['', '.other.jsonl'][rank]
os.environ['ACCELERATE_MIXED_PRECISION'] = ['no', 'bf16'][rank]"""
# Compared later, with the initial weights.
COMPILATION = "os.environ['ACCELERATE_DYNAMO_BACKEND'] = ['no', 'inductor'][rank]"


@pytest.mark.parametrize(
    ("code", "differences"),
    [
        (
            INPUTS,
            [
                r"rank 1 has --learning-rate 0\.002 where rank 0 has 0\.001[.;]",
                r"rank 1 has training text \w+ where rank 0 has \w+[.;]",
                r"rank 1 has precision bf16 where rank 0 has no[.;]",
            ],
        ),
        (COMPILATION, [r"rank 1 has compilation on where rank 0 has off\."]),
    ],
    ids=["inputs", "compilation"],
)
def test_ranks_that_disagree_are_named_with_both_values(
    corpus: Path, tmp_path: Path, code: str, differences: list[str]
) -> None:
    corpus.with_name("corpus.jsonl.other.jsonl").write_text(corpus.read_text().replace("cat", "dog"))
    done, text = launch(torchrun(code, corpus, tmp_path / "out", *FEW_STEPS), tmp_path)
    assert done != 0
    error = re.search("error: ranks disagree: (.*)", text)
    assert error, text
    for difference in differences:
        assert re.search(difference, error[1]), difference
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_process_that_fails_ends_the_others_and_is_named_by_them(corpus: Path, tmp_path: Path) -> None:
    code = """
import minimind.training.trainer
forward, calls = minimind.training.step.forward_loss, []
def fail(*args):
    calls.append(1)
    if rank == 1 and len(calls) == 4: raise ValueError("a fault in the fourth step")
    return forward(*args)
minimind.training.step.forward_loss = fail"""
    done, text = launch(torchrun(code, corpus, tmp_path / "out"), tmp_path)
    assert done != 0
    assert "rank 1: ValueError: a fault in the fourth step" in text
    assert "error: rank 1 failed with ValueError: a fault in the fourth step; rank 0 stopped." in text


def test_a_process_that_hangs_ends_the_others_in_time_and_is_named(corpus: Path, tmp_path: Path) -> None:
    code = """
import signal, time, minimind.training.trainer
forward, calls = minimind.training.step.forward_loss, []
def hang(*args):
    calls.append(1)
    if rank == 1 and len(calls) == 4:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(1000)
    return forward(*args)
minimind.training.step.forward_loss = hang"""
    args = torchrun(code, corpus, tmp_path / "out", "--dist-timeout", "4s")
    with launched(args, tmp_path) as process:
        wait_for_step(tmp_path / "out", 3)
        hanging = time.monotonic()
        text, _ = process.communicate(timeout=TIMEOUT)
    assert time.monotonic() - hanging < 25
    assert process.returncode != 0
    assert "error: rank 1 no longer answers: it was killed, hangs, or its machine cannot be reached;" in text


def test_a_process_that_is_stuck_when_another_dies_ends_and_names_it(corpus: Path, tmp_path: Path) -> None:
    """As over NCCL, whose operations neither return nor raise when a process is missing from them."""
    code = """
import threading, minimind.distributed.heartbeat, minimind.training.trainer
minimind.distributed.heartbeat.SHUTDOWN_SECONDS = 3.0
forward, calls = minimind.training.step.forward_loss, []
def stick(*args):
    calls.append(1)
    if rank == 0 and len(calls) == 4: threading.Event().wait()
    return forward(*args)
minimind.training.step.forward_loss = stick"""
    with launched(torchrun(code, corpus, tmp_path / "out"), tmp_path) as process:
        wait_for_step(tmp_path / "out", 3)
        os.kill(pid_of(process.pid, 1), signal.SIGKILL)
        killed = time.monotonic()
        text, _ = process.communicate(timeout=TIMEOUT)
    # The launcher itself would have ended it after 30 seconds, without a word.
    assert time.monotonic() - killed < 25
    assert process.returncode != 0
    assert "error: rank 1 no longer answers: it was killed, hangs, or its machine cannot be reached;" in text


@pytest.mark.parametrize(
    "way", ["torchrun", "accelerate", "accelerate with one process", "torchrun and a script"]
)
def test_processes_whose_launcher_is_killed_save_and_end(corpus: Path, tmp_path: Path, way: str) -> None:
    out = tmp_path / "out"
    args = torchrun("", corpus, out)
    processes = 1 if way == "accelerate with one process" else 2
    if way.startswith("accelerate"):
        several = ["--multi_gpu", "--main_process_port", 0] if processes > 1 else []
        launcher = [*ACCELERATE, *several, "--num_processes", processes]
        args = [*launcher, "-m", "minimind_cli", *command(corpus, out)]
    elif way != "torchrun":
        script = tmp_path / "rank.sh"
        script.write_text('"$@"\necho the script ends\n')
        place = args.index("--no-python") + 1
        args[place:place] = ["bash", script]
    with launched(args, tmp_path) as process:
        wait_for_step(out, 5)
        ranks = psutil.Process(process.pid).children(recursive=True)
        assert len(ranks) == (4 if way.endswith("script") else processes)
        process.kill()
        _, alive = psutil.wait_procs(ranks, timeout=30)
        for rank in alive:
            rank.kill()
        assert alive == []
        text, _ = process.communicate(timeout=TIMEOUT)
    assert re.search("end: +stopped by (the end of its launcher|another process) after step", text)
    assert stored_checkpoints(out / "checkpoints")[-1].step == max(row["step"] for row in rows(out))


APART = """
os.environ["GROUP_WORLD_SIZE"] = "2"
import contextlib
# Locks that hold on one machine only.
minimind.data.cache._locked = lambda path: contextlib.nullcontext()
"""


@pytest.mark.parametrize(
    ("machines", "cache", "builders"),
    [
        ("time.sleep([5, 0][rank])  # rank 1 comes first", "cache", "1"),
        (APART, "cache", "0"),
        (APART, "cache-{rank}", "0 and 1"),
    ],
    ids=["one machine", "machines that share a folder", "machines apart"],
)
def test_a_build_may_take_longer_than_processes_wait_for_each_other(
    corpus: Path, tmp_path: Path, machines: str, cache: str, builders: str
) -> None:
    code = f"""
import importlib, time, minimind.data.cache
module = importlib.import_module("minimind.data.prepare")
encode = module.encode
def slow(*args):
    print(f"rank {{rank}} builds", flush=True)
    time.sleep([0, 12][{"rank" if builders == "0 and 1" else "1"}])
    return encode(*args)
module.encode = slow
sys.argv += ["--cache-dir", f"{tmp_path / cache}"]
{machines}"""
    args = torchrun(code, corpus, tmp_path / "out", "--dist-timeout", "6s", "--verbose", *FEW_STEPS)
    done, text = launch(args, tmp_path)
    assert done == 0, text
    built = [rank for rank in "01" if f"rank {rank} builds" in text]
    assert " and ".join(built) == builders
    # The main process shows the report, whoever built the cache.
    assert text.count("data: training ") == 1


def test_a_run_whose_process_is_killed_twice_restarts_by_itself(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = torchrun("", corpus, out, "--save-interval", 4, "--dist-timeout", "30s", restarts=2)
    with launched(args, tmp_path) as process:
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
        text, _ = process.communicate(timeout=TIMEOUT)
    assert "restart 1 by the launcher: resuming as with --resume." in text
    assert "restart 2 by the launcher: resuming as with --resume." in text
    assert text.count("resuming from step") == 2
    assert text.count("stopped by SIGTERM") == 1
    steps = [row["step"] for row in rows(out) if "loss" in row]
    assert steps == list(range(1, len(steps) + 1))


def test_processes_that_were_refused_and_restarted_leave_another_run_alone(
    corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    pretrain(tiny(corpus, out, max_steps=2))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    # More steps, which --resume would train.
    code, text = launch(torchrun("", corpus, out, "--max-steps", 4, restarts=1), tmp_path)
    assert code != 0
    assert text.count(f"error: --output-dir {out} already holds a run; continue it with --resume") == 2
    # The other rank waits for this one, and ends when the launcher asks it to.
    assert "Unable to shutdown process" not in text
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


# --- two machines -----------------------------------------------------------------------------------------


@pytest.fixture
def machines() -> Iterator[tuple[str, str]]:
    """Two network namespaces joined by a cable."""
    names = (f"mm{os.getpid()}a", f"mm{os.getpid()}b")
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("network namespaces are not allowed here")
    try:
        ends = ["ip", "link", "add", cable(0), "netns", names[0], "type", "veth"]
        subprocess.run([*ends, "peer", "name", cable(1), "netns", names[1]], check=True)
        for number, name in enumerate(names):
            for args in (
                ["addr", "add", f"10.77.0.{number + 1}/24", "dev", cable(number)],
                ["link", "set", "lo", "up"],
                ["link", "set", cable(number), "up"],
            ):
                subprocess.run(["ip", "-n", name, *args], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def cable(number: int) -> str:
    """The name of the cable's end in a machine."""
    return f"mm{os.getpid() % 10**8}{'ab'[number]}"


def on_machine(machines: tuple[str, str], number: int, args: list[object]) -> list[object]:
    enter = ["ip", "netns", "exec", machines[number], "env", f"GLOO_SOCKET_IFNAME={cable(number)}"]
    place = f"--num_machines 2 --num_processes 2 --machine_rank {number} --main_process_ip 10.77.0.1"
    options = [*f"--multi_gpu {place} --main_process_port 29511".split(), "-m", "minimind_cli"]
    return [*enter, *ACCELERATE, *options, *args]


def test_two_machines_train_together_fail_together_and_go_on(
    corpus: Path, tmp_path: Path, machines: tuple[str, str]
) -> None:
    out = tmp_path / "out"
    args = command(corpus, out, "--save-interval", 4, "--dist-timeout", "20s")
    with (
        launched(on_machine(machines, 1, args), tmp_path) as second,
        launched(on_machine(machines, 0, args), tmp_path) as first,
    ):
        wait_for_step(out, 9)
        os.kill(pid_of(second.pid, 1), signal.SIGKILL)
        text, _ = first.communicate(timeout=TIMEOUT)
        second.communicate(timeout=TIMEOUT)
    assert first.returncode != 0
    assert second.returncode != 0
    assert "device:    CPU x 2" in text
    assert "error: rank 1 no longer answers" in text
    saved = stored_checkpoints(out / "checkpoints")[-1].step
    more = [*args, "--resume", "--max-steps", saved + 3]
    with (
        launched(on_machine(machines, 1, more), tmp_path) as second,
        launched(on_machine(machines, 0, more), tmp_path) as first,
    ):
        text, _ = first.communicate(timeout=TIMEOUT)
        second.communicate(timeout=TIMEOUT)
    assert (first.returncode, second.returncode) == (0, 0), text
    assert f"resuming from step {saved}" in text
    steps = [row["step"] for row in rows(out) if "loss" in row]
    assert steps == list(range(1, saved + 4))


def test_machines_that_lose_the_network_both_end_in_time_and_name_each_other(
    corpus: Path, tmp_path: Path, machines: tuple[str, str]
) -> None:
    out = tmp_path / "out"
    args = command(corpus, out, "--dist-timeout", "10s")
    with (
        launched(on_machine(machines, 1, args), tmp_path) as second,
        launched(on_machine(machines, 0, args), tmp_path) as first,
    ):
        wait_for_step(out, 5)
        ranks = [pid_of(launcher.pid, rank) for rank, launcher in enumerate((first, second))]
        subprocess.run(["ip", "-n", machines[1], "link", "set", cable(1), "down"], check=True)
        cut = time.monotonic()
        wait_for(lambda: rank_of(ranks[0]) is None and rank_of(ranks[1]) is None)
        assert time.monotonic() - cut < 30
        for launcher in (second, first):
            launcher.terminate()  # which looks for its partner for minutes
        texts = [launcher.communicate(timeout=TIMEOUT)[0] for launcher in (first, second)]
    for text, other in zip(texts, (1, 0), strict=True):
        assert f"error: rank {other} no longer answers: it was killed, hangs, or its machine" in text
