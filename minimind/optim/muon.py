"""Muon: momentum whose every update of a matrix is made orthogonal; AdamW for all other parameters.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon) with the scale of Moonlight (Liu et al. 2025, arXiv
2502.16982), under which the learning rate and weight decay of AdamW carry over.

Shapes: n matrices of one shape, R rows, C columns; a parameter of more dimensions is a stack of matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor
from torch.optim.adamw import adamw

# The quintic a·x + b·x³ + c·x⁵ whose slope at zero is as steep as can be while repetition still ends within
# some 30% of 1 (Jordan et al. 2024). More steps would not come nearer.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_STEPS = 5
# The root mean square of an AdamW update is about this (Liu et al. 2025, section 2.2).
_ADAMW_RMS = 0.2

# Below this a norm counts as it: a zero matrix is divided by it.
_LEAST_NORM = 1e-12

# The kernels are in `muon_kernels.py`. A build of PyTorch for CPUs does without what takes a second to load.
_BUILDABLE = torch.backends.cuda.is_built() and find_spec("triton") is not None
# Numbers that a program of a kernel has at once, 16 in each thread of 8 warps.
_BLOCK = 4096
_WARPS = 8


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return, about, the orthogonal factor U·Vᵀ of each matrix U·S·Vᵀ, by Newton and Schulz's iteration.

    Singular values come to lie between about 0.7 and 1.2, only those far below a thousandth of the norm
    lower; a zero matrix stays zero. Computed in bf16 on a GPU, which is enough for a direction, else in
    the dtype given.

    Args:
        matrices: (n, R, C), or (n, m, R, C) for n stacks of m.

    Returns:
        The same shape in the dtype given.
    """
    x = matrices.flatten(0, -3)
    norm = x.norm(dim=(-2, -1), keepdim=True).clamp(min=_LEAST_NORM)
    if x.is_cuda:
        x, norm = x.bfloat16(), norm.bfloat16()
    return _iterate(x / norm).to(matrices.dtype).view(matrices.shape)


def _iterate(x: Tensor) -> Tensor:
    """Return the last iterate for (n, R, C) matrices of norm 1 or less, contiguous and in their dtype."""
    a, b, c = _QUINTIC
    wide = x.shape[-2] <= x.shape[-1]
    for _ in range(_STEPS):
        # The square of the smaller side is the one that costs less.
        square = x @ x.mT if wide else x.mT @ x
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        first, second = (polynomial, x) if wide else (x, polynomial)
        x = torch.baddbmm(x, first, second, beta=a)
    return x


def _scale(shape: torch.Size) -> float:
    """Return what an orthogonal factor of (..., R, C) is multiplied with."""
    return _ADAMW_RMS * max(shape[-2:]) ** 0.5


def _move(gradients: Tensor, buffers: Tensor, keep: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
    """Return Nesterov's and the new momentum (n, R, C): zero and the old one where `keep`, (), is False."""
    moved = torch.lerp(buffers, gradients, 1 - momentum)
    ahead = torch.lerp(gradients, moved, momentum)
    return torch.where(keep, ahead, 0.0), torch.where(keep, moved, buffers)


def _whole(parts: Tensor, like: Tensor) -> Tensor:
    """Return (n, R, C) of the parts of n matrices that are cut as `like` is, gathered by one message."""
    if not isinstance(like, DTensor):
        return parts
    shape = torch.Size((len(parts), *like.shape))
    stride = torch.empty(shape, device="meta").stride()
    sharded = DTensor.from_local(
        parts, like.device_mesh, _stacked_placements(like), run_check=False, shape=shape, stride=stride
    )
    return sharded.full_tensor()


def _part(whole: Tensor, like: Tensor) -> Tensor:
    """Undo `_whole`."""
    if not isinstance(like, DTensor):
        return whole
    # No source rank: each process cuts its own part out of what all of them have.
    return distribute_tensor(
        whole, like.device_mesh, _stacked_placements(like), src_data_rank=None
    ).to_local()


def _stacked_placements(like: DTensor) -> list[Placement]:
    return [Shard(cut.dim + 1) if isinstance(cut, Shard) else cut for cut in like.placements]


def _kernels_serve(tensors: list[Tensor]) -> bool:
    """Whether the kernels can be built, and all are whole contiguous float32 tensors on one CUDA GPU."""
    device = tensors[0].device
    return (
        _BUILDABLE
        and device.type == "cuda"
        and {type(t) for t in tensors} <= {Tensor, torch.nn.Parameter}
        and all(t.dtype == torch.float32 and t.device == device and t.is_contiguous() for t in tensors)
    )


def _local(tensor: Tensor) -> Tensor:
    """Return the shard that this process has of a tensor, the tensor itself where that is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Muon(torch.optim.Optimizer):
    """Muon and AdamW in one optimizer; the key `algorithm` of a parameter group says which: `muon`, `adamw`.

    An update may be left out without the host knowing: where the attribute `found_inf`, a () float tensor, is
    1.0 at a step, weights, momentum and step counts stay as they were. PyTorch's fused AdamW has it so.

    Both algorithms: p ← (1 - lr·weight_decay)·p - lr·update. Muon's update is √max(R, C)·0.2 times the
    orthogonal factor of its Nesterov momentum, so its root mean square is at most 0.2, that of AdamW.

    Parameters may be shards, as FSDP2 makes them: weights and momentum stay so, and the matrices of one shape
    are whole for as long as they are made orthogonal.
    """

    # Told by `optim.skip_if_nonfinite`.
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        momentum: float = 0.95,
        fused: bool = True,
        kernels: bool = False,
    ) -> None:
        """Take parameter groups.

        Args:
            params: groups with `algorithm`, and perhaps `weight_decay`; matrices only for `muon`.
            lr: learning rate of all groups.
            betas: decay of AdamW's moments.
            eps: what AdamW adds to the root of the second moment.
            momentum: decay of Muon's momentum.
            fused: run AdamW in one kernel, which CUDA and CPU have; without it `found_inf` is not heard.
            kernels: what Muon does beside products of matrices may go through the kernels of
                `muon_kernels.py`, which are compiled at the first step; only where they can be built, and for
                whole float32 parameters on a CUDA GPU.

        Raises:
            ValueError: for a parameter of a `muon` group that is no matrix.
        """
        defaults = {"lr": lr, "weight_decay": 0.0, "betas": betas, "eps": eps, "momentum": momentum}
        super().__init__(params, {**defaults, "algorithm": "adamw", "fused": fused})
        self._kernels = kernels
        # By index of the group: its parameters with a gradient by id, and those of equal shape together.
        self._alike: dict[int, tuple[list[int], list[list[Tensor]]]] = {}
        for group in self.param_groups:
            if group["algorithm"] == "muon" and any(p.ndim < 2 for p in group["params"]):
                raise ValueError("Muon updates matrices; put other parameters in a group for adamw.")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            if group["algorithm"] == "adamw":
                self._adamw(group, parameters)
            else:
                self._muon(group, self._by_shape(index, parameters))
        return loss

    def _by_shape(self, index: int, parameters: list[Tensor]) -> list[list[Tensor]]:
        """Put equal shapes together: a few large products instead of many small ones."""
        ids = [id(p) for p in parameters]
        known, batches = self._alike.get(index, ([], []))
        if known != ids:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in parameters:
                shapes.setdefault(parameter.shape, []).append(parameter)
            batches = list(shapes.values())
            self._alike[index] = ids, batches
        return batches

    def _muon(self, group: dict[str, Any], batches: list[list[Tensor]]) -> None:
        if self._kernels:
            parameters = list(chain.from_iterable(batches))
            gradients = [p.grad for p in parameters]
            buffers = [self._state(p, "momentum_buffer") for p in parameters]
            tensors: list[Tensor] = [*gradients, *buffers, *parameters]  # type: ignore[list-item]
            if _kernels_serve(tensors):
                self._muon_by_kernels(group, batches, tensors)
                return
        keep = torch.ones((), dtype=torch.bool, device=batches[0][0].device)
        if self.found_inf is not None:
            keep = self.found_inf == 0
        for alike in batches:
            self._muon_plainly(group, alike, keep)

    def _muon_plainly(self, group: dict[str, Any], parameters: list[Tensor], keep: Tensor) -> None:
        first = parameters[0]
        buffers = [_local(self._state(p, "momentum_buffer")) for p in parameters]
        gradients = torch.stack([_local(p.grad) for p in parameters])  # type: ignore[arg-type]
        parameters = [_local(p) for p in parameters]
        ahead, moved = _move(gradients, torch.stack(buffers), keep, group["momentum"])
        directions = _part(orthogonalize(_whole(ahead, first)), first)
        torch._foreach_copy_(buffers, list(moved.unbind()))
        decay = keep.to(moved.dtype) * (group["lr"] * group["weight_decay"])
        torch._foreach_mul_(parameters, 1 - decay)
        rate = group["lr"] * _scale(first.shape)
        torch._foreach_add_(parameters, list(directions.unbind()), alpha=-rate)

    def _muon_by_kernels(
        self, group: dict[str, Any], batches: list[list[Tensor]], tensors: list[Tensor]
    ) -> None:
        """Do as `_muon_plainly`, with one pass over the memory before the products and one after.

        Args:
            group: of the parameters.
            batches: the parameters, those of equal shape together.
            tensors: gradients, momenta and parameters, each in that order.
        """
        from . import muon_kernels

        device = tensors[0].device
        found_inf = self.found_inf if self.found_inf is not None else torch.zeros((), device=device)
        addresses = [tensor.data_ptr() for tensor in tensors]
        # From pinned memory the host does not wait for the copy, after which only PyTorch gives that memory
        # away again.
        table = torch.tensor(addresses, pin_memory=device.type == "cuda").to(device, non_blocking=True)
        # A gradient may lie anywhere in a bucket of DDP.
        alignment = 4 if any(address % 16 for address in addresses) else 16
        constants = {"ALIGNMENT": alignment, "BLOCK": _BLOCK, "num_warps": _WARPS}
        momentum = float(group["momentum"])
        kept = 1.0 - group["lr"] * group["weight_decay"]
        first = 0
        # Triton starts a kernel on the current device.
        with torch.cuda.device_of(table):
            for alike in batches:
                shape = alike[0].shape
                ahead = torch.empty((len(alike), *shape), dtype=torch.bfloat16, device=device)
                x = ahead.view(-1, *shape[-2:])
                size = shape[-2] * shape[-1]
                blocks = -(-size // _BLOCK)
                grid = (len(x) * blocks,)
                place = first, len(tensors) // 3, len(x) // len(alike), size, blocks
                sums = torch.empty((len(x), blocks), device=device)
                muon_kernels.move_momenta[grid](
                    table, found_inf, ahead, sums, *place, momentum, 1.0 - momentum, **constants
                )
                norm = sums.sum(-1).sqrt_().clamp_(min=_LEAST_NORM)
                x /= norm.bfloat16().view(-1, 1, 1)
                rate = float(group["lr"] * _scale(shape))
                muon_kernels.move_parameters[grid](
                    table, found_inf, _iterate(x), *place, float(kept), rate, **constants
                )
                first += len(alike)

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        fused = group["fused"]
        for p in parameters:
            if not self.state[p]:
                # The fused kernel counts where the parameter is.
                device = p.device if fused else torch.device("cpu")
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=device)
        adamw(
            parameters,
            [p.grad for p in parameters],  # type: ignore[misc]
            [self._state(p, "exp_avg") for p in parameters],
            [self._state(p, "exp_avg_sq") for p in parameters],
            [],
            [self.state[p]["step"] for p in parameters],
            fused=fused,
            foreach=not fused,
            found_inf=self.found_inf if fused else None,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _state(self, parameter: Tensor, name: str) -> Tensor:
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state[name]
