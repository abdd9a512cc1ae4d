"""Orthogonal factors of many matrices by Newton-Schulz iteration, on one rank or shared by all ranks.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon), computed on Gram matrices as by Zhang et al. 2026
(dao-lab.ai/blog/2026/gram-newton-schulz). Shapes: n matrices of one shape, R rows, C columns; S = min(R, C).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor

# The quintic a·x + b·x³ + c·x⁵ with the largest slope at zero whose iteration stays within about 30% of 1
# (Jordan et al. 2024). More than five steps do not improve it.
_QUINTIC = (3.4445, -4.7750, 2.0315)
# Steps on one Gram matrix. Its rounding errors grow with each, so it is computed twice.
_STEPS = (3, 2)
# Lower bound of a norm, for zero matrices.
MIN_NORM = 1e-12
# Renamed in PyTorch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return approximately the orthogonal factor U·Vᵀ of each matrix U·S·Vᵀ, by Newton-Schulz iteration.

    Singular values end between about 0.7 and 1.2; those far below a thousandth of the norm end lower, and a
    zero matrix stays zero. Computed in fp16 on a GPU, which is enough for a direction, else in float32 or the
    input's dtype, if that is wider.

    Args:
        matrices: (n, R, C), or (n, m, R, C) for n stacks of m.

    Returns:
        Same shape and dtype.
    """
    return newton_schulz(normalized(matrices)).to(matrices.dtype).view(matrices.shape)


def normalized(matrices: Tensor) -> Tensor:
    """Return (n, R, C) matrices divided by their norms, of (n, R, C) or (n, m, R, C); in fp16 on a GPU."""
    x = matrices.flatten(0, -3)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_(min=MIN_NORM)
    return x.half() if x.is_cuda else x


def newton_schulz(x: Tensor, *, kernels: bool = False) -> Tensor:
    """Return the last iterate, contiguous, for (n, R, C) matrices of norm at most 1.

    A step multiplies x by a polynomial p(G) of its Gram matrix G, x·xᵀ or xᵀ·x, whichever is smaller. That of
    the next iterate is p(G)·G·p(G). So several steps need one product with x, by the product of their
    polynomials; the other products are of symmetric (S, S) matrices that commute.

    The numbers stay below a³ = 41. In fp16 the result has a tenth of the error of the iteration on x in bf16.

    Args:
        kernels: compute the symmetric products by the Triton kernel of `muon_kernels.py`.
    """
    multiply = _multiply
    if kernels:
        from .muon_kernels import multiply_symmetric as multiply
    a, b, c = _QUINTIC
    wide = x.shape[-2] <= x.shape[-1]
    for steps in _STEPS:
        gram = multiply(x, x.mT) if wide else multiply(x.mT, x)
        product = polynomial = multiply(gram, gram, scale=c, add=b, diagonal=a)
        for _ in range(1, steps):
            gram = multiply(gram, polynomial)
            gram = multiply(polynomial, gram)
            polynomial = multiply(gram, gram, scale=c, add=b, diagonal=a)
            product = multiply(product, polynomial)
        x = product @ x if wide else x @ product
    return x


def _multiply(
    left: Tensor, right: Tensor, scale: float = 1.0, add: float = 0.0, diagonal: float = 0.0
) -> Tensor:
    """Return scale·left·right, and with `add` plus add·left + diagonal·I; (n, S, S)."""
    if not add:
        return left @ right
    result = torch.baddbmm(left, left, right, beta=add, alpha=scale)
    result.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    return result


def assign(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Return which items each rank computes, ascending: the largest first, each to the least loaded rank.

    The largest load is at most 4/3 of the best possible (Graham 1969, doi 10.1137/0117039).

    Args:
        costs: of the items.
        ranks: how many ranks there are.
    """
    loads = [0.0] * ranks
    items: list[list[int]] = [[] for _ in range(ranks)]
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        rank = loads.index(min(loads))
        loads[rank] += costs[item]
        items[rank].append(item)
    return [sorted(own) for own in items]


class SharedOrthogonalization:
    """Divides matrices among ranks that all have them, as under DDP, and exchanges what the ranks compute.

    Each matrix, or stack of matrices, belongs to one rank.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Share the work among the ranks of a process group."""
        self._group = group

    def owners(self, shapes: Sequence[torch.Size]) -> list[int]:
        """Return the rank that each stack (..., R, C) belongs to, the same on all ranks; balanced by cost."""
        costs = [math.prod(shape[:-2]) * _multiplications(*shape[-2:]) for shape in shapes]
        owners = [0] * len(shapes)
        for rank, own in enumerate(assign(costs, self._group.size())):
            for item in own:
                owners[item] = rank
        return owners

    def owned_by(self, owners: Sequence[int]) -> list[int]:
        """Return how many of the owned stacks each rank has."""
        return [owners.count(rank) for rank in range(self._group.size())]

    @property
    def rank(self) -> int:
        """This rank in the group."""
        return self._group.rank()

    def gather(self, own: Tensor, counts: Sequence[int]) -> Callable[[], Tensor]:
        """Start to gather what all ranks have computed.

        Args:
            own: of this rank, (counts[rank], ...), contiguous.
            counts: of each rank.

        Returns:
            A function that waits and returns (sum of counts, ...), in the order of the ranks.
        """
        most = max(counts)
        sent = own
        if len(own) < most:
            sent = own.new_empty((most, *own.shape[1:]))
            sent[: len(own)] = own
        received = own.new_empty((len(counts), *sent.shape))
        work = _all_gather(received.flatten(0, 1), sent, group=self._group, async_op=True)

        def finish() -> Tensor:
            work.wait()
            if min(counts) == most:
                return received.flatten(0, 1)
            return torch.cat([part[:count] for part, count in zip(received, counts, strict=True)])

        return finish

    def broadcast(self, tensors: Sequence[Tensor], owners: Sequence[int]) -> None:
        """Copy each tensor from its owner to all ranks, in place."""
        works = [
            dist.broadcast(tensor, group=self._group, group_src=owner, async_op=True)
            for tensor, owner in zip(tensors, owners, strict=True)
        ]
        for work in works:
            work.wait()


def _multiplications(rows: int, columns: int) -> float:
    """Return those of the Newton-Schulz iteration where symmetric products are computed by half."""
    small, large = sorted((rows, columns))
    return small * small * (3 * large + 7 * small)


class StackLayout:
    """Where n parameters of one shape are: on this rank, or sharded by rows over the ranks of FSDP2.

    Sharded matrices are redistributed by an all-to-all, so that each rank has all rows of some matrices and
    the ranks share the orthogonalization. The matrices of a stack are whole on each rank: FSDP2 shards the
    first dimension of a parameter.
    """

    def __init__(self, count: int, like: Tensor) -> None:
        """Describe `count` parameters that are sharded like `like`."""
        self._count, self._like = count, like
        self._rows: list[Placement] = []
        self._whole: list[Placement] = []
        if isinstance(like, DTensor):
            self._rows = [Shard(p.dim + 1) if isinstance(p, Shard) else p for p in like.placements]
            self._whole = self._rows
            if like.ndim == 2:
                self._whole = [Shard(0) if isinstance(p, Shard) else p for p in like.placements]

    def whole(self, shards: Tensor) -> Tensor:
        """Return this rank's whole matrices, from its shards of all n parameters."""
        return self._moved(shards, self._rows, self._whole)

    def shards(self, matrices: Tensor) -> Tensor:
        """Return this rank's shards of all n parameters, from its whole matrices."""
        return self._moved(matrices, self._whole, self._rows)

    def all_rows(self, values: Tensor) -> Tensor:
        """Return one value for each row of all matrices, from those of this rank's whole matrices."""
        return values if not self._rows else self._distributed(values, self._whole, values=True).full_tensor()

    def shard_rows(self, values: Tensor) -> Tensor:
        """Return the values of the rows in this rank's shards, from those of all rows."""
        if not isinstance(self._like, DTensor):
            return values
        # No source rank: every rank has all values.
        return distribute_tensor(values, self._like.device_mesh, self._rows, src_data_rank=None).to_local()

    def _moved(self, local: Tensor, before: list[Placement], after: list[Placement]) -> Tensor:
        if before == after:
            return local
        return self._distributed(local, before).redistribute(placements=after).to_local()

    def _distributed(self, local: Tensor, placements: list[Placement], *, values: bool = False) -> DTensor:
        assert isinstance(self._like, DTensor)
        shape = torch.Size((self._count, *self._like.shape[: -1 if values else None]))
        stride = torch.empty(shape, device="meta").stride()
        mesh = self._like.device_mesh
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
