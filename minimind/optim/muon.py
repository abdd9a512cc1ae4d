"""Muon and NorMuon: momentum orthogonalized by Newton-Schulz iteration; AdamW for all other parameters.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon) with the scale of Moonlight (Liu et al. 2025, arXiv
2502.16982), which keeps the learning rate and weight decay of AdamW. NorMuon (Li et al. 2025, arXiv
2510.05491) divides each row of the orthogonal factor by a running root mean square of that row.

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

# The quintic a·x + b·x³ + c·x⁵ with the largest slope at zero whose iteration stays within about 30% of 1
# (Jordan et al. 2024). More steps do not improve it.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_STEPS = 5
# Typical root mean square of an AdamW update (Liu et al. 2025, section 2.2).
_ADAMW_RMS = 0.2

# Lower bound of a norm, for zero matrices.
_MIN_NORM = 1e-12
# Added to the root mean square of a row, for rows that are zero.
_ROW_EPS = 1e-8

# The kernels are in `muon_kernels.py`. With a CPU build of PyTorch Triton, slow to import, is not loaded.
_BUILDABLE = torch.backends.cuda.is_built() and find_spec("triton") is not None
# Elements per kernel program: 16 for each thread of 8 warps.
_BLOCK = 4096
_WARPS = 8


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return approximately the orthogonal factor U·Vᵀ of each matrix U·S·Vᵀ, by Newton-Schulz iteration.

    Singular values end between about 0.7 and 1.2; those far below a thousandth of the norm end lower, and a
    zero matrix stays zero. Computed in bf16 on a GPU, which is enough for a direction, else in the input's
    dtype.

    Args:
        matrices: (n, R, C), or (n, m, R, C) for n stacks of m.

    Returns:
        Same shape and dtype.
    """
    x = matrices.flatten(0, -3)
    norm = x.norm(dim=(-2, -1), keepdim=True).clamp(min=_MIN_NORM)
    if x.is_cuda:
        x, norm = x.bfloat16(), norm.bfloat16()
    return _newton_schulz(x / norm).to(matrices.dtype).view(matrices.shape)


def _newton_schulz(x: Tensor) -> Tensor:
    """Return the last iterate, contiguous, for (n, R, C) matrices of norm at most 1."""
    a, b, c = _QUINTIC
    wide = x.shape[-2] <= x.shape[-1]
    for _ in range(_STEPS):
        # Square the smaller side, which costs less.
        square = x @ x.mT if wide else x.mT @ x
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        first, second = (polynomial, x) if wide else (x, polynomial)
        x = torch.baddbmm(x, first, second, beta=a)
    return x


def _scale(shape: torch.Size) -> float:
    """Return the factor of Muon's update for (..., R, C)."""
    return _ADAMW_RMS * max(shape[-2:]) ** 0.5


def row_factors(directions: Tensor, mean_squares: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Return NorMuon's factor of each row, and the updated mean squares.

    A row is divided by its running root mean square; one factor for all rows of a matrix then restores the
    Frobenius norm, so that the learning rate keeps its meaning. Both need the norms of the rows only. For a
    zero matrix, one that is not updated, the mean squares do not change.

    Args:
        directions: (..., R, C) orthogonal factors.
        mean_squares: (..., R) running mean squares, at first zero: a common factor cancels.
        decay: decay rate of the mean squares.

    Returns:
        (..., R) factors and mean squares, in the dtype of the mean squares.
    """
    squares = torch.linalg.vector_norm(directions, dim=-1, dtype=mean_squares.dtype).square_()
    updated = torch.lerp(mean_squares, squares / directions.shape[-1], 1 - decay)
    factors = 1 / (updated.sqrt() + _ROW_EPS)
    total = squares.sum(-1, keepdim=True)
    scaled = (squares * factors.square()).sum(-1, keepdim=True)
    factors = factors * (total / scaled.clamp(min=_MIN_NORM)).sqrt()
    return factors, torch.where(total > 0, updated, mean_squares)


def _gather(shards: Tensor, like: Tensor) -> Tensor:
    """Return (n, R, C) from the local shards of n matrices sharded like `like`, with one collective."""
    if not isinstance(like, DTensor):
        return shards
    shape = torch.Size((len(shards), *like.shape))
    stride = torch.empty(shape, device="meta").stride()
    sharded = DTensor.from_local(
        shards, like.device_mesh, _stacked_placements(like), run_check=False, shape=shape, stride=stride
    )
    return sharded.full_tensor()


def _shard(full: Tensor, like: Tensor) -> Tensor:
    """Return the local shard of a tensor from `_gather`."""
    if not isinstance(like, DTensor):
        return full
    # No source rank: every process already has the full tensor.
    return distribute_tensor(full, like.device_mesh, _stacked_placements(like), src_data_rank=None).to_local()


def _stacked_placements(like: DTensor) -> list[Placement]:
    return [Shard(p.dim + 1) if isinstance(p, Shard) else p for p in like.placements]


def _kernels_supported(tensors: list[Tensor]) -> bool:
    """Whether Triton is available and all are unsharded contiguous float32 tensors on one CUDA GPU."""
    device = tensors[0].device
    return (
        _BUILDABLE
        and device.type == "cuda"
        and {type(t) for t in tensors} <= {Tensor, torch.nn.Parameter}
        and all(t.dtype == torch.float32 and t.device == device and t.is_contiguous() for t in tensors)
    )


def _local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, or the tensor if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Muon(torch.optim.Optimizer):
    """Muon and AdamW in one optimizer; `algorithm` of a parameter group is `muon` or `adamw`.

    An update can be skipped without a synchronization: where the attribute `found_inf`, a () float tensor, is
    1.0, a step changes neither weights nor momentum nor step counts, as in PyTorch's fused AdamW.

    Both algorithms: p ← (1 - lr·weight_decay)·p - lr·update. Muon's update is √max(R, C)·0.2 times the
    orthogonal factor of its Nesterov momentum, so its root mean square is at most 0.2, that of AdamW. A group
    with `normalize_rows` multiplies the rows by `row_factors`, which keep that root mean square.

    An expert that received no token has a zero gradient, but orthogonalized momentum would still move it at
    full size. A matrix of a stack whose gradient is all zero is therefore not updated; its momentum decays.

    Parameters may be sharded by FSDP2: weights and momentum stay sharded, and the matrices of one shape are
    gathered only while they are orthogonalized.
    """

    # Set by `skip_if_nonfinite`.
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
        """Create the optimizer.

        Args:
            params: groups with `algorithm`, and optionally `weight_decay`; `muon` takes matrices only, and
                optionally `normalize_rows` for NorMuon and the decay rate `row_decay` of its mean squares.
            betas: decay rates of AdamW's moments.
            eps: added by AdamW to the root of the second moment.
            momentum: decay rate of Muon's momentum.
            fused: use the fused AdamW kernel of CUDA and CPU; without it `found_inf` is ignored.
            kernels: use the Triton kernels of `muon_kernels.py` around the matrix products, compiled at the
                first step, where supported: unsharded float32 parameters on a CUDA GPU.

        Raises:
            ValueError: for a parameter of a `muon` group that is not a matrix.
        """
        defaults = {"lr": lr, "weight_decay": 0.0, "betas": betas, "eps": eps, "momentum": momentum}
        rows = {"normalize_rows": False, "row_decay": 0.95}
        super().__init__(params, {**defaults, **rows, "algorithm": "adamw", "fused": fused})
        self._kernels = kernels
        # By group index: ids of the parameters with a gradient, and these parameters grouped by shape.
        self._batches: dict[int, tuple[list[int], list[list[Tensor]]]] = {}
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
        """Group parameters by shape, for a few large matrix products instead of many small ones."""
        ids = [id(p) for p in parameters]
        known, batches = self._batches.get(index, ([], []))
        if known != ids:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in parameters:
                shapes.setdefault(parameter.shape, []).append(parameter)
            batches = list(shapes.values())
            self._batches[index] = ids, batches
        return batches

    def _muon(self, group: dict[str, Any], batches: list[list[Tensor]]) -> None:
        if self._kernels:
            parameters = list(chain.from_iterable(batches))
            gradients = [p.grad for p in parameters]
            buffers = [self._state(p, "momentum_buffer") for p in parameters]
            tensors: list[Tensor] = [*gradients, *buffers, *parameters]  # type: ignore[list-item]
            if _kernels_supported(tensors):
                self._muon_with_kernels(group, batches, tensors)
                return
        apply = torch.ones((), dtype=torch.bool, device=batches[0][0].device)
        if self.found_inf is not None:
            apply = self.found_inf == 0
        for batch in batches:
            self._muon_reference(group, batch, apply)

    def _row_factors(self, group: dict[str, Any], parameters: list[Tensor], directions: Tensor) -> Tensor:
        """Return the factors (n, ..., R) of the rows of whole directions; update their mean squares."""
        states = [self.state[p] for p in parameters]
        for state in states:
            if "row_mean_square" not in state:
                # Whole on every rank, also where the parameter is sharded: one number per row.
                dtype = torch.promote_types(directions.dtype, torch.float32)
                state["row_mean_square"] = directions.new_zeros(directions.shape[1:-1], dtype=dtype)
        kept = [state["row_mean_square"] for state in states]
        factors, updated = row_factors(directions, torch.stack(kept), group["row_decay"])
        torch._foreach_copy_(kept, list(updated.unbind()))
        return factors

    def _muon_reference(self, group: dict[str, Any], parameters: list[Tensor], apply: Tensor) -> None:
        """Update parameters of one shape with PyTorch operations, nothing where `apply`, (), is False."""
        first, whole = parameters[0], parameters
        buffers = [_local(self._state(p, "momentum_buffer")) for p in parameters]
        gradients = torch.stack([_local(p.grad) for p in parameters])  # type: ignore[arg-type]
        parameters = [_local(p) for p in parameters]
        before, momentum = torch.stack(buffers), group["momentum"]
        updated = torch.lerp(before, gradients, 1 - momentum)
        nesterov = torch.where(apply, torch.lerp(gradients, updated, momentum), 0.0)
        torch._foreach_copy_(buffers, list(torch.where(apply, updated, before).unbind()))
        retained = 1 - apply.to(updated.dtype) * (group["lr"] * group["weight_decay"])
        if first.ndim > 2:
            # FSDP2 shards the first dimension, so that matrices of a stack are never split.
            active = gradients.ne(0).flatten(-2).any(-1)[..., None, None]
            nesterov = torch.where(active, nesterov, 0.0)  # a zero matrix stays zero
            torch._foreach_mul_(parameters, list(torch.where(active, retained, 1.0).unbind()))
        else:
            torch._foreach_mul_(parameters, retained)
        directions = orthogonalize(_gather(nesterov, first))
        if group["normalize_rows"]:
            directions *= self._row_factors(group, whole, directions).unsqueeze(-1)
        directions = _shard(directions, first)
        rate = group["lr"] * _scale(first.shape)
        torch._foreach_add_(parameters, list(directions.unbind()), alpha=-rate)

    def _muon_with_kernels(
        self, group: dict[str, Any], batches: list[list[Tensor]], tensors: list[Tensor]
    ) -> None:
        """Do what `_muon_reference` does, reading memory once before the matrix products and once after.

        Args:
            tensors: all gradients, then all momenta, then all parameters, in the order of `batches`.
        """
        from . import muon_kernels

        device = tensors[0].device
        found_inf = self.found_inf if self.found_inf is not None else torch.zeros((), device=device)
        addresses = [tensor.data_ptr() for tensor in tensors]
        # Copied from pinned memory without a synchronization; PyTorch reuses that memory after the copy only.
        table = torch.tensor(addresses, pin_memory=device.type == "cuda").to(device, non_blocking=True)
        # A gradient may start anywhere in a DDP bucket.
        alignment = 4 if any(address % 16 for address in addresses) else 16
        constants = {"ALIGNMENT": alignment, "BLOCK": _BLOCK, "num_warps": _WARPS}
        momentum = float(group["momentum"])
        retained = 1.0 - group["lr"] * group["weight_decay"]
        first = 0
        # Triton launches kernels on the current device.
        with torch.cuda.device_of(table):
            for batch in batches:
                shape = batch[0].shape
                nesterov = torch.empty((len(batch), *shape), dtype=torch.bfloat16, device=device)
                x = nesterov.view(-1, *shape[-2:])
                size = shape[-2] * shape[-1]
                blocks = -(-size // _BLOCK)
                grid = (len(x) * blocks,)
                layout = first, len(tensors) // 3, len(x) // len(batch), size, blocks
                sums, nonzero = torch.empty((2, len(x), blocks), device=device)
                muon_kernels.update_momentum[grid](
                    table, found_inf, nesterov, sums, nonzero, *layout, momentum, 1.0 - momentum, **constants
                )
                active = nonzero.sum(-1) if len(shape) > 2 else torch.ones(len(x), device=device)
                norm = sums.sum(-1).sqrt_().clamp_(min=_MIN_NORM)
                x /= norm.bfloat16().view(-1, 1, 1)
                rate = float(group["lr"] * _scale(shape))
                directions = _newton_schulz(x)
                normalize = bool(group["normalize_rows"])
                factors = active
                if normalize:
                    factors = self._row_factors(group, batch, directions.view(len(batch), *shape))
                muon_kernels.update_parameters[grid](
                    table, found_inf, active, factors, directions, shape[-1], *layout,
                    float(retained), rate, NORMALIZE=normalize, **constants,
                )  # fmt: skip
                first += len(batch)

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        fused = group["fused"]
        for p in parameters:
            if not self.state[p]:
                # The fused kernel keeps the step count on the device of the parameter.
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
