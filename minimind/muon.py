"""Muon: momentum whose every update of a matrix is made orthogonal; AdamW for all other parameters.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon) with the scale of Moonlight (Liu et al. 2025, arXiv
2502.16982), under which the learning rate and weight decay of AdamW carry over.

Shapes: n matrices of one shape, R rows, C columns; a parameter of more dimensions is a stack of matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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

_Move = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


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
    a, b, c = _QUINTIC
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices.flatten(0, -3)
    x = x if wide else x.mT  # the smaller side first: its square is what costs
    norm = x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)
    if x.is_cuda:
        x, norm = x.bfloat16(), norm.bfloat16()
    x = x / norm
    for _ in range(_STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype).view(matrices.shape)


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
        compiled: bool = False,
    ) -> None:
        """Take parameter groups.

        Args:
            params: groups with `algorithm`, and perhaps `weight_decay`; matrices only for `muon`.
            lr: learning rate of all groups.
            betas: decay of AdamW's moments.
            eps: what AdamW adds to the root of the second moment.
            momentum: decay of Muon's momentum.
            fused: run AdamW in one kernel, which CUDA and CPU have; without it `found_inf` is not heard.
            compiled: compile what Muon does beside products of matrices, which are quick as they are.

        Raises:
            ValueError: for a parameter of a `muon` group that is no matrix.
        """
        defaults = {"lr": lr, "weight_decay": 0.0, "betas": betas, "eps": eps, "momentum": momentum}
        super().__init__(params, {**defaults, "algorithm": "adamw", "fused": fused})
        # For all shapes at once: each graph would keep the first step waiting.
        self._move: _Move = torch.compile(_move, dynamic=True) if compiled else _move
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
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            if group["algorithm"] == "adamw":
                self._adamw(group, parameters)
            else:
                # Equal shapes together: a few large products instead of many small ones.
                shapes: dict[torch.Size, list[Tensor]] = {}
                for parameter in parameters:
                    shapes.setdefault(parameter.shape, []).append(parameter)
                for shape, alike in shapes.items():
                    self._muon(group, alike, _ADAMW_RMS * max(shape[-2:]) ** 0.5)
        return loss

    def _muon(self, group: dict[str, Any], parameters: list[Tensor], scale: float) -> None:
        first = parameters[0]
        buffers = [_local(self._state(p, "momentum_buffer")) for p in parameters]
        gradients = torch.stack([_local(p.grad) for p in parameters])  # type: ignore[arg-type]
        parameters = [_local(p) for p in parameters]
        keep = torch.ones((), dtype=torch.bool, device=gradients.device)
        if self.found_inf is not None:
            keep = self.found_inf == 0
        ahead, moved = self._move(gradients, torch.stack(buffers), keep, group["momentum"])
        directions = _part(orthogonalize(_whole(ahead, first)), first)
        torch._foreach_copy_(buffers, list(moved.unbind()))
        decay = keep.to(moved.dtype) * (group["lr"] * group["weight_decay"])
        torch._foreach_mul_(parameters, 1 - decay)
        torch._foreach_add_(parameters, list(directions.unbind()), alpha=-group["lr"] * scale)

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
