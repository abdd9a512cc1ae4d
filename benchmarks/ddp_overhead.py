"""Overhead of several processes, and of this trainer compared with bare DDP.

Three ways to train the same model on the same sequences, each in separate processes, one after another and
several times over, so that whatever else the machine does falls on all of them:

    alone   one process with all threads: `pretrain`'s step (`minimind.training.step.train_step`)
    ours    N processes with 1/N of the threads each: the same step, through Accelerate
    bare    N processes likewise: torch and DistributedDataParallel, a loop of a few lines

    python benchmarks/ddp_overhead.py --processes 2 --steps 20 --rounds 3

With --one-process, instead, whether being launched costs anything: `pretrain` itself, the whole product, by
the plain command and by `accelerate launch --num_processes 1`, in turn:

    python benchmarks/ddp_overhead.py --one-process --preset minimind-3 --batch-size 128 --seconds 20
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median

import psutil
import torch
from pretrain_throughput import write_corpus
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from minimind.config.options import PretrainConfig
from minimind.data.loader import MicroBatch, StepBatch
from minimind.distributed.accelerator import check_launch, prepare, start_accelerator
from minimind.modeling.config import MiniMindConfig
from minimind.modeling.transformer import MiniMindForCausalLM
from minimind.optim.build import build_optimizer
from minimind.training.step import train_step

WARM_UP = 3
# Reports of a whole run that are not measured: it compiles in the first step.
WARM_UP_REPORTS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20, help="steps measured in one round")
    parser.add_argument("--rounds", type=int, default=3, help="of all ways, one after another")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of a step over all processes")
    parser.add_argument("--max-seq-len", type=int, help="default: 256, or that of the preset")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-hidden-layers", type=int, default=8)
    parser.add_argument(
        "--one-process", action="store_true", help="compare the plain command with a launch of one process"
    )
    parser.add_argument("--preset", default="tiny", help="of --one-process")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each run of --one-process")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_process:
        compare_commands(options)
        return
    options.max_seq_len = options.max_seq_len or 256
    if options.way:
        train(options)
        return
    plain = [sys.executable, __file__]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    several = [*torchrun, str(options.processes), __file__]
    ways = {
        "alone": (plain, 1),
        "bare": (several, options.processes),
        "ours": (several, options.processes),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, (args, processes) in ways.items():
            seconds[way] += measured(args, way, processes)
    tokens = options.batch_size * options.max_seq_len
    first, *_ = ways
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    print(f"{'way':<10}{'processes':>10}{'ms/step':>10}{'fastest':>10}{'tokens/s':>12}{'to ' + first:>11}")
    for way, (_, processes) in ways.items():
        middle = median(seconds[way])
        print(
            f"{way:<10}{processes:>10}{1e3 * middle:>10.1f}{1e3 * min(seconds[way]):>10.1f}"
            f"{tokens / middle:>12,.0f}{middle / median(seconds[first]) - 1:>+11.1%}"
        )
    ratio = median(seconds["ours"]) / median(seconds["bare"]) - 1
    best = min(seconds["ours"]) / min(seconds["bare"]) - 1
    print(f"ours over bare DDP: {ratio:+.1%} in the median, {best:+.1%} in the fastest step")


def compare_commands(options: argparse.Namespace) -> None:
    """Time the plain command and a launch of one process in turn, and print the ratio of their means."""
    program = ["-m", "minimind_cli", "pretrain"]
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    ways = {"plain": program, "launched": [*launcher, *program]}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, torch {torch.__version__}, {options.preset}, {options.batch_size} sequences a step")
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        data = write_corpus(Path(folder) / "corpus.jsonl")
        for number in range(options.rounds):
            for way, args in ways.items():
                out = Path(folder) / f"{way}-{number}"
                speeds[way].append(speed_of(args, options, data, out))
                print(f"{way:<10}{speeds[way][-1]:>12,.0f} tokens/s", flush=True)
    ratio = mean(speeds["launched"]) / mean(speeds["plain"])
    print(f"launched / plain: {ratio:.4f} in the mean of {options.rounds} runs each")


def speed_of(args: list[str], options: argparse.Namespace, data: str, out: Path) -> float:
    """Return the tokens/s by the clock of a run that is stopped when its time is over."""
    on_gpu = torch.cuda.is_available()
    command = [
        *(sys.executable, *args, "--preset", options.preset, "--data", data, "--output-dir", out),
        *("--cache-dir", out.parent / "cache", "--val-fraction", 0, "--tracker", "none"),
        *("--batch-size", options.batch_size, "--epochs", 1_000_000, "--save-interval", 1_000_000_000),
        *("--log-interval", 10 if on_gpu else 1),
        *(("--max-seq-len", options.max_seq_len) if options.max_seq_len else ()),
    ]
    # A launcher would leave one thread to each process.
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with (out.parent / "log").open("wb+") as log:
        process = subprocess.Popen(list(map(str, command)), env=env, stdout=log, stderr=log)
        while len(reports(out)) <= WARM_UP_REPORTS and process.poll() is None:
            time.sleep(0.1)
        if process.poll() is None:
            time.sleep(options.seconds)
            trainer_of(process.pid).terminate()
        process.wait()
        log.seek(0)
        text = log.read().decode(errors="replace")
    if len(rows := reports(out)) < WARM_UP_REPORTS + 2:
        sys.exit(text[-6000:])
    first, last = rows[WARM_UP_REPORTS], rows[-1]
    return (last["tokens"] - first["tokens"]) / (last["elapsed"] - first["elapsed"])


def reports(out: Path) -> list[dict[str, float]]:
    """Return the reports of steps that a run has written so far."""
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [row for line in lines if line.endswith("}") and "loss" in (row := json.loads(line))]


def trainer_of(pid: int) -> psutil.Process:
    """Return the process that trains: that of the command, or the one that it launched."""
    process = psutil.Process(pid)
    family = [process, *process.children(recursive=True)]
    return next(one for one in family if one.cmdline()[1:3] == ["-m", "minimind_cli"])


def measured(args: list[str], way: str, processes: int) -> list[float]:
    """Return the seconds of each measured step of one way."""
    threads = max(torch.get_num_threads() // processes, 1)
    done = subprocess.run(
        [*args, *sys.argv[1:], "--way", way],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[")))


def train(options: argparse.Namespace) -> None:
    """Time one way in this process; rank 0 prints the seconds of each step."""
    config = PretrainConfig(compile=False)
    check_launch(config)
    step, rank, close = (bare_step if options.way == "bare" else our_step)(options, config)
    seconds = []
    for number in range(WARM_UP + options.steps):
        sequences = batch(options, number, rank)
        started = time.perf_counter()
        step(sequences)
        seconds.append(time.perf_counter() - started)
    if rank == 0:
        print(json.dumps(seconds[WARM_UP:]), flush=True)
    close()
    os._exit(0)  # gloo's threads sometimes abort an ordinary exit


def batch(options: argparse.Namespace, number: int, rank: int) -> StepBatch:
    """Return this process's sequences of a step, the same for every way."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    generator = torch.Generator().manual_seed(number)
    shape = (options.batch_size, options.max_seq_len + 1)
    sequences = torch.randint(0, 6400, shape, generator=generator).chunk(world)[rank]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs, labels = sequences[:, :-1].to(device), sequences[:, 1:].contiguous().to(device)
    targets = options.batch_size * options.max_seq_len
    return StepBatch(
        micro_batches=(MicroBatch(inputs, labels, None, None),),
        num_targets=targets,
        num_tokens=targets,
        num_sequences=options.batch_size,
        epoch=0,
        step_in_epoch=number,
        digest="",
    )


def model_of(options: argparse.Namespace) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    shape = MiniMindConfig(hidden_size=options.hidden_size, num_hidden_layers=options.num_hidden_layers)
    return MiniMindForCausalLM(shape)


def our_step(options: argparse.Namespace, config: PretrainConfig):  # type: ignore[no-untyped-def]
    accelerator = start_accelerator(config)
    model = model_of(options)
    optimizer = build_optimizer(model, config, accelerator.device)
    model, optimizer = prepare(accelerator, model, optimizer, tied=True, accumulation_steps=1)

    def step(batch: StepBatch) -> None:
        values = train_step(model, optimizer, batch, accelerator, grad_clip=config.grad_clip)
        assert math.isfinite(values[0].item())

    return step, accelerator.process_index, accelerator.wait_for_everyone


def bare_step(options: argparse.Namespace, config: PretrainConfig):  # type: ignore[no-untyped-def]
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu")
    bare = model_of(options).to(device)
    optimizer = build_optimizer(bare, config, device)
    model = DistributedDataParallel(bare, forward_sync_buffers=False, gradient_as_bucket_view=True)
    scale = dist.get_world_size()

    def step(batch: StepBatch) -> None:
        (micro,) = batch.micro_batches
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
        with autocast:
            loss = model(micro.input_ids, shift_labels=micro.shift_labels, num_items_in_batch=1).loss
        (loss * (scale / batch.num_targets)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        assert math.isfinite(total.item())

    return step, dist.get_rank(), dist.barrier


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[1])
    main()
