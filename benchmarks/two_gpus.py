"""Check training on two GPUs: one command, one table, PASS or FAIL per row.

Every run is the `minimind-train` command, started by `accelerate launch` where it has two processes. Parts:

    equality  losses and order of the same steps on one GPU, with DDP and with FSDP2; AdamW in float32 and
              Muon in bf16
    resume    the same steps in three parts: 1, 2 and 1 GPUs; DDP, FSDP2 and DDP
    killed    a process ended by SIGKILL: the other ends in time and names it, --max_restarts resumes
    speed     tokens/s of two GPUs against twice those of one: DDP with minimind-3, FSDP2 with 350m
    saves     what a checkpoint every 50 steps costs on two GPUs

    python benchmarks/two_gpus.py
    python benchmarks/two_gpus.py --only speed saves --json result.json
    python benchmarks/two_gpus.py --cpu

With --cpu the same parts run in two processes on CPUs with tiny shapes, where speed is measured but not
judged, and FSDP2 is led over gloo, which Accelerate itself does not offer.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch

from minimind.data.builtin_corpus import builtin_documents

PARTS = ("equality", "resume", "killed", "speed", "saves")
WAYS = ("DDP", "FSDP2")
TOLERANCES = {"no": 1e-5, "bf16": 1e-2}
# Rates so low that training does not blow up the rounding of sums in another order: with AdamW at 1e-3 it
# grows from 1e-7 to 1e-3 within 30 steps, also in one process that cuts a step into other micro-batches.
OPTIMIZERS = {
    "no": "--optimizer adamw --learning-rate 1e-4",
    "bf16": "--optimizer muon --learning-rate 5e-4",
}
NAMES = {"no": "float32", "bf16": "bf16"}
CHAINS = {"1, 2, 1 GPUs": ("1 GPU", "DDP", "1 GPU"), "DDP, FSDP2, DDP": ("DDP", "FSDP2", "DDP")}
NEVER = 1_000_000_000
# A process that is waited for: far above what anything here takes.
TIMEOUT = 300.0
# Seconds within which processes that hang end the others.
DIST_TIMEOUT = 60
AS_FSDP2 = "as-fsdp2-on-cpu"

Args = tuple[object, ...]


@dataclass(frozen=True)
class Sizes:
    """What differs between GPUs and a proof on CPUs; speeds are judged on GPUs only.

    Attributes:
        small: the model whose losses are compared.
        small_batch: sequences of its micro-batch; a step is four of them on one GPU.
        small_len: tokens of its sequences.
        ddp: model and sequences per GPU that DDP is timed with.
        fsdp2: model and sequences per GPU that FSDP2 is timed with.
        steps: of a timed run of DDP and of FSDP2.
        save_every: steps between two checkpoints of the run that saves.
    """

    small: str
    small_batch: int
    small_len: int
    ddp: str
    fsdp2: str
    steps: dict[str, int]
    save_every: int = 50


GPU = Sizes(
    small="--hidden-size 256 --num-hidden-layers 4 --num-attention-heads 4 --num-key-value-heads 2",
    small_batch=8,
    small_len=512,
    ddp="--preset minimind-3 --batch-size 128",
    fsdp2="--preset 350m --batch-size 16 --max-seq-len 2048",
    steps={"DDP": 180, "FSDP2": 60},
)
CPU = Sizes(
    small="--hidden-size 32 --num-hidden-layers 2 --num-attention-heads 4 --num-key-value-heads 2",
    small_batch=2,
    small_len=64,
    ddp="--preset tiny --batch-size 4 --max-seq-len 64",
    fsdp2="--preset tiny --batch-size 4 --max-seq-len 128",
    steps={"DDP": 60, "FSDP2": 20},
    save_every=15,
)


@dataclass(frozen=True)
class Row:
    """One line of the table; `passed` is None where nothing is judged."""

    part: str
    what: str
    measured: str
    wanted: str
    passed: bool | None


class RunError(Exception):
    """A run that ended otherwise than it should, with its last words."""


@dataclass
class Bench:
    """All runs of one call, in one folder.

    Attributes:
        pool: does what is not timed.
        jobs: that were given to it.
    """

    options: argparse.Namespace
    folder: Path
    pool: ThreadPoolExecutor
    jobs: dict[object, Future[Any]] = field(default_factory=dict)
    sizes: Sizes = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = CPU if self.options.cpu else GPU
        # Short enough that an epoch, and with it a short step, ends within the steps compared.
        tokens = self.options.steps * 2 // 3 * 4 * self.sizes.small_batch * self.sizes.small_len
        self.short = write_corpus(self.folder / "short.jsonl", 3 * tokens)
        self.long = write_corpus(self.folder / "long.jsonl", None)

    # --- runs ---------------------------------------------------------------------------------------------

    def command(self, way: str, args: Args, restarts: int = 0) -> list[str]:
        """Return a launch of `pretrain`: way is `1 GPU`, `DDP` or `FSDP2`."""
        program: Args = ("-m", "minimind_cli", "pretrain")
        launch: Args = ()
        if way != "1 GPU":
            launch = ("-m", "accelerate.commands.launch", "--num_machines", 1, "--num_processes", 2)
            launch += ("--main_process_port", 0, "--max_restarts", restarts)
            if way == "FSDP2" and not self.options.cpu:
                launch += ("--use_fsdp", "--fsdp_version", 2)
            else:
                launch += ("--multi_gpu",)
                if way == "FSDP2":
                    program = (Path(__file__).resolve(), AS_FSDP2, "pretrain")
        return list(map(str, (sys.executable, *launch, *program, *args)))

    def environment(self) -> dict[str, str]:
        """Return the variables of a run, without what a configured Accelerate would add."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_"))}
        kept["HF_HOME"] = str(self.folder / "no-accelerate-config")
        if self.options.cpu:
            kept |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        return kept

    def run(self, name: str, way: str, args: Args) -> list[dict[str, Any]]:
        """Run to the end in a folder of that name; return the reports of steps.

        Raises:
            RunError: where it ends badly.
        """
        out = self.folder / name
        done = subprocess.run(
            self.command(way, (*args, "--output-dir", out)),
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            print(done.stdout[-6000:], file=sys.stderr)
            raise RunError(last_words(done.stdout))
        return reports(out)

    def args(self, data: Path, *more: object) -> Args:
        """Return the options that all runs share, and some more."""
        places = ("--data", data, "--cache-dir", self.folder / "cache", "--val-fraction", 0)
        quiet = ("--tracker", "none", "--epochs", 1_000_000, "--dist-timeout", f"{DIST_TIMEOUT}s")
        return (*places, *quiet, *more)

    def small(self, precision: str, last_step: int, *more: object) -> Args:
        """Return the options of a run whose losses are compared, up to a step."""
        sequences = self.sizes.small_batch
        shape = (*self.sizes.small.split(), "--max-seq-len", self.sizes.small_len)
        # The schedule is constant, so that where a part ends has no effect on it.
        rate = ("--lr-schedule", "constant", "--warmup-steps", 5, *OPTIMIZERS[precision].split())
        size = ("--batch-size", sequences, "--global-batch-size", 4 * sequences, "--max-steps", last_step)
        # In float32 nothing but the processes shall differ; bf16 is compiled on GPUs, as it would be trained.
        how = ("--mixed-precision", precision, *(("--no-compile",) if precision == "no" else ()))
        often = ("--log-interval", 1, "--save-interval", NEVER)
        return self.args(self.short, *shape, *rate, *size, *how, *often, *more)

    def begin(self) -> None:
        """Submit all that is not timed, most urgent first; runs share the devices, as many as may at once."""
        steps, only = self.options.steps, self.options.only
        equality = self.options.precision if "equality" in only else []
        for precision in dict.fromkeys([*equality, *(["no"] if "resume" in only else [])]):
            for way in ("1 GPU", *(WAYS if precision in equality else ())):
                name, args = f"{way}-{precision}".replace(" ", ""), self.small(precision, steps)
                self.submit((way, precision), lambda n=name, w=way, o=args: self.run(n, w, o))
        for chain in CHAINS if "resume" in only else ():
            self.submit(chain, lambda c=chain: self.chain(c))
        if "killed" in only:
            self.submit("killed", lambda: list(self.kill_twice()))

    def submit(self, job: object, do: Callable[[], Any]) -> None:
        """Give a job to the pool."""
        self.jobs[job] = self.pool.submit(do)

    def chain(self, name: str) -> list[dict[str, Any]]:
        """Do the steps in parts that are each started in another way."""
        ways = CHAINS[name]
        for part, way in enumerate(ways, 1):
            last = self.options.steps * part // len(ways)
            rows = self.run("-".join(ways).replace(" ", ""), way, self.small("no", last, "--resume"))
        return rows

    @cached_property
    def ddp_speed(self) -> float:
        """Tokens/s of two processes with DDP that never save."""
        return self.timed("DDP", "DDP", self.sizes.ddp, NEVER)

    def timed(self, way: str, steps_of: str, model: str, save_interval: int) -> float:
        """Return the tokens/s of a run by the clock, after its first fifth."""
        steps = self.sizes.steps[steps_of]
        args = self.args(self.long, *model.split(), "--max-steps", steps, "--save-interval", save_interval)
        name = f"speed-{way.replace(' ', '')}-{steps_of}-{save_interval}"
        rows = self.run(name, way, (*args, "--log-interval", max(steps // 40, 1)))
        shutil.rmtree(self.folder / name / "checkpoints")
        steady = [row for row in rows if steps // 5 <= row["step"] < steps]
        first, last = steady[0], steady[-1]
        return (last["tokens"] - first["tokens"]) / (last["elapsed"] - first["elapsed"])

    # --- parts --------------------------------------------------------------------------------------------

    def equality(self) -> Iterator[Row]:
        """The same steps by one process and by two."""
        for precision in self.options.precision:
            for way in WAYS:
                what = f"{way} as 1 GPU, {self.options.steps} steps, {NAMES[precision]}"
                yield self.compared("equality", what, (way, precision), precision)

    def resume(self) -> Iterator[Row]:
        """The same steps in three parts."""
        for chain in CHAINS:
            yield self.compared("resume", f"{chain}, float32", chain, "no")

    def killed(self) -> Iterator[Row]:
        """See `kill_twice`."""
        yield from self.jobs["killed"].result()

    def compared(self, part: str, what: str, job: object, precision: str) -> Row:
        """Return a row on how far losses are from those of one GPU, and whether the order is the same."""
        try:
            rows, reference = self.jobs[job].result(), self.jobs["1 GPU", precision].result()
        except RunError as error:
            return failed(part, what, error)
        tolerance = TOLERANCES[precision]
        wanted = f"<= {tolerance:g}, same order"
        if [row["step"] for row in rows] != [row["step"] for row in reference]:
            return Row(part, what, f"{len(rows)} steps instead of {len(reference)}", wanted, False)
        furthest = max(abs(a["loss"] - b["loss"]) for a, b in zip(rows, reference, strict=True))
        same = [row["digest"] for row in rows] == [row["digest"] for row in reference]
        measured = f"{furthest:.1e}, {'same' if same else 'OTHER'} order"
        return Row(part, what, measured, wanted, same and furthest <= tolerance)

    def kill_twice(self) -> Iterator[Row]:
        """Kill rank 1 twice: the launcher restarts all once, and gives up the second time."""
        out = self.folder / "killed"
        args = self.small("no", NEVER, "--save-interval", 10, "--output-dir", out)
        with launched(self.command("DDP", args, restarts=1), self.environment()) as (process, text):
            seconds, saved = [], 0
            for attempt in (1, 2):
                began = max((row["step"] for row in reports(out)), default=0)
                victim, other = (wait_for(lambda r=r: rank_of(process.pid, r), process) for r in (1, 0))
                wait_for(lambda b=began: reports(out)[-1:] and reports(out)[-1]["step"] > b + 15, process)
                saved = reports(out)[-1]["step"] // 10 * 10
                victim.send_signal(signal.SIGKILL)
                killed_at = time.monotonic()
                wait_for(lambda o=other: gone(o), None)
                seconds.append(time.monotonic() - killed_at)
                if attempt == 1:
                    # What comes after the checkpoint is written again by the new processes.
                    wait_for(lambda v=victim: (p := rank_of(process.pid, 1)) and p.pid != v.pid, process)
                    wait_for(lambda s=saved: any(row["step"] == s + 10 for row in reports(out)), process)
                    wait_for(lambda: "going on from step" in text(), process)
            code, said = process.wait(TIMEOUT), text()
        limit = DIST_TIMEOUT
        measured = " and ".join(f"{s:.1f} s" for s in seconds)
        yield Row(
            "killed", "the other process ends after", measured, f"< {limit} s each", max(seconds) < limit
        )
        other = re.search(r"rank 1 no longer answers", said)
        launcher = re.search(r"rank\s+: 1 .*\n\s+exitcode\s+: -9", said)
        names = [who for who, found in (("rank 0", other), ("the launcher", launcher)) if found]
        measured = " and ".join(names) or "nobody"
        yield Row("killed", "the dead process is named by", measured, "anybody", bool(names))
        going = re.search(r"going on from step [\d,]+", said)
        measured = f"{going[0]}, then exit code {code}" if going else f"exit code {code}"
        yield Row(
            "killed", "--max_restarts 1 of 2 kills", measured, "goes on, then fails", bool(going and code)
        )

    def speed(self) -> Iterator[Row]:
        """Tokens/s of two GPUs against twice those of one."""
        for way, model, wanted in (("DDP", self.sizes.ddp, 0.95), ("FSDP2", self.sizes.fsdp2, 0.90)):
            _, preset, _, sequences, *_ = model.split()
            what = f"{way}, {preset}, {sequences} sequences per process"
            try:
                one = self.timed("1 GPU", way, model, NEVER)
                two = self.ddp_speed if way == "DDP" else self.timed(way, way, model, NEVER)
            except RunError as error:
                yield failed("speed", what, error)
                continue
            measured = f"{two:,.0f} / (2 x {one:,.0f}) = {two / (2 * one):.1%}"
            yield Row("speed", what, measured, f">= {wanted:.0%}", self.judged(two >= wanted * 2 * one))

    def saves(self) -> Iterator[Row]:
        """What saving costs on two GPUs."""
        every = self.sizes.save_every
        what = f"DDP, a checkpoint every {every} steps"
        try:
            without = self.ddp_speed
            saving = self.timed("DDP", "DDP", self.sizes.ddp, every)
        except RunError as error:
            yield failed("saves", what, error)
            return
        measured = f"{saving:,.0f} / {without:,.0f} = {saving / without - 1:+.1%}"
        yield Row("saves", what, measured, ">= -3%", self.judged(saving >= 0.97 * without))

    def judged(self, passed: bool) -> bool | None:
        """Return the verdict on a speed: none on CPUs, whose cores all processes share."""
        return None if self.options.cpu else passed


def failed(part: str, what: str, error: Exception) -> Row:
    return Row(part, what, str(error)[:100], "", False)


def reports(out: Path) -> list[dict[str, Any]]:
    """Return the reports of steps that a run has written so far."""
    with suppress(OSError):
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return [row for line in lines if line.endswith("}") and "loss" in (row := json.loads(line))]
    return []


def last_words(text: str) -> str:
    """Return the line of a failed run that tells most."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "rror: " in line and "ChildFailedError" not in line]
    return (errors or lines or ["it said nothing"])[-1]


def write_corpus(path: Path, size: int | None) -> Path:
    """Write the text that Python carries as JSONL, or about `size` bytes of it."""
    with path.open("w", encoding="utf-8") as file:
        for text in builtin_documents():
            if size is not None and file.tell() >= size:
                break
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return path


@contextmanager
def launched(
    command: list[str], env: dict[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], str]]]:
    """Start a launcher; give it and a function that returns what was printed. Nothing is left behind."""
    with tempfile.TemporaryFile() as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)

        def text() -> str:
            return os.pread(file.fileno(), 1 << 24, 0).decode(errors="replace")

        try:
            yield process, text
        except BaseException:
            print(text()[-6000:], file=sys.stderr)
            raise
        finally:
            with suppress(psutil.NoSuchProcess):
                for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                    with suppress(psutil.NoSuchProcess):
                        child.kill()
            process.wait()


def rank_of(launcher: int, rank: int) -> psutil.Process | None:
    """Return the process that a launcher started with a rank, None while there is none."""
    with suppress(psutil.Error):
        for child in psutil.Process(launcher).children():
            with suppress(psutil.Error):
                if child.environ().get("RANK") == str(rank) and child.status() != psutil.STATUS_ZOMBIE:
                    return child
    return None


def gone(process: psutil.Process) -> bool:
    """Whether a process has ended."""
    with suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


def wait_for(find: Callable[[], Any], process: subprocess.Popen[bytes] | None) -> Any:
    """Return what `find` finds.

    Raises:
        RunError: where it takes too long, or the process has ended.
    """
    deadline = time.monotonic() + TIMEOUT
    while not (found := find()):
        if process is not None and process.poll() is not None:
            raise RunError(f"the launcher ended early with {process.returncode}")
        if time.monotonic() > deadline:
            raise RunError(f"nothing happened for {TIMEOUT:.0f} s")
        time.sleep(0.1)
    return found


def train_as_fsdp2_on_cpu(args: list[str]) -> None:
    """Run a command with Accelerate's FSDP2 over gloo, which it offers on accelerators only."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    from minimind_cli.app import main as command

    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.distributed.init_process_group("gloo")
    precision = args[args.index("--mixed-precision") + 1] if "--mixed-precision" in args else "no"
    Accelerator(mixed_precision=precision)
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=True
    )
    command(args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    parser.add_argument("--steps", type=int, default=30, help="of the runs whose losses are compared")
    parser.add_argument("--precision", nargs="+", choices=tuple(NAMES), default=tuple(NAMES))
    parser.add_argument("--cpu", action="store_true", help="two processes on CPUs, with tiny shapes")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows there as well")
    options = parser.parse_args()
    if not options.cpu and torch.cuda.device_count() < 2:
        sys.exit(f"{torch.cuda.device_count()} GPUs here, and two are needed; give --cpu for a proof on CPUs")
    where = "CPU, gloo"
    if not options.cpu:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        where = f"{torch.cuda.get_device_name()} x 2, NCCL {nccl}"
    print(f"{where}, torch {torch.__version__}, {datetime.date.today()}", flush=True)
    began = time.monotonic()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1 if options.cpu else 9) as pool:
        bench = Bench(options, Path(folder), pool)
        bench.begin()
        for part in (part for part in PARTS if part in options.only):
            try:
                for row in getattr(bench, part)():
                    rows.append(row)
                    show(row)
            except RunError as error:
                rows.append(failed(part, "ended early", error))
                show(rows[-1])
    seconds = time.monotonic() - began
    bad = sum(row.passed is False for row in rows)
    print(f"{len(rows)} rows, {bad} failed, {seconds:.0f} s")
    if options.json:
        values = {"where": where, "torch": torch.__version__, "seconds": seconds}
        options.json.write_text(json.dumps(values | {"rows": [asdict(row) for row in rows]}, indent=1))
    sys.exit(1 if bad or not rows else 0)


def show(row: Row) -> None:
    verdict = {True: "PASS", False: "FAIL", None: "-"}[row.passed]
    print(f"{verdict:<5}{row.part:<10}{row.what:<44}{row.measured:<46}{row.wanted}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == [AS_FSDP2]:
        train_as_fsdp2_on_cpu(sys.argv[2:])
    else:
        main()
