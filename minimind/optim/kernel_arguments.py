"""Arguments of Muon's kernels that change from step to step, kept in the memory of the GPU.

A CUDA graph replays kernels with the arguments of its capture; what they read from memory may change.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

# The kernels are in `muon_kernels.py`. With a CPU build of PyTorch Triton, slow to import, is not loaded.
_BUILDABLE = torch.backends.cuda.is_built() and find_spec("triton") is not None


def kernels_supported(tensors: list[Tensor]) -> bool:
    """Whether Triton is available and all are unsharded contiguous float32 tensors on one CUDA GPU."""
    device = tensors[0].device
    return (
        _BUILDABLE
        and device.type == "cuda"
        and {type(t) for t in tensors} <= {Tensor, torch.nn.Parameter}
        and all(t.dtype == torch.float32 and t.device == device and t.is_contiguous() for t in tensors)
    )


def symmetric_products_supported(device: torch.device) -> bool:
    """Whether the kernel of symmetric products runs there: it is tuned for compute capability 9."""
    return _BUILDABLE and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@dataclass(frozen=True)
class KernelArguments:
    """What the kernels read on the GPU in one step.

    Attributes:
        tables: by group index, the (3, N) addresses of gradients, momenta and parameters.
        rows: (rows, 4) float32. A group of AdamW has one row, with the learning rate; one of Muon has a row
            for each shape: momentum, 1 - momentum, factor of the weights, factor of the directions.
        first_row: by group index.
        alignment: of all addresses in bytes, 4 or 16.
    """

    tables: dict[int, Tensor]
    rows: Tensor
    first_row: dict[int, int]
    alignment: int

    @classmethod
    def on_device(
        cls,
        addresses: dict[int, list[list[int]]],
        rows: list[tuple[float, float, float, float]],
        first_row: dict[int, int],
        device: torch.device,
        before: KernelArguments | None,
    ) -> KernelArguments:
        """Return the arguments on the device, in the memory of those of the step before."""

        def copy(values: list[Any], dtype: torch.dtype, onto: Tensor | None) -> Tensor:
            # Copied from pinned memory without a synchronization; PyTorch reuses it after the copy only.
            host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
            if onto is None or onto.shape != host.shape:
                return host.to(device, non_blocking=True)
            return onto.copy_(host, non_blocking=True)

        old = {} if before is None else before.tables
        # A gradient may start anywhere in a DDP bucket.
        aligned = not any(address % 16 for table in addresses.values() for row in table for address in row)
        return cls(
            {index: copy(table, torch.int64, old.get(index)) for index, table in addresses.items()},
            copy(rows, torch.float32, None if before is None else before.rows),
            first_row,
            16 if aligned else 4,
        )

    def of(self, index: int) -> tuple[Tensor, Tensor, int]:
        """Return the table, empty for AdamW, the rows and the alignment of a group."""
        return self.tables.get(index, self.rows[:0]), self.rows[self.first_row[index] :], self.alignment
