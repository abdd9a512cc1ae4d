"""Summation of gradients over ranks, in a form that a CUDA graph can capture.

DistributedDataParallel counts its backward passes on the host, so a replay of its hooks would do nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import ProcessGroup

# Bytes of a bucket, at least: large enough for the bandwidth, small enough that few gradients are left when
# the backward pass ends.
BUCKET_BYTES = 16 << 20
# Bytes/s of an all-reduce from which on gradients are not summed during the backward pass. While NCCL runs,
# matrix products that would use all multiprocessors take longer. Over NVLink, with 100 to 300 GB/s, the sum
# takes less time than they lose (docs/experiments.md); PCIe and networks reach 50 at most.
FAST = 80e9
# Renamed in PyTorch 2.13.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class GradientReduction:
    """Sums gradients over ranks: in buckets during the backward pass, or all at once after it.

    Used as a context manager around the backward pass. Every rank does the same passes.

    Summed after the backward pass, a gradient that belongs to one rank is summed there only, which is half
    the communication; on the other ranks it remains theirs. `parameter.grad` is then a view of a buffer.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        group: ProcessGroup,
        dtype: torch.dtype | None = None,
        *,
        overlap: bool = True,
        owners: Mapping[int, int] | None = None,
    ) -> None:
        """Form the buckets.

        Args:
            parameters: all that get a gradient, in the order of the forward pass.
            group: ranks that have the same parameters.
            dtype: in which gradients are summed, by default their own; they are rounded to it before.
            overlap: sum in buckets, each as soon as the backward pass has computed all its gradients.
            owners: the ranks that gradients belong to, by the id of the parameter; the sums of all others are
                needed on all ranks.
        """
        self._group, self._dtype, self._overlap = group, dtype, overlap
        self._owners = owners or {}
        self._parameters = list(parameters)
        self._buckets: list[list[nn.Parameter]] = [[]]
        size = 0
        # Gradients arrive in the reverse order of the forward pass.
        for parameter in reversed(parameters):
            if size >= BUCKET_BYTES:
                self._buckets.append([])
                size = 0
            self._buckets[-1].append(parameter)
            size += parameter.numel() * parameter.element_size()
        self._hooks: list[Any] = []
        self._left: list[list[nn.Parameter]] = []
        # The reduction of a bucket, what it sums, and where the sums belong.
        self._begun: list[tuple[Any, list[Tensor], list[Tensor]]] = []

    def __enter__(self) -> GradientReduction:
        self._left = list(self._buckets)
        for bucket in self._buckets if self._overlap else ():
            missing = {id(parameter) for parameter in bucket}

            def arrive(
                parameter: Tensor, bucket: list[nn.Parameter] = bucket, missing: set[int] = missing
            ) -> None:
                missing.discard(id(parameter))
                if not missing:
                    self._begin(bucket)

            self._hooks += [parameter.register_post_accumulate_grad_hook(arrive) for parameter in bucket]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if kind is None and self._overlap:
            self._finish()
        elif kind is None:
            for parameter, gradient in self._summed():
                parameter.grad = gradient

    def reduce(self) -> None:
        """Sum the gradients that are there now, where they are."""
        if self._overlap:
            self._left = list(self._buckets)
            self._finish()
            return
        for parameter, gradient in self._summed():
            parameter.grad.copy_(gradient)  # type: ignore[union-attr]

    def _begin(self, bucket: list[nn.Parameter]) -> None:
        self._left = [other for other in self._left if other is not bucket]
        gradients = [parameter.grad for parameter in bucket if parameter.grad is not None]
        if gradients:
            summed = gradients if self._dtype is None else [tensor.to(self._dtype) for tensor in gradients]
            self._begun.append((self._group.allreduce_coalesced(summed), summed, gradients))

    def _finish(self) -> None:
        # Those with a parameter that has no gradient.
        for bucket in self._left:
            self._begin(bucket)
        for work, summed, gradients in self._begun:
            work.wait()
            if summed is not gradients:
                torch._foreach_copy_(gradients, summed)
        self._begun.clear()

    def _summed(self) -> Iterable[tuple[nn.Parameter, Tensor]]:
        """Sum all gradients and yield those that belong to this rank or to all, with their parameters."""
        groups: list[list[nn.Parameter]] = [[] for _ in range(self._group.size())]
        shared: list[nn.Parameter] = []
        for parameter in self._parameters:
            if parameter.grad is not None:
                owner = self._owners.get(id(parameter))
                (shared if owner is None else groups[owner]).append(parameter)
        sizes = [sum(p.numel() for p in some) for some in groups]
        like = next(p.grad for p in self._parameters if p.grad is not None)
        dtype = self._dtype or like.dtype
        begun = []
        if any(sizes):
            # One row for each rank: a single large collective is faster than one for each gradient.
            rows = like.new_empty((len(groups), max(sizes)), dtype=dtype)
            for row, some, size in zip(rows, groups, sizes, strict=True):
                _flatten(some, row[:size])
            own = rows.new_empty(max(sizes))
            work = _reduce_scatter(own, rows.view(-1), group=self._group, async_op=True)
            begun.append((work, own, groups[self._group.rank()]))
        if shared:
            flat = like.new_empty(sum(p.numel() for p in shared), dtype=dtype)
            _flatten(shared, flat)
            begun.append((dist.all_reduce(flat, group=self._group, async_op=True), flat, shared))
        for work, flat, some in begun:
            work.wait()
            sizes = [p.numel() for p in some]
            for parameter, sums in zip(some, flat[: sum(sizes)].split(sizes), strict=True):
                yield parameter, sums.view_as(parameter).to(like.dtype)


def _flatten(parameters: Sequence[nn.Parameter], onto: Tensor) -> None:
    """Write the gradients one after another."""
    if parameters:
        torch.cat([p.grad.reshape(-1) for p in parameters], out=onto)  # type: ignore[union-attr]


def reduction_is_fast(group: ProcessGroup, device: torch.device) -> bool:
    """Return whether the ranks, GPUs, sum gradients at `FAST` bytes/s or more: measured, the same on all."""
    tensor = torch.zeros(16 << 20, device=device)
    best = torch.zeros(1, device=device)
    for _ in range(4):  # the first one connects the ranks
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        dist.all_reduce(tensor, group=group)
        end.record()
        end.synchronize()
        best = best.clamp(min=tensor.nbytes / (begin.elapsed_time(end) / 1e3))
    dist.all_reduce(best, dist.ReduceOp.MIN, group=group)
    return bool(best >= FAST)
