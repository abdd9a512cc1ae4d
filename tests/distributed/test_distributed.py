"""Several launched processes train like one process and end together."""

from __future__ import annotations

import json
import math
import os
import pty
import select
import socket
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands import launch as accelerate_launch
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from safetensors.torch import load_file

from minimind import pretrain
from minimind.checkpoint.files import stored_checkpoints
from minimind.distributed.launch_checks import launch_problems
from support import several
from support.cycle_corpus import write_corpus
from support.launching import (
    ACCELERATE,
    FEW_STEPS,
    HERE,
    TORCHRUN,
    command,
    environment,
    launch,
    losses,
    rows,
)

FOREIGN = ["llama", "gpt2"]

pytestmark = [pytest.mark.slow, pytest.mark.alone]


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
        (
            "ddp",
            2,
            "DistributedDataParallel",
            [
                *("packed", "padded", "adamw", "accumulated", "untied", "bf16", "reduced", "sampled"),
                *("experts", *FOREIGN),
            ],
        ),
        ("ddp", 4, "DistributedDataParallel", ["packed", "padded", "accumulated"]),
        (
            "fsdp2",
            2,
            "FSDPMiniMindForCausalLM",
            ["packed", "padded", "adamw", "accumulated", "untied", "bf16", "sampled"],
        ),
        ("fsdp2", 2, "FSDPMiniMindForCausalLM", ["compiled", "experts", *FOREIGN, "opt"]),
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
    script = [HERE / "support" / "several.py", tmp_path, corpus, topology, *names]
    code, text = launch([*TORCHRUN, "--nproc_per_node", processes, *script], tmp_path)
    assert code == 0, text
    exchanges = {}
    for name in names:
        recorded = json.loads((tmp_path / f"{name}.json").read_text())
        of_transformers = wrapper.replace("MiniMindForCausalLM", "TransformersModel")
        assert recorded["wrapped"] == (of_transformers if name in (*FOREIGN, "opt") else wrapper)
        if name != "reduced":
            exchanges[name] = recorded["exchanges"] / recorded["steps"]
        # Besides the gradients one small reduction per step, for any number of micro-batches.
        if topology != "hsdp":  # whose replicas also sum the gradients of each unit
            # Experts are counted over all processes once more for each micro-batch, here one. Under DDP each
            # matrix of Muon belongs to a process, and the norm of the gradient is summed over processes.
            expected_reductions = (2 if topology == "ddp" else 1) + (name == "experts")
            expected_reductions += topology == "ddp" and name != "adamw"
            assert recorded["reductions"] == [expected_reductions], name
        rounded = name in ("bf16", "reduced", "opt")
        close = {"abs": 2e-2} if rounded else {"rel": 1e-5}
        ours, reference = rows(tmp_path / name), rows(alone / name)
        assert losses(tmp_path / name) == pytest.approx(losses(alone / name), **close)
        assert recorded["tokens"] == json.loads((alone / f"{name}.json").read_text())["tokens"]
        evaluations, expected = ([r for r in x if "val_loss" in r] for x in (ours, reference))
        assert evaluations[-1]["val_tokens"] == expected[-1]["val_tokens"]
        close = {"abs": 2e-2} if rounded else {"rel": 1e-6}
        # The sanity check before the first step takes one batch of each process: mostly the same 8 sequences.
        for number in (-1,) if name == "accumulated" else (0, -1):
            assert evaluations[number]["val_loss"] == pytest.approx(expected[number]["val_loss"], **close)
        if name == "sampled":
            assert samples(tmp_path / name) == samples(alone / name)
        if name == "bf16":
            assert recorded["dtypes"] == {"angles": ["torch.float32"] * 2, "products": ["torch.bfloat16"]}
        if name == "reduced":
            # Before the first update only the gradient is rounded, to 8 bits.
            first, exact = (next(r for r in x if "loss" in r) for x in (ours, reference))
            assert first["loss"] == pytest.approx(exact["loss"], rel=1e-6)
            assert first["grad_norm"] == pytest.approx(exact["grad_norm"], rel=2**-8)
            assert first["grad_norm"] != pytest.approx(exact["grad_norm"], rel=1e-6)
        if rounded:
            continue
        weights, wanted = (final_weights(folder / name) for folder in (tmp_path, alone))
        assert weights.keys() == wanted.keys()
        for key, tensor in weights.items():
            assert (tensor - wanted[key]).abs().max() < 1e-5, f"{name}: {key}"
    assert min(exchanges.values()) > 0
    # Gradients are synchronized once per step, for any number of micro-batches.
    if "accumulated" in names:
        assert exchanges["accumulated"] == exchanges["packed"]
    if topology == "ddp":
        assert exchanges["packed"] == 1


def samples(out: Path) -> list[tuple[int, str, str]]:
    lines = map(json.loads, (out / "samples.jsonl").read_text().splitlines())
    return [(line["step"], line["prompt"], line["text"]) for line in lines]


def final_weights(out: Path) -> dict[str, Any]:
    return load_file(stored_checkpoints(out / "checkpoints")[-1].path / "model.safetensors")


def test_the_runs_compared_have_short_steps_and_learn(alone: Path) -> None:
    """Without these the comparison could pass for nothing."""
    for name in ("packed", "padded"):
        steps = [row for row in rows(alone / name) if "loss" in row]
        assert steps[-1]["epoch"] > 1
        tokens = [later["tokens"] - row["tokens"] for row, later in pairwise(steps)]
        assert min(tokens) < 0.95 * max(tokens)
        # Some gradients are clipped and some are not.
        assert min(row["grad_norm"] for row in steps) < several.CLIP < max(row["grad_norm"] for row in steps)
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


def banner_line(text: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith("device:")]
    return line


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def installed_script(tmp: Path) -> Path:
    """Return `minimind-train`, or a copy of it where the package is not installed."""
    script = Path(sys.executable).with_name("minimind-train")
    if not script.exists():
        script = tmp / "minimind-train"
        script.write_text("from minimind_cli.app import main\nmain()\n")
    return script


def configure(home: Path) -> None:
    """Go through `accelerate config` in a terminal: several GPUs, two processes, and no to all else."""
    answers = {"Which type of machine": "4\r", "How many GPU": "2\r"}
    pid, terminal = pty.fork()
    if pid == 0:
        args = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "config"]
        os.execve(sys.executable, args, os.environ | {"HF_HOME": str(home)})
    question = ""
    with suppress(OSError):  # as reading ends when the program does
        while True:
            if select.select([terminal], [], [], 0.7 if question else 60)[0]:
                question += os.read(terminal, 4096).decode(errors="replace")
            else:
                answer = next((answers[start] for start in answers if start in question), "\r")
                os.write(terminal, answer.encode())
                question = ""
    os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("way", ["configured", "console script", "torchrun", "MULTI_GPU"])
def test_processes_that_are_launched_train_together_on_cpus(corpus: Path, tmp_path: Path, way: str) -> None:
    launcher: list[object] = [*ACCELERATE, "--main_process_port", 0]
    program: list[object] = ["-m", "minimind_cli"]
    if way == "torchrun":
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
        launcher += ["--master_port", free_port()]
    elif way == "configured":
        configure(tmp_path / "hf")
    elif way == "MULTI_GPU":
        (tmp_path / "accelerate.yaml").write_text(CONFIGURATIONS[way])
        launcher += ["--config_file", tmp_path / "accelerate.yaml"]
    else:
        program = [installed_script(tmp_path)]
        launcher += ["--multi_gpu", "--num_processes", 2]
    args = command(corpus, tmp_path / "out", *FEW_STEPS)
    code, text = launch([*launcher, *program, *args], tmp_path)
    assert code == 0, text
    assert banner_line(text) == "device:    CPU x 2, float32, not compiled"
    assert "no GPU here: 2 processes train together on CPUs." in text
    # Only rank 0 prints.
    assert text.count("step 2/2 | loss") == 1
    assert len(losses(tmp_path / "out")) == 2
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


def launch_variables(*options: str) -> dict[str, str]:
    """Return what `accelerate launch` with these options sets in the environment of its processes."""
    arguments = accelerate_launch.launch_command_parser().parse_args([*options, "script.py"])
    arguments, _, _ = accelerate_launch._validate_launch_command(arguments)
    if arguments.use_fsdp or arguments.multi_gpu:
        places = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": str(arguments.num_processes)}
        places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
        return prepare_multi_gpu_env(arguments) | places
    return prepare_simple_launcher_cmd_env(arguments)[1]


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        (["--cpu", "--num_processes", "2"], "launch with accelerate launch --multi_gpu --num_processes N"),
        (["--config_file", "MULTI_CPU"], "launch with accelerate launch --multi_gpu --num_processes N"),
        (["--use_fsdp", "--num_processes", "2", "--main_process_port", "0"], "add --fsdp_version 2"),
    ],
)
def test_a_launch_that_would_go_wrong_is_recognized_by_its_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], answer: str
) -> None:
    for name, text in CONFIGURATIONS.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", environment(tmp_path))
    problems = list(launch_problems(1, 0, launch_variables(*options)))
    assert any(answer in problem for problem in problems), problems
    assert list(launch_problems(1, 0, launch_variables("--config_file", "MULTI_GPU"))) == []


def test_a_launch_that_would_go_wrong_is_refused_before_any_work(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "FSDP2").write_text(CONFIGURATIONS["FSDP2"])
    args = command(corpus, tmp_path / "out", *FEW_STEPS, "--cache-dir", tmp_path / "unused")
    options = ["--config_file", "FSDP2", "--main_process_port", 0, "-m", "minimind_cli"]
    code, text = launch([*ACCELERATE, *options, *args], tmp_path)
    assert code != 0
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert any("train with DDP instead: accelerate launch" in line for line in errors), text
    assert len(errors) == len(set(errors))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "unused").exists()
