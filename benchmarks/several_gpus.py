"""Check training on several GPUs: one command, one table, PASS or FAIL per row.

Every run is the `minimind-train` command, started by `accelerate launch` where it has several processes.
Parts:

    equality  losses and order of the same steps on 1, 2 and N GPUs, with DDP, FSDP2 and, on 4 or more, HSDP
              of two replicas; AdamW and Muon in float32, and Muon in bf16
    resume    the same steps in three parts: 1, N and N/2 GPUs; DDP, FSDP2 and DDP
    killed    a process ended by SIGKILL: the others end in time and name it, --max_restarts resumes
    speed     tokens/s of `minimind-3` against N single GPUs, Muon against AdamW, slowest report
    large     the same for `350m` with DDP and FSDP2, and `1b` with FSDP2 and HSDP
    experts   the same for `minimind-3-moe`
    saves     what a checkpoint every 50 steps costs

    python benchmarks/several_gpus.py --gpus 4 --parts equality resume killed
    python benchmarks/several_gpus.py --gpus 4 --parts speed experts saves --json result.json
    python benchmarks/several_gpus.py --gpus 4 --parts large
    python benchmarks/several_gpus.py --gpus 2 --cpu

The first three parts share the GPUs, the others follow one after another. The tokens/s of several GPUs are
compared with the sum of what each of them reaches alone, all at the same time. A part that takes longer than
its limit, or a call longer than --minutes, ends with failed rows.

With --cpu processes on CPUs train tiny models, and FSDP2 runs over gloo, which Accelerate itself does not
offer. Speed is then measured only if asked for, and not judged.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
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
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil
import torch

from minimind.data.builtin_corpus import builtin_documents

# Seconds of each part.
LIMITS = {
    "equality": 240,
    "resume": 240,
    "killed": 240,
    "speed": 270,
    "large": 300,
    "experts": 150,
    "saves": 150,
}
PARTS = tuple(LIMITS)
UNTIMED = PARTS[:3]


class Steps(NamedTuple):
    """How the steps whose losses are compared are computed, and how far the losses may be apart."""

    name: str
    precision: str
    optimizer: str
    tolerance: float


# Rates so low that training does not blow up the rounding of sums in another order: with AdamW at 1e-3 it
# grows from 1e-7 to 1e-3 within 30 steps, also in one process that cuts a step into other micro-batches.
STEPS = {
    "no": Steps("float32", "no", "--optimizer adamw --learning-rate 1e-4", 1e-5),
    "no-muon": Steps("float32, Muon", "no", "--optimizer muon --learning-rate 5e-4", 1e-4),
    "bf16": Steps("bf16", "bf16", "--optimizer muon --learning-rate 5e-4", 1e-2),
}
NEVER = 1_000_000_000
# At least what a token of the packaged tokenizer takes of the text that Python carries.
BYTES_PER_TOKEN = 5
# Seconds within which processes that hang end the others.
DIST_TIMEOUT = 60
AS_FSDP2 = "as-fsdp2-on-cpu"

Args = tuple[object, ...]


class Way(NamedTuple):
    """How many processes train, and how: `DDP`, `FSDP2` or `HSDP` of two replicas."""

    strategy: str
    processes: int

    def __str__(self) -> str:
        return "1 GPU" if self.processes == 1 else f"{self.strategy} on {self.processes}"


ONE = Way("DDP", 1)


class Model(NamedTuple):
    """What a timed run trains: options, sequences of a micro-batch, tokens of a sequence, and steps."""

    options: str
    batch_size: int
    seq_len: int
    steps: int


@dataclass(frozen=True)
class Sizes:
    """What differs between GPUs and a proof on CPUs; speeds are judged on GPUs only.

    Attributes:
        small: the model whose losses are compared.
        small_batch: sequences of its micro-batch; a step is at least four of them.
        small_len: tokens of its sequences.
        models: of the runs that are timed.
        save_every: steps between two checkpoints of the run that saves.
    """

    small: str
    small_batch: int
    small_len: int
    models: dict[str, Model]
    save_every: int = 50


GPU = Sizes(
    small="--hidden-size 256 --num-hidden-layers 4 --num-attention-heads 4 --num-key-value-heads 2",
    small_batch=8,
    small_len=512,
    models={
        "minimind-3, 128": Model("--preset minimind-3", 128, 512, 180),
        "minimind-3, 32": Model("--preset minimind-3", 32, 512, 600),
        "350m, 16 x 2048": Model("--preset 350m", 16, 2048, 60),
        "1b, 8 x 2048": Model("--preset 1b", 8, 2048, 40),
        "minimind-3-moe, 128": Model("--preset minimind-3-moe", 128, 512, 140),
    },
)
TINY = "--preset tiny"
CPU = Sizes(
    small="--hidden-size 32 --num-hidden-layers 2 --num-attention-heads 4 --num-key-value-heads 2",
    small_batch=2,
    small_len=64,
    models={name: Model(f"{TINY} --use-moe" if "moe" in name else TINY, 4, 64, 40) for name in GPU.models},
    save_every=15,
)


@dataclass(frozen=True)
class Goals:
    """Shares that are asked for; `matmul` is of the measured speed of a large matrix product.

    Attributes:
        muon: most that a step with Muon takes longer than one with AdamW.
        slowest: of the slowest report's throughput and the median.
        saving: of throughput with checkpoints and without.
    """

    large_batch: float
    small_batch: float
    experts: float
    muon: float
    ddp_350m: float = 0.98
    fsdp2_350m: float = 0.95
    matmul: float = 0.45
    slowest: float = 0.97
    saving: float = 0.98


def goals(gpus: int) -> Goals:
    """Return the goals on so many GPUs."""
    return Goals(0.98, 0.96, 0.95, 0.03) if gpus == 2 else Goals(0.97, 0.94, 0.93, 0.02)


@dataclass(frozen=True)
class Row:
    """One line of the table; `passed` is None where nothing is judged."""

    part: str
    what: str
    measured: str
    wanted: str
    passed: bool | None


@dataclass(frozen=True)
class Speed:
    """What a timed run reports: tokens/s, the slowest report against the median, peak GB of rank 0."""

    tokens: float
    slowest: float
    memory: float


class RunError(Exception):
    """A run that ended otherwise than it should, with its last words."""


@dataclass
class Bench:
    """All runs of one call, in one folder.

    Attributes:
        deadline: of the call, by `time.monotonic`.
        pool: does what is not timed.
        jobs: that were given to it.
        part_deadline: of the timed part that runs.
    """

    options: argparse.Namespace
    folder: Path
    deadline: float
    pool: ThreadPoolExecutor
    jobs: dict[object, Future[Any]] = field(default_factory=dict)
    speeds: dict[tuple[str, Way, str, int | None], Speed | RunError] = field(default_factory=dict)
    part_deadline: float = 0.0
    sizes: Sizes = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = CPU if self.options.cpu else GPU
        self.gpus: int = self.options.gpus
        self.goals = goals(self.gpus)
        # Sequences of a step whose losses are compared, for any number of processes.
        self.small_step = math.lcm(4, self.gpus) * self.sizes.small_batch
        # Short enough that an epoch, and with it a short step, ends within the steps compared.
        tokens = self.options.steps * 2 // 3 * self.small_step * self.sizes.small_len
        self.short = write_corpus(self.folder / "short.jsonl", 3 * tokens)
        # A timed run ends within an epoch: the last step of an epoch is short.
        longest = max(model.batch_size * model.seq_len * model.steps for model in self.sizes.models.values())
        timed = not set(self.options.parts) <= set(UNTIMED)
        self.long = write_corpus(self.folder / "long.jsonl", BYTES_PER_TOKEN * longest * self.gpus * timed)
        all_of = [Way(strategy, self.gpus) for strategy in ("DDP", "FSDP2")]
        two = [Way(strategy, 2) for strategy in ("DDP", "FSDP2")] if self.gpus > 2 else []
        self.hsdp = [Way("HSDP", self.gpus)] if self.gpus >= 4 and self.gpus % 2 == 0 else []
        self.ways = [*two, *all_of, *self.hsdp]
        ddp, fsdp2 = all_of
        self.chains = ((ONE, ddp, Way("DDP", max(self.gpus // 2, 1))), (ddp, fsdp2, ddp))

    # --- runs ---------------------------------------------------------------------------------------------

    def command(self, way: Way, args: Args, restarts: int = 0) -> list[str]:
        """Return a launch of `pretrain`."""
        program: Args = ("-m", "minimind_cli", "pretrain")
        launch: Args = ()
        if way.processes > 1:
            launch = ("-m", "accelerate.commands.launch", "--num_machines", 1, "--main_process_port", 0)
            launch += ("--num_processes", way.processes, "--max_restarts", restarts)
            replicas = 2 if way.strategy == "HSDP" else 1
            if way.strategy == "DDP" or self.options.cpu:
                launch += ("--multi_gpu",)
            else:
                launch += ("--use_fsdp", "--fsdp_version", 2)
            if way.strategy != "DDP" and self.options.cpu:
                program = (Path(__file__).resolve(), AS_FSDP2, replicas, "pretrain")
            elif replicas > 1:
                launch += ("--use_parallelism_config", "--parallelism_config_dp_replicate_size", replicas)
                launch += ("--parallelism_config_dp_shard_size", way.processes // replicas)
        return list(map(str, (sys.executable, *launch, *program, *args)))

    def environment(self, device: int | None = None) -> dict[str, str]:
        """Return the variables of a run, without what a configured Accelerate would add.

        Args:
            device: index of the only GPU that the run sees.
        """
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_"))}
        kept["HF_HOME"] = str(self.folder / "no-accelerate-config")
        if self.options.cpu:
            kept |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        elif device is not None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(self.gpus)))
            kept["CUDA_VISIBLE_DEVICES"] = visible.split(",")[device]
        return kept

    def run(
        self, name: str, way: Way, args: Args, deadline: float, device: int | None = None
    ) -> list[dict[str, Any]]:
        """Run to the end in a folder of that name; return the reports of steps.

        Raises:
            RunError: where it ends badly, or not in time.
        """
        out = self.folder / name.replace(" ", "").replace(",", "-")
        command = self.command(way, (*args, "--output-dir", out))
        with launched(command, self.environment(device)) as (process, text):
            try:
                code = process.wait(max(min(deadline, self.deadline) - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                raise RunError("out of time") from None
            if code:
                print(text()[-6000:], file=sys.stderr)
                raise RunError(last_words(text()))
        rows = reports(out)
        if "speed" in name:
            shutil.rmtree(out / "checkpoints", ignore_errors=True)
        return rows

    def args(self, data: Path, *more: object) -> Args:
        """Return the options that all runs share, and some more."""
        places = ("--data", data, "--cache-dir", self.folder / "cache", "--val-fraction", 0)
        quiet = ("--tracker", "none", "--epochs", 1_000_000, "--dist-timeout", f"{DIST_TIMEOUT}s")
        return (*places, *quiet, *more)

    def small(self, kind: str, last_step: int, *more: object) -> Args:
        """Return the options of a run whose losses are compared, up to a step.

        Args:
            kind: of `STEPS`.
        """
        precision = STEPS[kind].precision
        shape = (*self.sizes.small.split(), "--max-seq-len", self.sizes.small_len)
        # The schedule is constant, so that where a part ends has no effect on it.
        rate = ("--lr-schedule", "constant", "--warmup-steps", 5, *STEPS[kind].optimizer.split())
        size = ("--batch-size", self.sizes.small_batch, "--global-batch-size", self.small_step)
        # In float32 nothing but the processes shall differ; bf16 is compiled on GPUs, as it would be trained.
        how = ("--mixed-precision", precision, *(("--no-compile",) if precision == "no" else ()))
        often = ("--max-steps", last_step, "--log-interval", 1, "--save-interval", NEVER)
        return self.args(self.short, *shape, *rate, *size, *how, *often, *more)

    def begin(self) -> None:
        """Submit all that is not timed, most urgent first; runs share the devices, as many as may at once."""
        steps, parts, now = self.options.steps, self.options.parts, time.monotonic()
        # Processes on CPUs are as slow as the machine is busy.
        limits = {part: math.inf if self.options.cpu else now + LIMITS[part] for part in UNTIMED}
        equality = self.options.precision if "equality" in parts else []
        for kind in dict.fromkeys([*equality, *(["no"] if "resume" in parts else [])]):
            for way in (ONE, *(self.ways if kind in equality else ())):
                name, args = f"{way}-{kind}", self.small(kind, steps)
                self.submit(
                    (way, kind),
                    lambda n=name, w=way, o=args: self.run(n, w, o, limits["equality"]),
                )
        for chain in self.chains if "resume" in parts else ():
            self.submit(chain, lambda c=chain: self.chain(c, limits["resume"]))
        if "killed" in parts:
            self.submit("killed", lambda: list(self.kill_twice(limits["killed"])))

    def submit(self, job: object, do: Callable[[], Any]) -> None:
        """Give a job to the pool."""
        self.jobs[job] = self.pool.submit(do)

    def chain(self, ways: tuple[Way, ...], deadline: float) -> list[dict[str, Any]]:
        """Do the steps in parts that are each started in another way."""
        for part, way in enumerate(ways, 1):
            last = self.options.steps * part // len(ways)
            rows = self.run("-".join(map(str, ways)), way, self.small("no", last, "--resume"), deadline)
        return rows

    def measure_alone(self, model: str) -> list[Speed | RunError]:
        """Time a run on each GPU at once, once per call; on CPUs one run stands for all."""
        devices = [None] if self.options.cpu else list(range(self.gpus))
        with ThreadPoolExecutor(len(devices)) as pool:
            list(pool.map(lambda device: self.measure(model, ONE, device=device), devices))
        found = [self.speeds[model, ONE, "", device] for device in devices]
        return found * (self.gpus // len(found))

    def measure(self, model: str, way: Way, more: str = "", device: int | None = None) -> None:
        """Time a run by the clock, after its first fifth, once per call."""
        key = (model, way, more, device)
        if key in self.speeds:
            return
        options, batch_size, seq_len, steps = self.sizes.models[model]
        size = ("--batch-size", batch_size, "--max-seq-len", seq_len, "--max-steps", steps)
        args = self.args(self.long, *options.split(), *size)
        often = ("--save-interval", NEVER, "--log-interval", max(steps // 20, 1), *more.split())
        name = f"speed-{model}-{way}{more}-{device}".replace("--", "-")
        try:
            rows = self.run(name, way, (*args, *often), self.part_deadline, device)
        except RunError as error:
            self.speeds[key] = error
            return
        steady = [row for row in rows if steps // 5 <= row["step"] < steps]
        times = [(b["tokens"] - a["tokens"]) / (b["elapsed"] - a["elapsed"]) for a, b in pairwise(steady)]
        first, last = steady[0], steady[-1]
        self.speeds[key] = Speed(
            tokens=(last["tokens"] - first["tokens"]) / (last["elapsed"] - first["elapsed"]),
            slowest=min(times) / median(times),
            memory=max(row["memory_gb"] for row in rows),
        )

    def timed(self, model: str, way: Way, more: str = "") -> Speed:
        """Return the speed of a run, timed now unless it was before.

        Raises:
            RunError: where the run ended badly.
        """
        self.measure(model, way, more)
        speed = self.speeds[model, way, more, None]
        if isinstance(speed, RunError):
            raise speed
        return speed

    # --- parts --------------------------------------------------------------------------------------------

    def equality(self) -> Iterator[Row]:
        """The same steps by one process and by several."""
        for kind in self.options.precision:
            for way in self.ways:
                what = f"{way} as 1 GPU, {self.options.steps} steps, {STEPS[kind].name}"
                yield self.compared("equality", what, (way, kind), kind)

    def resume(self) -> Iterator[Row]:
        """The same steps in three parts."""
        for chain in self.chains:
            yield self.compared("resume", f"{', '.join(map(str, chain))}, float32", chain, "no")

    def killed(self) -> Iterator[Row]:
        """See `kill_twice`."""
        yield from self.jobs["killed"].result()

    def compared(self, part: str, what: str, job: object, kind: str) -> Row:
        """Return a row on how far losses are from those of one GPU, and whether the order is the same."""
        try:
            rows, reference = self.jobs[job].result(), self.jobs[ONE, kind].result()
        except RunError as error:
            return failed(part, what, error)
        tolerance = STEPS[kind].tolerance
        wanted = f"<= {tolerance:g}, same order"
        if [row["step"] for row in rows] != [row["step"] for row in reference]:
            return Row(part, what, f"{len(rows)} steps instead of {len(reference)}", wanted, False)
        furthest = max(abs(a["loss"] - b["loss"]) for a, b in zip(rows, reference, strict=True))
        same = [row["digest"] for row in rows] == [row["digest"] for row in reference]
        measured = f"{furthest:.1e}, {'same' if same else 'OTHER'} order"
        return Row(part, what, measured, wanted, same and furthest <= tolerance)

    def kill_twice(self, deadline: float) -> Iterator[Row]:
        """Kill rank 1 twice: the launcher restarts all once, and gives up the second time."""
        out, deadline = self.folder / "killed", min(deadline, self.deadline)
        args = self.small("no", NEVER, "--save-interval", 10, "--output-dir", out)
        way = Way("DDP", self.gpus)
        with launched(self.command(way, args, restarts=1), self.environment()) as (process, text):

            def wait_for(find: Callable[[], Any], *, running: bool = True) -> Any:
                return wait_until(find, process if running else None, deadline)

            seconds, saved = [], 0
            for attempt in (1, 2):
                began = max((row["step"] for row in reports(out)), default=0)
                ranks = [wait_for(lambda r=r: rank_of(process.pid, r)) for r in range(self.gpus)]
                victim = ranks.pop(1)
                wait_for(lambda b=began: reports(out)[-1:] and reports(out)[-1]["step"] > b + 15)
                saved = reports(out)[-1]["step"] // 10 * 10
                victim.send_signal(signal.SIGKILL)
                killed_at = time.monotonic()
                wait_for(lambda others=ranks: all(map(gone, others)), running=False)
                seconds.append(time.monotonic() - killed_at)
                if attempt == 1:
                    # What comes after the checkpoint is written again by the new processes.
                    wait_for(lambda v=victim: (p := rank_of(process.pid, 1)) and p.pid != v.pid)
                    wait_for(lambda s=saved: any(row["step"] == s + 10 for row in reports(out)))
                    wait_for(lambda: "resuming from step" in text())
            code, said = process.wait(max(deadline - time.monotonic(), 1)), text()
        limit = DIST_TIMEOUT
        measured = " and ".join(f"{s:.1f} s" for s in seconds)
        yield Row("killed", "the others end after", measured, f"< {limit} s each", max(seconds) < limit)
        other = re.search(r"rank 1 no longer answers", said)
        launcher = re.search(r"rank\s+: 1 .*\n\s+exitcode\s+: -9", said)
        names = [who for who, found in (("rank 0", other), ("the launcher", launcher)) if found]
        measured = " and ".join(names) or "nobody"
        yield Row("killed", "the dead process is named by", measured, "anybody", bool(names))
        going = re.search(r"resuming from step [\d,]+", said)
        measured = f"{going[0]}, then exit code {code}" if going else f"exit code {code}"
        yield Row(
            "killed", "--max_restarts 1 of 2 kills", measured, "goes on, then fails", bool(going and code)
        )

    def speed(self) -> Iterator[Row]:
        """Scaling of `minimind-3`, the cost of Muon, and whether reports vary."""
        large, small = "minimind-3, 128", "minimind-3, 32"
        ddp, adamw = Way("DDP", self.gpus), "--optimizer adamw"
        yield self.scaled("speed", large, ddp, self.goals.large_batch)
        yield self.scaled("speed", small, ddp, self.goals.small_batch)
        what, wanted = f"{ddp}, {large}", self.goals
        try:
            muon, plain = self.timed(large, ddp), self.timed(large, ddp, adamw)
        except RunError as error:
            yield failed("speed", what, error)
            return
        share = 1 - muon.tokens / plain.tokens
        yield self.row(
            "speed", f"{what}: Muon beside AdamW", f"{share:.1%} of a step", share, most=wanted.muon
        )
        measured = f"{muon.slowest:.1%} of the median"
        yield self.row("speed", f"{what}: slowest report", measured, muon.slowest, least=wanted.slowest)

    def large(self) -> Iterator[Row]:
        """`350m` and `1b`."""
        medium, large = "350m, 16 x 2048", "1b, 8 x 2048"
        yield self.scaled("large", medium, Way("DDP", self.gpus), self.goals.ddp_350m)
        yield self.scaled("large", medium, Way("FSDP2", self.gpus), self.goals.fsdp2_350m)
        for way in (Way("FSDP2", self.gpus), *self.hsdp):
            what = f"{way}, {large}"
            try:
                speed = self.timed(large, way)
            except RunError as error:
                yield failed("large", what, error)
                continue
            share = speed.tokens * flops_per_token("1b") / (self.gpus * self.matmul())
            measured = f"{speed.tokens:,.0f}, {share:.1%} of the matmul peak, {speed.memory:.1f} GB per GPU"
            yield self.row("large", what, measured, share, least=self.goals.matmul)

    def experts(self) -> Iterator[Row]:
        """A mixture of experts."""
        model = "minimind-3-moe, 128"
        yield self.scaled("experts", model, Way("DDP", self.gpus), self.goals.experts)

    def saves(self) -> Iterator[Row]:
        """What saving costs on several GPUs."""
        model, way, every = "minimind-3, 128", Way("DDP", self.gpus), self.sizes.save_every
        what = f"{way}, {model}: a checkpoint every {every} steps"
        try:
            without, saving = self.timed(model, way), self.timed(model, way, f"--save-interval {every}")
        except RunError as error:
            yield failed("saves", what, error)
            return
        share = saving.tokens / without.tokens
        measured = f"{saving.tokens:,.0f} / {without.tokens:,.0f} = {share:.1%}"
        yield self.row("saves", what, measured, share, least=self.goals.saving)

    def scaled(self, part: str, model: str, way: Way, least: float) -> Row:
        """Return a row of the tokens/s of several GPUs against the sum of what each reaches alone."""
        what = f"{way}, {model}"
        alone = []
        for speed in self.measure_alone(model):
            if isinstance(speed, RunError):
                return failed(part, what, speed)
            alone.append(speed.tokens)
        try:
            several = self.timed(model, way)
        except RunError as error:
            return failed(part, what, error)
        share = several.tokens / sum(alone)
        measured = f"{several.tokens:,.0f} / ({min(alone):,.0f} to {max(alone):,.0f} each) = {share:.1%}"
        # All wait for the slowest GPU in every step, whatever the software does.
        measured += f", {several.tokens / (self.gpus * min(alone)):.1%} of the slowest times {self.gpus}"
        measured += f", slowest report {several.slowest:.0%}, {several.memory:.1f} GB"
        return self.row(part, what, measured, share, least=least)

    def row(
        self, part: str, what: str, measured: str, value: float, *, least: float = 0.0, most: float = math.inf
    ) -> Row:
        """Return a row with its verdict: none on CPUs, whose cores all processes share."""
        wanted = f">= {least:.0%}" if most == math.inf else f"<= {most:.0%}"
        passed = None if self.options.cpu else least <= value <= most
        return Row(part, what, measured, wanted, passed)

    def matmul(self) -> float:
        """Return the measured FLOP/s of a large bf16 product of one device."""
        code = "import torch; from minimind.planning.benchmark import matmul_flops as f; "
        code += f"print(f(torch.device({'cpu' if self.options.cpu else 'cuda'!r}), 'bf16'))"
        return float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)


def flops_per_token(preset: str) -> int:
    """Return the FLOPs per token of a preset at its sequence length."""
    from minimind.config.presets import preset_config
    from minimind.training.setup import resolve_run

    config = preset_config(preset)
    return resolve_run(config).model_config.flops_per_token(config.max_seq_len)


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


def write_corpus(path: Path, size: int) -> Path:
    """Write the text that Python carries as JSONL, repeated to at least `size` bytes."""
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            for text in builtin_documents():
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                if file.tell() >= size:
                    break
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


def wait_until(find: Callable[[], Any], process: subprocess.Popen[bytes] | None, deadline: float) -> Any:
    """Return what `find` finds.

    Raises:
        RunError: where it takes too long, or the process has ended.
    """
    while not (found := find()):
        if process is not None and process.poll() is not None:
            raise RunError(f"the launcher ended early with {process.returncode}")
        if time.monotonic() > deadline:
            raise RunError("out of time")
        time.sleep(0.1)
    return found


def train_as_fsdp2_on_cpu(replicas: int, args: list[str]) -> None:
    """Run a command with Accelerate's FSDP2 over gloo, which it offers on accelerators only."""
    from accelerate import Accelerator
    from accelerate.parallelism_config import ParallelismConfig
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
    if replicas > 1:
        shards = torch.distributed.get_world_size() // replicas
        mesh = ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=shards)
        AcceleratorState._shared_state["parallelism_config"] = mesh
    command(args)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options; end with a sentence where they ask for what is not here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    here = torch.cuda.device_count()
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs to use (default: all; 2 with --cpu)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="parts to run (default: all)")
    parser.add_argument("--steps", type=int, default=30, help="of the runs whose losses are compared")
    parser.add_argument("--precision", nargs="+", choices=tuple(STEPS), default=tuple(STEPS))
    parser.add_argument("--minutes", type=float, default=9.5, help="that all parts together may take")
    parser.add_argument("--cpu", action="store_true", help="processes on CPUs, with tiny shapes")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows there as well")
    options = parser.parse_args(argv)
    options.gpus = options.gpus or (2 if options.cpu else here)
    options.parts = options.parts or (UNTIMED if options.cpu else PARTS)
    if options.gpus < 2:
        parser.error(f"{options.gpus} GPUs; two or more are needed, or --cpu for a proof on CPUs")
    if not options.cpu and here < options.gpus:
        parser.error(
            f"--gpus {options.gpus}, and {here} are here; lower it, or give --cpu for a proof on CPUs"
        )
    return options


def main() -> None:
    options = parse()
    where = f"CPU, gloo, {options.gpus} processes"
    if not options.cpu:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        where = f"{torch.cuda.get_device_name()} x {options.gpus}, NCCL {nccl}"
    print(f"{where}, torch {torch.__version__}, {datetime.date.today()}", flush=True)
    began = time.monotonic()
    rows: list[Row] = []
    workers = 1 if options.cpu else 16
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        bench = Bench(options, Path(folder), began + 60 * options.minutes, pool)
        bench.begin()
        for part in (part for part in PARTS if part in options.parts):
            if part not in UNTIMED:
                bench.part_deadline = time.monotonic() + LIMITS[part]
            try:
                for row in getattr(bench, part)():
                    rows.append(row)
                    show(row, began)
            except RunError as error:
                rows.append(failed(part, "ended early", error))
                show(rows[-1], began)
    seconds = time.monotonic() - began
    bad = sum(row.passed is False for row in rows)
    print(f"{len(rows)} rows, {bad} failed, {seconds:.0f} s")
    if options.json:
        values = {"where": where, "torch": torch.__version__, "seconds": seconds}
        options.json.write_text(json.dumps(values | {"rows": [asdict(row) for row in rows]}, indent=1))
    sys.exit(1 if bad or not rows else 0)


def show(row: Row, began: float) -> None:
    verdict = {True: "PASS", False: "FAIL", None: "-"}[row.passed]
    clock = f"{time.monotonic() - began:4.0f} s"
    print(f"{verdict:<5}{clock}  {row.part:<9} {row.what:<44} {row.measured:<66} {row.wanted}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == [AS_FSDP2]:
        train_as_fsdp2_on_cpu(int(sys.argv[2]), sys.argv[3:])
    else:
        main()
