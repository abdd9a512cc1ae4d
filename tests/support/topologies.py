"""A tiny tied model trained the same way on any topology; run as a script it is one process of several."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.distributed.tensor import DTensor

from minimind.checkpoint.state_dict import gather_state_dict, load_state_dict
from minimind.checkpoint.store import CheckpointStore
from minimind.distributed.collectives import run_on_main_and_broadcast
from minimind.errors import CheckpointError
from minimind.optim.muon import Muon


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


class TinyTied(nn.Module):
    """Eleven ids, so that sequences do not divide evenly among processes."""

    _no_split_modules = ("Block",)

    def __init__(self, width: int = 6, seed: int = 0, blocks: int = 2, tie: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 11, bias=False)
        if tie:
            self.tie_weights()

    def tie_weights(self) -> None:
        self.head.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(self.norm(x))[:-1], ids[1:])


def start(*, cpu: bool = True, muon: bool = False, **model_options: Any):
    """Return accelerator, model and an optimizer with two parameter groups, prepared.

    With `muon` that is Muon for the matrices inside the blocks and AdamW for the rest, else AdamW for all.
    """
    accelerator = Accelerator(cpu=cpu)
    model = TinyTied(**model_options)
    optimizer: torch.optim.Optimizer
    if muon:
        inside = [p for name, p in model.named_parameters() if name.startswith("blocks.")]
        rest = [p for name, p in model.named_parameters() if not name.startswith("blocks.")]
        optimizer = Muon(
            [
                {"params": inside, "algorithm": "muon", "normalize_rows": True, "weight_decay": 0.1},
                {"params": rest},
            ],
            lr=1e-2,
        )
    else:
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "lr_scale": 0.5}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=not cpu)
    return accelerator, *accelerator.prepare(model, optimizer)


def train(accelerator, model, optimizer, first: int, last: int) -> list[float]:
    """Do steps first..last-1, each with the same sequences on every process; return the losses."""
    losses = []
    for step in range(first, last):
        ids = torch.randint(0, 11, (20,), generator=torch.Generator().manual_seed(step))
        ids = ids.to(accelerator.device)
        loss = model(ids)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def use_fsdp2_on_cpu() -> None:
    """Make Accelerate take its FSDP2 path over gloo, which it offers on accelerators only."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )


def one_of_several(folder: Path, topology: str, optimizer_name: str) -> None:
    """Load folder/plain, save it again at once and after two steps; tell how a misfit is refused."""
    torch.set_num_threads(1)
    if topology == "fsdp2":
        Accelerator(cpu=True)
        use_fsdp2_on_cpu()
    muon = optimizer_name == "muon"
    accelerator, model, optimizer = start(seed=5, muon=muon)
    assert accelerator.num_processes == 2
    assert isinstance(next(model.parameters()), DTensor) == (topology == "fsdp2")
    store = CheckpointStore(folder / topology, 5)
    found = run_on_main_and_broadcast(accelerator, lambda: store.open(folder / "plain"))
    only_main = found if accelerator.is_main_process else None
    extra = load_state_dict(accelerator, model, optimizer, only_main)
    assert extra["step"] == 3
    losses: list[float] = []
    for step in (3, 5):
        losses += train(accelerator, model, optimizer, 3, step)
        snapshot = gather_state_dict(accelerator, model, optimizer, {"step": step})
        assert (snapshot is not None) == accelerator.is_main_process
        if snapshot is not None:
            store.save(snapshot)
    store.wait()
    refusals = []
    for work in (
        lambda: load_state_dict(accelerator, *start(width=4, muon=muon)[1:], only_main),
        lambda: run_on_main_and_broadcast(accelerator, lambda: store.open(folder / "nowhere")),
        lambda: run_on_main_and_broadcast(accelerator, lambda: 1 // 0),
    ):
        try:
            work()
        except (CheckpointError, ZeroDivisionError) as error:
            refusals.append(str(error))
    result = {"losses": losses, "refusals": refusals, "tied": tied(model)}
    (folder / f"{topology}-{accelerator.process_index}.json").write_text(json.dumps(result))
    accelerator.wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort an ordinary exit


def tied(model: nn.Module) -> bool:
    bare = getattr(model, "module", model)
    return bare.head.weight is bare.embed.weight


def forget_accelerator() -> None:
    """Let the next Accelerator of this process start afresh."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


if __name__ == "__main__":
    one_of_several(Path(sys.argv[1]), *sys.argv[2:])
