"""A process that has loaded everything and forks runs, killing each at a random moment until one finishes.

Loading torch takes seconds; a fork takes none. Nothing here may start a thread before the last fork.
Called with a folder, the number of kills, a seed and the number of processes of a run; prints one JSON object
about what happened. Several processes are started by torchrun's launcher, which forks them.
"""

from __future__ import annotations

import ctypes
import dataclasses
import faulthandler
import glob
import json
import mmap
import os
import random
import shutil
import signal
import stat
import sys
import time
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # accelerate loads it late
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import minimind.training.pretrain  # noqa: F401 - loads all that a run needs
from minimind.config.options import PretrainConfig
from support.launching import children
from support.tiny_runs import assert_same_end, tiny, write_corpus

MODULE = sys.modules["minimind.training.pretrain"]
# A kill waits for its moment at most so long: the run may have ended.
TIMEOUT = 60.0
SET_CHILD_SUBREAPER = 36
START_UP, TRAINING, AFTER_TRAINING = range(3)
PHASES = ("before the first step", "between the first and the last step", "after the last step")
# Shared with the forked processes: the phase of the run, and whether it began beside what a killed one left.
SHARED = mmap.mmap(-1, 2)


def hidden_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*"))


def checked_train(run: Any, train: Any = MODULE.Trainer.train) -> None:
    """Note the phase, and what a killed process left where this one begins to train."""
    main = os.environ.get("RANK", "0") == "0"
    if main:
        # The lock and the mark of the best checkpoint are written by this process.
        left = [
            name
            for name in hidden_files(Path(run.config.output_dir))
            if name != ".lock" and "best" not in name
        ]
        left += glob.glob(f"{run.config.cache_dir}/*.building-*")
        if left:
            print("left over:", left, flush=True)
            SHARED[1] = 1
        SHARED[0] = TRAINING
    train(run)
    if main:
        SHARED[0] = AFTER_TRAINING


MODULE.Trainer.train = checked_train


def slow_removal(path: Any, *arguments: Any, remove: Any = shutil.rmtree, **options: Any) -> None:
    """Remove a folder so slowly that a kill can meet it."""
    if ".deleted-" in str(path):
        time.sleep(0.02)
    remove(path, *arguments, **options)


shutil.rmtree = slow_removal


def close_sockets() -> None:
    """Close the inherited sockets, which a rank that is a program of its launcher would not have.

    Through them the port of the store would accept connections after the launcher was killed.
    """
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                os.close(int(name))


def train(config: PretrainConfig) -> None:
    launcher = os.getppid()
    close_sockets()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(1)
    MODULE.pretrain(config, quiet=False, handle_signals=True)
    if os.getppid() != launcher:  # which forked ranks would wait for, to give it their result
        os._exit(0)


def start(config: PretrainConfig, processes: int) -> int:
    """Fork a process group that runs `pretrain` and exits with 0; return its id."""
    SHARED[0] = START_UP
    child = os.fork()
    if child:
        with suppress(OSError):
            os.setpgid(child, child)  # here too, for it may be killed before it comes to it
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        log = os.open(f"{config.output_dir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if processes == 1:
            train(config)
        else:
            launch = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=processes,
                run_id=str(os.getpid()),
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                start_method="fork",
                max_restarts=0,
                local_addr="localhost",
            )
            elastic_launch(launch, train)(config)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int, *, wait: bool = False) -> bool:
    """Whether a child is over; a child that fails is an error."""
    pid, status = os.waitpid(child, 0 if wait else os.WNOHANG)
    if pid and os.waitstatus_to_exitcode(status):
        raise ChildProcessError(os.waitstatus_to_exitcode(status))
    return pid != 0


def wait_for_group(group: int, kill: object) -> None:
    """Wait until no process of a group is left."""
    deadline = time.monotonic() + TIMEOUT
    with suppress(ChildProcessError):
        while time.monotonic() < deadline:
            if os.waitpid(-group, os.WNOHANG)[0] == 0:
                time.sleep(0.005)
        os.killpg(group, signal.SIGUSR1)  # shows where they are
        time.sleep(1)
        os.killpg(group, signal.SIGKILL)
        raise AssertionError(f"processes outlived {kill} by {TIMEOUT:.0f} s")


@dataclasses.dataclass(frozen=True)
class Kill:
    """When to kill which process of a run.

    Attributes:
        phase: not before this phase.
        delay: seconds after the phase began, or after a file appeared.
        pattern: a file whose appearance is waited for.
        victim: `all` processes, the `launcher`, or the rank `0` or `1`.
    """

    phase: int
    delay: float
    pattern: str | None
    victim: str

    def carry_out(self, child: int) -> bool:
        """Kill; return False where the run ended before."""
        deadline = time.monotonic() + TIMEOUT
        pattern = self.pattern or "/"
        earlier = set(glob.glob(pattern)) if self.pattern else set()
        while SHARED[0] < self.phase or not set(glob.glob(pattern)) - earlier:
            if ended(child):
                return False
            if time.monotonic() > deadline:
                break
            time.sleep(0.0005)
        end = time.monotonic() + self.delay
        while time.monotonic() < end:
            if ended(child):
                return False
            time.sleep(min(0.01, max(end - time.monotonic(), 0)))
        if ended(child):
            return False
        victims = [child] if self.victim == "launcher" else []
        if self.victim in "01":
            victims = sorted(children(child))[int(self.victim) :]  # forked in the order of their ranks
        if victims:
            with suppress(ProcessLookupError):
                os.kill(victims[0], signal.SIGKILL)
        else:
            os.killpg(child, signal.SIGKILL)
        return True


def choose(
    chance: random.Random, config: PretrainConfig, spans: list[float], processes: int, *, first: bool
) -> Kill:
    """Return the next kill of a run; the first one meets the tokenization."""
    out, cache = Path(config.output_dir), config.cache_dir
    start_up, training = spans
    small = chance.uniform(0, 0.004)
    moments: list[tuple[int, float, str | None]] = [
        (START_UP, chance.uniform(0, start_up), None),
        (START_UP, chance.uniform(0, start_up / 2), f"{out}/.lock"),
        (TRAINING, chance.uniform(0, training), None),
        (TRAINING, small, f"{out}/checkpoints/.step-*.tmp-*"),
        (TRAINING, small, f"{out}/checkpoints/.step-*.tmp-*/manifest.json"),
        (TRAINING, small, f"{out}/checkpoints/.step-*.deleted-*"),
        (AFTER_TRAINING, small, f"{out}/.model.tmp"),
        (AFTER_TRAINING, small, f"{out}/.model.tmp/*.safetensors"),
    ]
    if first:
        moments = [(START_UP, small, f"{cache}/*.building-*")]
    victim = "all" if processes == 1 else chance.choice(["all", "all", "launcher", "0", "1"])
    return Kill(*chance.choice(moments), victim)


def main(folder: Path, kills: int, seed: int, processes: int) -> None:
    # Processes whose launcher was killed become children of this one, which waits for them.
    ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    chance = random.Random(seed)
    corpus = write_corpus(folder / "corpus.jsonl")
    changes = {"epochs": 4, "save_interval": 2, "eval_interval": 4, "eval_batches": 2}
    if processes > 1:
        changes |= {"batch_size": 8 // processes, "accumulation_steps": 1}
    straight = tiny(corpus, folder / "straight", **changes)
    began = time.monotonic()
    child = start(straight, processes)
    while SHARED[0] == START_UP and not ended(child):
        time.sleep(0.001)
    first_step = time.monotonic()
    ended(child, wait=True)
    spans = [first_step - began, time.monotonic() - first_step]
    count: Counter[str] = Counter()
    while count["kills"] < kills:
        number = count["runs"]
        count["runs"] += 1
        config = dataclasses.replace(
            straight,
            output_dir=str(folder / f"run-{number}"),
            cache_dir=str(folder / f"cache-{number}"),
            resume="auto",
        )
        out = Path(config.output_dir)
        first = True
        while True:
            child = start(config, processes)
            if count["kills"] >= kills:
                ended(child, wait=True)
                break
            kill = choose(chance, config, spans, processes, first=first)
            first = False
            if not kill.carry_out(child):
                break
            phase = PHASES[SHARED[0]]
            left = hidden_files(out) if out.exists() else []
            building = glob.glob(f"{config.cache_dir}/*.building-*")
            wait_for_group(child, kill)
            count["kills"] += 1
            count[phase] += 1
            count[f"killed: {kill.victim}"] += 1
            count["during a save"] += any(".tmp-" in name for name in left)
            count["during a removal"] += any(".deleted-" in name for name in left)
            count["during the final write"] += ".model.tmp" in left
            count["while tokenizing"] += bool(building)
        assert not hidden_files(out), hidden_files(out)
        assert not glob.glob(f"{config.cache_dir}/*.building-*")
        assert not SHARED[1], "a run trained beside what a killed one left"
        assert_same_end(out, Path(straight.output_dir))
        shutil.rmtree(out)
        shutil.rmtree(config.cache_dir)
    print(json.dumps({**count, "seconds": time.monotonic() - began, "spans": spans}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
