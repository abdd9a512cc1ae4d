"""Groups the matrices that Muon orthogonalizes at once, by shape and by the rank that they belong to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .orthogonalize import SharedOrthogonalization

# Elements of the matrices that a rank orthogonalizes at once, at most, unless a single one has more: enough
# for a GPU, and half a gigabyte of temporary memory. All of a shape would take 4 GB with 1B parameters.
LARGEST_BATCH = 1 << 26


class Batch(NamedTuple):
    """Parameters of one shape.

    Attributes:
        parameters: those of one rank after those of another, where they belong to ranks.
        own: which are updated from the momentum of this rank.
        counts: how many belong to each rank; None where all are this rank's.
    """

    parameters: list[Tensor]
    own: slice
    counts: list[int] | None


def batches_by_shape(
    parameters: Sequence[Tensor], owners: Mapping[int, int], shared: SharedOrthogonalization | None
) -> list[Batch]:
    """Group parameters by shape, for a few large matrix products instead of many small ones.

    Args:
        parameters: matrices or stacks of them.
        owners: the rank of each, by its id; empty where all are this rank's.
        shared: the ranks.
    """
    shapes: dict[torch.Size, list[Tensor]] = {}
    for parameter in parameters:
        shapes.setdefault(parameter.shape, []).append(parameter)
    parts = [part for some in shapes.values() for part in _parts(some, owners)]
    if shared is None or not owners:
        return [Batch(part, slice(0, len(part)), None) for part in parts]
    batches = []
    for part in parts:
        ordered = sorted(part, key=lambda p: owners[id(p)])
        counts = shared.owned_by([owners[id(p)] for p in ordered])
        first = sum(counts[: shared.rank])
        batches.append(Batch(ordered, slice(first, first + counts[shared.rank]), counts))
    # The largest are exchanged while the others are orthogonalized.
    return sorted(batches, key=lambda batch: -sum(p.numel() for p in batch.parameters))


def _parts(parameters: Sequence[Tensor], owners: Mapping[int, int]) -> list[list[Tensor]]:
    """Split parameters of one shape so that no rank has more than `LARGEST_BATCH` elements of a part."""
    like = parameters[0]
    ranks = like.device_mesh.size() if isinstance(like, DTensor) else max(len(set(owners.values())), 1)
    # Every rank has its share of each part.
    turns: Counter[int] = Counter()
    order = []
    for parameter in parameters:
        owner = owners.get(id(parameter), 0)
        order.append(turns[owner])
        turns[owner] += bool(owners)
    ordered = [p for _, p in sorted(zip(order, parameters, strict=True), key=lambda pair: pair[0])]
    size = max(LARGEST_BATCH // like.numel(), 1) * ranks
    return [ordered[first : first + size] for first in range(0, len(ordered), size)]
