"""One process of several that trains small runs; test_distributed.py launches it.

    several.py FOLDER CORPUS ddp|fsdp2|hsdp NAME...

Each NAME is one of RUNS. What a run leaves is read from FOLDER afterwards.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from minimind.config.options import PretrainConfig
from support.foreign_models import save_shape

STEPS = 17
# Between the norms of gradients that come up.
CLIP = 1.4
# Options of each run. A step is of 8 sequences over all processes; an epoch ends in a short one.
RUNS: dict[str, dict[str, Any]] = {
    "packed": {},
    "padded": {"packing": False},
    "adamw": {"optimizer": "adamw", "max_steps": 6},
    "accumulated": {"batch_size": 1},
    "untied": {"tie_word_embeddings": False, "max_steps": 6},
    "bf16": {"mixed_precision": "bf16", "max_steps": 6},
    # DDP reduces the gradients in bf16; one process has none to reduce.
    "reduced": {"reduce_dtype": "bf16", "max_steps": 6},
    "sampled": {"sample_interval": 3, "sample_prompt": ("the cat", ""), "max_steps": 6},
    "compiled": {"compile": True, "max_steps": 3},
    # The balancing loss weighs enough to be seen in the weights, and looks at all processes together.
    "experts": {
        "use_moe": True,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "router_aux_loss_coef": 0.1,
    },
    # Models of transformers; the run of GPT-2 is resumed halfway.
    "llama": {"from_weight": "llama", "max_steps": 6},
    "gpt2": {"from_weight": "gpt2", "max_steps": 6},
    "opt": {"from_weight": "opt", "max_steps": 4, "mixed_precision": "bf16"},
}


def config(corpus: Path, out: Path, processes: int, **changes: Any) -> PretrainConfig:
    """Return a small run whose steps are of 8 sequences whatever the number of processes."""
    options: dict[str, Any] = {
        "data": (str(corpus),),
        "cache_dir": str(corpus.parent / "cache"),
        "output_dir": str(out),
        "val_fraction": 0.1,
        "max_seq_len": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "batch_size": 8 // processes,
        "global_batch_size": 8,
        "epochs": 100,
        "max_steps": STEPS,
        "warmup_steps": 2,
        "learning_rate": 1e-3,
        "grad_clip": CLIP,
        "log_interval": 1,
        "save_interval": 100,
        "compile": False,
        "tracker": ("none",),
    }
    options |= changes
    if (shape := changes.get("from_weight")) is not None:
        folder = corpus.parent / shape
        # The sizes are those of the weights, which the first run of one process writes.
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        options |= dict.fromkeys(sizes)
        options["from_weight"] = str(folder if folder.exists() else save_shape(shape, folder))
    return PretrainConfig(**options)


def use_fsdp2_on_cpu(precision: str, *, replicas: int) -> None:
    """Make Accelerate take its FSDP2 path over gloo, which it offers on accelerators only."""
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    Accelerator(mixed_precision=precision)
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    # Settled by minimind.distributed.accelerator as on GPUs; loading as the launcher does by default.
    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=True
    )
    if replicas > 1:
        shards = dist.get_world_size() // replicas
        mesh = ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=shards)
        AcceleratorState._shared_state["parallelism_config"] = mesh


def stay_joined(accelerator: Accelerator) -> None:
    """Forget the state of one run; the processes stay joined for the next."""
    accelerator.wait_for_everyone()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def main(folder: Path, corpus: Path, topology: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    dist.init_process_group("gloo")
    # The package has a function of the same name.
    module = importlib.import_module("minimind.training.pretrain")
    preparation = importlib.import_module("minimind.training.build_model")
    training = importlib.import_module("minimind.training.trainer")
    module.close_accelerator = stay_joined
    wrapped: list[str] = []
    exchanges: list[int] = []
    reductions: list[int] = []
    prepare, step, all_reduce = preparation.prepare, training.train_step, dist.all_reduce

    def noting(*args: Any, **options: Any) -> tuple[Any, Any]:
        prepared = prepare(*args, **options)
        wrapped.append(type(prepared[0]).__name__)
        exchanges.append(0)
        reductions.clear()
        # A model has one hook, here that of --reduce-dtype.
        if topology == "ddp" and name != "reduced":
            prepared[0].register_comm_hook(None, counted_all_reduce)
        return prepared

    def counting_step(*args: Any, **options: Any) -> Any:
        reductions.append(0)
        dist.all_reduce = reduced
        try:
            return step(*args, **options)
        finally:
            dist.all_reduce = all_reduce

    def reduced(*args: Any, **options: Any) -> Any:
        reductions[-1] += 1
        return all_reduce(*args, **options)

    def counted_all_reduce(state, bucket):  # annotations as text are refused
        exchanges[-1] += 1
        return allreduce_hook(None, bucket)

    reduce_scatter = dist.reduce_scatter_single

    def counted_reduce_scatter(*args: Any, **options: Any) -> Any:
        exchanges[-1] += 1
        return reduce_scatter(*args, **options)

    dist.reduce_scatter_single = counted_reduce_scatter

    # What blocks are handed, and what decides on the kernels of attention, in bf16.
    attention = importlib.import_module("minimind.modeling.attention")
    rotate, supported = attention.rotate, attention.fused.attention_supported
    dtypes: dict[str, list[str]] = {}

    def noting_rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        dtypes["angles"] = [str(cos.dtype), str(sin.dtype)]
        return rotate(x, cos, sin)

    def noting_supported(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
        dtypes["products"] = [str(dtype)]
        return supported(device, dtype, head_dim)

    preparation.prepare = noting
    training.train_step = counting_step
    for name in names:
        watched = name == "bf16"
        attention.rotate = noting_rotate if watched else rotate
        attention.fused.attention_supported = noting_supported if watched else supported
        run = config(corpus, folder / name, dist.get_world_size(), **RUNS[name])
        for stop_after in (3, None) if name == "gpt2" else (None,):
            if topology != "ddp":
                precision = run.mixed_precision.replace("auto", "no")
                use_fsdp2_on_cpu(precision, replicas=2 if topology == "hsdp" else 1)
            result = module.pretrain(run, quiet=False, handle_signals=True, stop_after=stop_after)
            run = dataclasses.replace(run, resume="auto")
        if dist.get_rank() == 0:
            seen: dict[str, Any] = {
                "model_dir": str(result.model_dir),
                "wrapped": wrapped[-1],
                "exchanges": exchanges[-1],
            }
            seen |= {"reductions": sorted(set(reductions)), "dtypes": dtypes}
            values = dataclasses.asdict(result) | seen
            del values["history"]  # arrays
            (folder / f"{name}.json").write_text(json.dumps(values))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort an ordinary exit


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
