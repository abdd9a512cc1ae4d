"""The training state in memory: gathered from, and put back into, a model and optimizer on any topology.

Plain, DDP and FSDP2 models take one path: a DTensor is made whole by all processes, anything else is whole
already. Names are those of the bare model, so what four sharded processes save, one plain process loads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import count
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ..distributed.collectives import run_on_main_and_broadcast
from ..errors import CheckpointError
from ..version import __version__
from .files import StoredCheckpoint
from .store import Snapshot

_RESERVED = ("param_groups", "scaler", "tied", "versions")


def gather_state_dict(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, extra: Mapping[str, Any]
) -> Snapshot | None:
    """Copy the state to the host. Every process must call this, between two optimizer steps.

    Wait for the previous save first (`CheckpointStore.settle`): then its pinned memory is used again.

    Args:
        accelerator: the one that prepared model and optimizer.
        model: prepared or not.
        optimizer: prepared or not.
        extra: what else to keep, at least `step`; representable in JSON.

    Returns:
        The snapshot on the main process, None on others.
    """
    if taken := [key for key in _RESERVED if key in extra]:
        raise ValueError(f"{', '.join(taken)} is written by collect itself")
    core = _unwrap_optimizer(optimizer)
    weights, tied = _named_tensors(model)
    names = {id(tensor): name for name, tensor in weights.items()}
    moments = {
        f"{names[id(parameter)]}|{field}": value
        for parameter, fields in core.state.items()
        for field, value in fields.items()
    }
    main = accelerator.is_main_process
    host_weights, host_moments = _to_host(weights, main), _to_host(moments, main)
    if not main:
        return None
    if accelerator.device.type == "cuda":
        torch.cuda.current_stream(accelerator.device).synchronize()
    trainer = {
        **extra,
        "param_groups": [_group_to_json(group, names) for group in core.param_groups],
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        "tied": tied,
        "versions": {"minimind": __version__, "torch": torch.__version__},
    }
    return Snapshot(int(extra["step"]), host_weights, host_moments, trainer)


def reserve_host_memory(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Pin the memory of `gather_state_dict` ahead, which would otherwise make the first save on a GPU slow.

    The memory goes back to the allocator of torch, which hands it to `gather_state_dict` each time.
    """
    if accelerator.device.type != "cuda" or not accelerator.is_main_process:
        return
    weights, _ = _named_tensors(model)
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    held = []
    for tensor in weights.values():
        # Every optimizer here keeps at most two tensors of a parameter's shape.
        for _ in range(3 if id(tensor) in trained else 1):
            held.append(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True))


def gather_weights(accelerator: Accelerator, model: nn.Module) -> dict[str, torch.Tensor] | None:
    """Return whole copies of the weights on the host, on the main process; every process must call this."""
    copies = _to_host(_named_tensors(model)[0], accelerator.is_main_process)
    if not accelerator.is_main_process:
        return None
    if accelerator.device.type == "cuda":
        torch.cuda.current_stream(accelerator.device).synchronize()
    return copies


def load_state_dict(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    checkpoint: StoredCheckpoint | None,
    *,
    keep_group_values: Collection[str] = (),
) -> dict[str, Any]:
    """Put a verified checkpoint back, exactly. Every process must call this; only the main one reads files.

    Args:
        accelerator: the one that prepared model and optimizer.
        model: as `gather_state_dict` takes it; any topology.
        optimizer: as `gather_state_dict` takes it.
        checkpoint: what to load; looked at on the main process only.
        keep_group_values: values of parameter groups, such as `weight_decay`, that stay as the optimizer has
            them because they were changed on purpose.

    Returns:
        What `trainer.json` holds, on every process.

    Raises:
        CheckpointError: on every process alike, when the checkpoint cannot be read or does not fit.
    """
    core = _unwrap_optimizer(optimizer)
    local, tied = _named_tensors(model)
    names = {id(tensor): name for name, tensor in local.items()}
    weights: dict[str, torch.Tensor] = {}
    moments: dict[str, torch.Tensor] = {}

    def read() -> tuple[dict[str, Any], dict[str, tuple[torch.Size, torch.dtype]]]:
        assert checkpoint is not None
        trainer = dict(checkpoint.trainer)
        weights.update(checkpoint.weights())
        moments.update(checkpoint.moments())
        _refuse_misfit(checkpoint, trainer, weights, moments, local, tied, core, names)
        return trainer, {key: (tensor.shape, tensor.dtype) for key, tensor in moments.items()}

    trainer, layout = run_on_main_and_broadcast(accelerator, read)
    with torch.no_grad():
        for name, target in local.items():
            _fill(accelerator, target, weights.get(name))
        _load_optimizer(accelerator, core, names, trainer["param_groups"], layout, moments, keep_group_values)
    if accelerator.scaler is not None and trainer["scaler"]:
        accelerator.scaler.load_state_dict(trainer["scaler"])
    return trainer


def _unwrap_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def _named_tensors(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the live tensors of the bare model by name, and for each tied name the one that is kept."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = cast(nn.Module, getattr(model, "_orig_mod", None) or model.module)
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    # `state_dict` rather than `named_parameters`: its hook brings FSDP2 parameters back to shards.
    for raw, tensor in model.state_dict(keep_vars=True).items():
        name = raw.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor
    return tensors, tied


def _to_host(tensors: Mapping[str, torch.Tensor], main: bool) -> dict[str, torch.Tensor]:
    """Start copying tensors to the host on the main process; all take part in making DTensors whole."""
    copies: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        whole = tensor.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        if main:
            on_cuda = whole.device.type == "cuda"
            # The allocator hands pinned memory out again, so only the first save pays for it.
            host = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=on_cuda)
            copies[name] = host.copy_(whole, non_blocking=on_cuda)
    return copies


def _fill(accelerator: Accelerator, target: torch.Tensor, source: torch.Tensor | None) -> None:
    """Set `target` on every process to `source`, which the main process has."""
    if accelerator.num_processes == 1 and not isinstance(target, DTensor):
        assert source is not None
        target.copy_(source)
        return
    whole = torch.empty(target.shape, dtype=target.dtype, device=accelerator.device)
    if source is not None:
        whole.copy_(source)
    if accelerator.num_processes > 1:
        dist.broadcast(whole, src=0)
    if isinstance(target, DTensor):
        # No source rank: every process has the whole tensor and cuts out its own shard.
        target.copy_(distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None))
    else:
        target.copy_(whole)


def _load_optimizer(
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    saved_groups: list[dict[str, Any]],
    layout: Mapping[str, tuple[torch.Size, torch.dtype]],
    moments: Mapping[str, torch.Tensor],
    keep_group_values: Collection[str],
) -> None:
    fields: dict[str, list[str]] = {}
    for key in layout:
        name, _, field = key.rpartition("|")
        fields.setdefault(name, []).append(field)
    state: dict[int, dict[str, torch.Tensor]] = {}
    groups: list[dict[str, Any]] = []
    numbers = count()
    for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
        indices: list[int] = []
        for parameter in group["params"]:
            index = next(numbers)
            indices.append(index)
            name = names[id(parameter)]
            for field in fields.get(name, ()):
                key = f"{name}|{field}"
                shape, dtype = layout[key]
                if shape == parameter.shape and field != "step":
                    value = torch.empty_like(parameter, dtype=dtype)
                else:
                    value = torch.empty(shape, dtype=dtype)
                _fill(accelerator, value, moments.get(key))
                state.setdefault(index, {})[field] = value
        values = {
            key: group[key] if key in keep_group_values else _like(saved.get(key, group[key]), group[key])
            for key in group
            if key != "params"
        }
        groups.append({**values, "params": indices})
    # The optimizer's own method knows on which device its step counters belong.
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _group_to_json(group: Mapping[str, Any], names: Mapping[int, str]) -> dict[str, Any]:
    values = {
        key: value.item() if isinstance(value, torch.Tensor) else value
        for key, value in group.items()
        if key != "params"
    }
    return {**values, "params": [names[id(parameter)] for parameter in group["params"]]}


def _like(value: Any, present: Any) -> Any:
    """Return a value read from JSON in the type that the optimizer uses."""
    if isinstance(present, torch.Tensor):
        return torch.full_like(present, value)
    return tuple(value) if isinstance(present, tuple) else value


def _refuse_misfit(
    checkpoint: StoredCheckpoint,
    trainer: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    moments: Mapping[str, torch.Tensor],
    local: Mapping[str, torch.Tensor],
    tied: Mapping[str, str],
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
) -> None:
    """Raise CheckpointError unless the checkpoint has exactly what this model and optimizer have."""
    problems = [f"it lacks {name}" for name in local.keys() - weights.keys()]
    problems += [f"it has {name}, which the model has not" for name in weights.keys() - local.keys()]
    problems += [
        f"{name} is {tuple(tensor.shape)} in it and {tuple(local[name].shape)} in the model"
        for name, tensor in weights.items()
        if name in local and tensor.shape != local[name].shape
    ]
    if not problems and trainer.get("tied") != dict(tied):
        problems.append("its tied parameters are not those of the model")
    groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    if not problems and [group["params"] for group in trainer.get("param_groups", ())] != groups:
        problems.append("its optimizer has other groups of parameters")
    strangers = {key.rpartition("|")[0] for key in moments} - {name for group in groups for name in group}
    problems += [f"its optimizer has {name}, which this one has not" for name in strangers]
    if problems:
        shown = "; ".join(sorted(problems)[:3]) + ("; ..." if len(problems) > 3 else "")
        raise CheckpointError(
            f"checkpoint {checkpoint.path} does not fit this run: {shown}. "
            "Use the options of the run that wrote it (config.toml)."
        )
