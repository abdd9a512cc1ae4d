"""Gathers the training state of a model and optimizer to the host, and loads it back, on any topology.

Plain, DDP and FSDP2 models share one code path: DTensors are gathered with `full_tensor`. Names are those of
the unwrapped model, so one process can load what four sharded processes saved.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from itertools import chain, count
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
# Bytes. Pinning takes milliseconds a tensor, and an optimizer has hundreds of scalars and vectors: those of
# one dtype are copied as one.
SMALLEST_PINNED = 1 << 16
# Share of the device's free memory that the copy of a state may take.
STAGED_SHARE = 0.5


def gather_state_dict(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, extra: Mapping[str, Any]
) -> Snapshot | None:
    """Copy the state to the host. A collective operation, between two optimizer steps.

    Where the device has room, the state is copied on it, which takes a millisecond, and from there to the
    host while training continues. Call `CheckpointStore.wait_until_written` first, so that the pinned memory
    of the previous save is reused.

    Args:
        extra: further values, at least `step`; JSON-serializable.

    Returns:
        The snapshot on the main process, None on other ranks. Call its `wait` before reading tensors.
    """
    if taken := [key for key in _RESERVED if key in extra]:
        raise ValueError(f"{', '.join(taken)} is reserved for gather_state_dict")
    core = _unwrap_optimizer(optimizer)
    # Muon keeps the momentum of a matrix up to date on one rank only.
    getattr(core, "gather_momenta", lambda: None)()
    weights, tied = _named_tensors(model)
    names = {id(tensor): name for name, tensor in weights.items()}
    optimizer_state = {
        f"{names[id(parameter)]}|{field}": value
        for parameter, fields in core.state.items()
        for field, value in fields.items()
    }
    groups = weights, optimizer_state
    stage = accelerator.is_main_process and _has_room_for(groups, accelerator.device)
    (host_weights, host_state), arrived = _to_host(accelerator, *groups, stage=stage)
    if not accelerator.is_main_process:
        return None
    trainer = {
        **extra,
        "param_groups": [_group_to_json(group, names) for group in core.param_groups],
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        "tied": tied,
        "versions": {"minimind": __version__, "torch": torch.__version__},
    }
    return Snapshot(int(extra["step"]), host_weights, host_state, trainer, arrived)


def reserve_host_memory(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[torch.Tensor]:
    """Return pinned memory for `gather_state_dict` on a GPU, so that the first save need not pin it.

    Drop it just before the first save: it then returns to the caching allocator, which reuses it for every
    `gather_state_dict`. Capturing a CUDA graph empties that allocator.
    """
    if accelerator.device.type != "cuda" or not accelerator.is_main_process:
        return []
    weights, _ = _named_tensors(model)
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [
        torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        for tensor in weights.values()
        if tensor.nbytes >= SMALLEST_PINNED
        # Every optimizer keeps at most two tensors of a parameter's shape.
        for _ in range(3 if id(tensor) in trained else 1)
    ]


def gather_weights(accelerator: Accelerator, model: nn.Module) -> dict[str, torch.Tensor] | None:
    """Return full copies of the weights on the host, on the main process. A collective operation."""
    (copies,), arrived = _to_host(accelerator, _named_tensors(model)[0])
    arrived()
    return copies if accelerator.is_main_process else None


def load_state_dict(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    checkpoint: StoredCheckpoint | None,
    *,
    keep_group_values: Collection[str] = (),
) -> dict[str, Any]:
    """Load a verified checkpoint, bit for bit. A collective operation; only the main process reads files.

    Args:
        checkpoint: the checkpoint; used on the main process only.
        keep_group_values: keys of parameter groups, such as `weight_decay`, that keep their current value.

    Returns:
        The contents of `trainer.json`, on every rank.

    Raises:
        CheckpointError: on every rank, when the checkpoint cannot be read or does not fit.
    """
    core = _unwrap_optimizer(optimizer)
    local, tied = _named_tensors(model)
    names = {id(tensor): name for name, tensor in local.items()}
    weights: dict[str, torch.Tensor] = {}
    optimizer_state: dict[str, torch.Tensor] = {}

    def read() -> tuple[dict[str, Any], dict[str, tuple[torch.Size, torch.dtype]]]:
        assert checkpoint is not None
        weights.update(checkpoint.weights())
        optimizer_state.update(checkpoint.optimizer_state())
        _check_compatible(checkpoint, weights, optimizer_state, local, tied, core)
        layout = {key: (tensor.shape, tensor.dtype) for key, tensor in optimizer_state.items()}
        return dict(checkpoint.trainer), layout

    trainer, layout = run_on_main_and_broadcast(accelerator, read)
    with torch.no_grad():
        for name, target in local.items():
            _copy_or_broadcast(accelerator, target, weights.get(name))
        _load_optimizer(
            accelerator, core, names, trainer["param_groups"], layout, optimizer_state, keep_group_values
        )
    if accelerator.scaler is not None and trainer["scaler"]:
        accelerator.scaler.load_state_dict(trainer["scaler"])
    return trainer


def _unwrap_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def _named_tensors(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors of the unwrapped model by name, and a map from tied names to kept names."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = cast(nn.Module, getattr(model, "_orig_mod", None) or model.module)
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    # `state_dict` rather than `named_parameters`: its hook reshards FSDP2 parameters.
    for raw, tensor in model.state_dict(keep_vars=True).items():
        name = raw.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor
    return tensors, tied


def _to_host(
    accelerator: Accelerator, *groups: Mapping[str, torch.Tensor], stage: bool = False
) -> tuple[tuple[dict[str, torch.Tensor], ...], Callable[[], None]]:
    """Copy tensors to the host on the main process; all ranks take part in gathering DTensors.

    Args:
        groups: tensors by name.
        stage: copy them on the GPU first, so that they may change before they have arrived.

    Returns:
        The copies, and a function that waits until they have arrived.
    """
    copies: tuple[dict[str, torch.Tensor], ...] = tuple({} for _ in groups)
    # Destinations and sources of copies that are still to be started.
    staged: list[tuple[torch.Tensor, torch.Tensor]] = []
    small: dict[torch.dtype, list[tuple[dict[str, torch.Tensor], str]]] = {}

    def copy(source: torch.Tensor) -> torch.Tensor:
        # The caching allocator reuses pinned memory.
        host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        if stage:
            with suppress(torch.OutOfMemoryError):
                staged.append((host, source.clone()))
                return host
        # The current stream changes the source only after this.
        host.copy_(source, non_blocking=True)
        return host

    for group, copied in zip(groups, copies, strict=True):
        for name, tensor in group.items():
            whole = tensor.detach()
            if isinstance(whole, DTensor):
                whole = whole.full_tensor()
            if not accelerator.is_main_process:
                continue
            if whole.device.type != "cuda":
                copied[name] = torch.empty(whole.shape, dtype=whole.dtype).copy_(whole)
            elif whole.nbytes >= SMALLEST_PINNED:
                copied[name] = copy(whole)
            else:
                # Replaced below; the names keep their order.
                copied[name] = whole
                small.setdefault(whole.dtype, []).append((copied, name))
    for places in small.values():
        sources = [copied[name] for copied, name in places]
        parts = copy(torch.cat([source.reshape(-1) for source in sources]))
        for (copied, name), source, part in zip(
            places, sources, parts.split([source.numel() for source in sources]), strict=True
        ):
            copied[name] = part.view(source.shape)
    return copies, _start_copies(staged, accelerator.device)


def _has_room_for(groups: Sequence[Mapping[str, torch.Tensor]], device: torch.device) -> bool:
    """Whether a GPU has memory to spare for copies of tensors."""
    if device.type != "cuda":
        return False
    needed = sum(tensor.numel() * tensor.element_size() for group in groups for tensor in group.values())
    index = device.index  # None is the current device
    free, total = torch.cuda.mem_get_info(index)
    reserved = torch.cuda.memory_reserved(index)
    allowed = total * torch.cuda.get_per_process_memory_fraction(index) - reserved
    return needed <= STAGED_SHARE * (min(free, allowed) + reserved - torch.cuda.memory_allocated(index))


def _start_copies(
    staged: list[tuple[torch.Tensor, torch.Tensor]], device: torch.device
) -> Callable[[], None]:
    """Start copies from a GPU beside what is computed next.

    Returns:
        A function that waits for them, and for the copies of the current stream.
    """
    if device.type != "cuda":
        return lambda: None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for host, source in staged:
            host.copy_(source, non_blocking=True)
    arrived = stream.record_event()

    def wait() -> None:
        arrived.synchronize()
        # The memory of the copies on the device is free from here on.
        staged.clear()

    return wait


def _copy_or_broadcast(accelerator: Accelerator, target: torch.Tensor, source: torch.Tensor | None) -> None:
    """Set `target` on every rank to `source`, which only the main process has."""
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
        # No source rank: every rank has the full tensor and takes its shard.
        target.copy_(distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None))
    else:
        target.copy_(whole)


def _load_optimizer(
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    saved_groups: list[dict[str, Any]],
    layout: Mapping[str, tuple[torch.Size, torch.dtype]],
    optimizer_state: Mapping[str, torch.Tensor],
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
                _copy_or_broadcast(accelerator, value, optimizer_state.get(key))
                state.setdefault(index, {})[field] = value
        values = {
            key: group[key] if key in keep_group_values else _like(saved.get(key, group[key]), group[key])
            for key in group
            if key != "params"
        }
        groups.append({**values, "params": indices})
    # `load_state_dict` moves step counters to the right device.
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _group_to_json(group: Mapping[str, Any], names: Mapping[int, str]) -> dict[str, Any]:
    values = {
        key: value.item() if isinstance(value, torch.Tensor) else value
        for key, value in group.items()
        if key != "params"
    }
    return {**values, "params": [names[id(parameter)] for parameter in group["params"]]}


def _like(value: Any, present: Any) -> Any:
    """Convert a value read from JSON to the type that the optimizer uses."""
    if isinstance(present, torch.Tensor):
        return torch.full_like(present, value)
    return tuple(value) if isinstance(present, tuple) else value


def _check_compatible(
    checkpoint: StoredCheckpoint,
    weights: Mapping[str, torch.Tensor],
    optimizer_state: Mapping[str, torch.Tensor],
    local: Mapping[str, torch.Tensor],
    tied: Mapping[str, str],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Raise CheckpointError unless names and shapes equal those of model and optimizer."""
    trainer, names = checkpoint.trainer, {id(tensor): name for name, tensor in local.items()}
    problems = [f"it lacks {name}" for name in local.keys() - weights.keys()]
    problems += [f"it has {name}, which the model does not have" for name in weights.keys() - local.keys()]
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
    unknown = {key.rpartition("|")[0] for key in optimizer_state} - {*chain.from_iterable(groups)}
    problems += [f"its optimizer has {name}, which this one does not have" for name in unknown]
    if problems:
        shown = "; ".join(sorted(problems)[:3]) + ("; ..." if len(problems) > 3 else "")
        raise CheckpointError(
            f"checkpoint {checkpoint.path} does not fit this run: {shown}. "
            "Use the options of the run that wrote it (config.toml)."
        )
