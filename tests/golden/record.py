"""Record golden losses: what ten short CPU runs compute, to full precision.

    python tests/golden/record.py                 # compare, print what differs
    python tests/golden/record.py --write         # record again

Recording again is legitimate only for a change that is meant to alter the arithmetic, the sampling order or
the names of what is logged, and the commit message says which and why. A refactoring never records again.

The processes run with the most portable kernels of PyTorch, MKL and oneDNN, so that the same numbers come
from any x86-64 processor; the recording names the version of PyTorch, for another one may round differently.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PORTABLE = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "true",
    "TOKENIZERS_PARALLELISM": "false",
}
# What depends on the clock, the machine or the version of a package is not compared.
UNSTABLE = {"time", "seconds", "tokens_per_second", "eta_seconds", "memory_gb", "mfu"}
BASE: dict[str, Any] = {
    "optimizer": "muon",
    "learning_rate": 4e-3,
    "weight_decay": 0.1,
    "data": ("corpus.jsonl",),
    "val_fraction": 0.1,
    "tokenizer": str(HERE / "tokenizer.json"),
    "cache_dir": "cache",
    "max_seq_len": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "batch_size": 4,
    "max_steps": 12,
    "epochs": 4,
    "warmup_steps": 2,
    "log_interval": 1,
    "eval_interval": 4,
    "save_interval": 6,
    "mixed_precision": "no",
    "compile": False,
    "tracker": ("none",),
}
MOE = {"use_moe": True, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def train(name: str, **options: Any) -> Path:
    """Run `minimind.training.pretrain` with the base options and these; return the output folder."""
    import minimind

    stop_after = options.pop("stop_after", None)
    out = Path(options.pop("output_dir", name))
    config = minimind.PretrainConfig(**{**BASE, "output_dir": str(out), **options})
    minimind.pretrain(config, stop_after=stop_after)
    return out


def dense_packed() -> Path:
    return train("dense_packed", tracker=("tensorboard",))


def dense_padded() -> Path:
    return train("dense_padded", packing=False, tie_word_embeddings=False)


def moe() -> Path:
    return train("moe", **MOE)


def dropout_accumulation() -> Path:
    return train("dropout_accumulation", dropout=0.1, batch_size=2, accumulation_steps=3)


def adamw() -> Path:
    return train("adamw", optimizer="adamw", learning_rate=5e-4, weight_decay=0.2, beta2=0.99, grad_clip=0.5)


def wsd_mixture() -> Path:
    return train(
        "wsd_mixture", data=("corpus.jsonl:0.7", "other.jsonl:0.3"), lr_schedule="wsd", decay_steps=5
    )


def resumed() -> Path:
    """Stop at a step that no interval divides, and resume."""
    options = {"dropout": 0.1, "accumulation_steps": 2, "output_dir": "resumed"}
    train("resumed", **options, stop_after=7)
    return train("resumed", **options, resume="auto")


def spike_skip() -> Path:
    """Skip the updates whose loss is a little above the median, once enough losses are known."""
    return train(
        "spike_skip",
        on_spike="skip",
        spike_sigma=0.1,
        optimizer="adamw",
        learning_rate=1e-5,
        lr_schedule="constant",
        epochs=8,
        max_steps=130,
        eval_interval=50,
        save_interval=100,
    )


def two_processes(topology: str) -> Path:
    """Train on two processes over gloo, with DDP or FSDP2."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*command, __file__, "--worker", topology], check=True, env=os.environ)
    return Path(topology)


SINGLE: dict[str, Callable[[], Path]] = {
    function.__name__: function
    for function in (
        dense_packed,
        dense_padded,
        moe,
        dropout_accumulation,
        adamw,
        wsd_mixture,
        resumed,
        spike_skip,
    )
}
CASES: dict[str, Callable[[], Path]] = {
    **SINGLE,
    "ddp": lambda: two_processes("ddp"),
    "fsdp2": lambda: two_processes("fsdp2"),
}


def worker(topology: str) -> None:
    """Train as one of two processes."""
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    torch.set_num_threads(1)
    if topology == "fsdp2":
        # Accelerate offers FSDP2 on accelerators only; its code runs over gloo all the same.
        Accelerator(mixed_precision="no")
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2, cpu_ram_efficient_loading=True
        )
    train(topology, batch_size=2, global_batch_size=8, **(MOE if topology == "ddp" else {}))


def command_line(*args: str) -> Any:
    """Run a command of the program and return the JSON that it prints."""
    from minimind_cli.app import main

    with redirect_stdout(StringIO()) as printed:
        try:
            main(args)
        except SystemExit as end:
            if end.code:
                raise
    text = printed.getvalue()
    return json.loads(text.splitlines()[-1] if args[0] == "generate" else text)


def facts(out: Path) -> dict[str, Any]:
    """Return what a run left, without what a clock measured."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    state = max((out / "checkpoints").glob("step-*"), key=lambda path: path.name)
    found = {
        "losses": [line["loss"] for line in lines if "loss" in line],
        "gradient_norms": [line["grad_norm"] for line in lines if "grad_norm" in line],
        "learning_rates": [line["learning_rate"] for line in lines if "learning_rate" in line],
        "validation_losses": [line["val_loss"] for line in lines if "val_loss" in line],
        "bits_per_byte": [line["val_bits_per_byte"] for line in lines if "val_bits_per_byte" in line],
        "skipped_steps": [line["skipped_steps"] for line in lines if "skipped_steps" in line],
        "order_digests": [line["digest"] for line in lines if "digest" in line],
        "metrics": sorted({f"{line['kind']}/{name}" for line in lines for name in line}),
        "files": sorted(path.name for path in out.iterdir()),
        "checkpoint": {path.name: checksum(path) for path in sorted(state.glob("*.safetensors"))},
        "model": checksum(out / "model" / "model.safetensors"),
    }
    if (out / "tensorboard").is_dir():
        found["tensorboard"] = tensorboard_tags(out / "tensorboard")
    return found


def tensorboard_tags(folder: Path) -> list[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = set()
    for path in folder.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(path.parent))
        events.Reload()
        tags |= {
            f"{kind}/{tag}"
            for kind, names in events.Tags().items()
            if isinstance(names, list)
            for tag in names
        }
    return sorted(tags)


def checksum(path: Path) -> str:
    """Return the SHA-256 of the tensors of a file, by name, without its metadata."""
    import numpy
    from safetensors.numpy import load_file

    digest = hashlib.sha256()
    for name, array in sorted(load_file(path).items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(numpy.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def write_corpus(path: Path, seed: int) -> None:
    """Write 80 documents of made sentences, the same on every machine."""
    draw = random.Random(seed)
    words = ("the", "cat", "sat", "on", "a", "mat", "while", "rain", "fell", "over", "quiet", "hills", "why")
    with path.open("w", encoding="utf-8") as file:
        for number in range(80):
            text = " ".join(draw.choice(words) for _ in range(draw.randint(3, 60)))
            file.write(json.dumps({"text": f"{text.capitalize()}. {number}"}) + "\n")


def record(names: list[str]) -> dict[str, Any]:
    """Return the facts of these cases; runs in a separate folder, in the portable environment."""
    import torch

    torch.set_num_threads(1)
    write_corpus(Path("corpus.jsonl"), seed=1)
    write_corpus(Path("other.jsonl"), seed=2)
    found: dict[str, Any] = {}
    for name in names:
        out = CASES[name]()
        found[name] = facts(out)
        if name == "dense_packed":
            evaluated = command_line(
                "eval", str(out), "--data", "other.jsonl", "--mixed-precision", "no", "--json"
            )
            losses = {path: value for path, value in flat(evaluated).items() if isinstance(value, float)}
            found[name]["eval"] = losses
            greedy = (
                "--temperature=0",
                "--repetition-penalty=1.5",
                "--max-new-tokens=24",
                "--seed=1",
                "--json",
            )
            found[name]["greedy"] = command_line("generate", str(out), "the cat", *greedy)
    return found


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a JSON value by their paths, without what a clock measured."""
    if isinstance(value, dict):
        items = [(key, inner) for key, inner in value.items() if key not in UNSTABLE]
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return {prefix: value}
    return {path: leaf for key, inner in items for path, leaf in flat(inner, f"{prefix}/{key}").items()}


def run_cases(names: list[str]) -> dict[str, Any]:
    """Run these cases in a process of their own and return their facts with the version of PyTorch."""
    with tempfile.TemporaryDirectory() as folder:
        paths = os.pathsep.join(path for path in [*sys.path, os.environ.get("PYTHONPATH", "")] if path)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
        done = subprocess.run(
            [sys.executable, __file__, "--here", *names],
            cwd=folder,
            env=kept | PORTABLE | {"PYTHONPATH": paths},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(done.stdout[-2000:] + done.stderr[-4000:])
        return json.loads((Path(folder) / "facts.json").read_text("utf-8"))


def recorded(name: str) -> dict[str, Any]:
    """Return the recorded facts of a case."""
    return json.loads((HERE / f"{name}.json").read_text("utf-8"))


def differences(name: str, found: dict[str, Any]) -> list[str]:
    """Return how the facts of a case differ from the recorded ones, a line each.

    Floats are compared to the bit, and only under another version of PyTorch to 4 digits, without checksums.
    """
    old = recorded(name)
    exact = old["torch"] == found["torch"]
    inexact = () if exact else ("/torch", "/checkpoint", "/model", "/greedy")

    def equal(a: Any, b: Any) -> bool:
        if not exact and isinstance(a, float) and isinstance(b, float):
            return math.isclose(a, b, rel_tol=1e-4)
        return a == b

    was, now = flat(old), flat(found)
    return [
        f"{name}{path}: recorded {was.get(path)!r}, now {now.get(path)!r}"
        for path in dict.fromkeys([*was, *now])
        if not equal(was.get(path), now.get(path)) and not path.startswith(inexact)
    ]


def main() -> int:
    """Compare or record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="CASE", help=f"any of {', '.join(CASES)}; default all")
    parser.add_argument("--write", action="store_true", help="record again")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.names or list(CASES)
    if arguments.worker:
        worker(arguments.worker)
        sys.stdout.flush()
        os._exit(0)  # gloo's threads sometimes abort an ordinary exit
    if arguments.here:
        import torch

        found = record(names)
        for name in found:
            found[name]["torch"] = torch.__version__.split("+")[0]
        Path("facts.json").write_text(json.dumps(found), "utf-8")
        return 0
    found = run_cases(names)
    if arguments.write:
        for name in names:
            text = json.dumps(found[name], indent=1, ensure_ascii=False)
            (HERE / f"{name}.json").write_text(text + "\n", "utf-8")
        return 0
    lines = [line for name in names for line in differences(name, found[name])]
    print("\n".join(lines) or f"{len(names)} cases: all equal")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
