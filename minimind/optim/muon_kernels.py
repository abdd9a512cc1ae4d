"""Triton kernels of Muon's step for CUDA GPUs: symmetric matrix products, and what is before and after them.

The kernels that update momenta and parameters read and write memory once, for all tensors of one shape. A
table holds their addresses.

Shapes: n tensors of one shape, each m matrices of R rows and C columns; a matrix has B blocks, one per
program. The table is (3, N) int64: gradients, momenta and parameters of all N tensors, contiguous float32.
Importing this file needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Arguments that vary with the shape. Without this list Triton recompiles a kernel whenever one of them is 1
# or a multiple of 16.
_SHAPE = ["first", "tensors", "matrices", "blocks", "columns"]


@triton.jit
def _tensor(addresses, ALIGNMENT: tl.constexpr):
    # The alignment allows vectorized loads and stores.
    return tl.multiple_of(tl.load(addresses).to(tl.pointer_type(tl.float32)), ALIGNMENT)


@triton.jit
def _lerp(start, end, weight):
    """Interpolate from the nearer end with a single rounding, as torch.lerp does."""
    near = weight < 0.5
    return tl.fma(tl.where(near, weight, weight - 1.0), end - start, tl.where(near, start, end))


@triton.jit(do_not_specialize=_SHAPE)
def update_momentum(
    addresses, found_inf, numbers, nesterov, sums, nonzero, first, tensors, matrices, size, blocks,
    ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update the momenta in place; write Nesterov's, (n, m, R, C) bf16, and its sums of squares, (n·m, B).

    Also write how many elements of the gradient are not zero to `nonzero`, (n·m, B).

    Where `found_inf`, (), is not 0 the momenta do not change and Nesterov's are 0.

    Args:
        numbers: (4,) float32: momentum, 1 - momentum, and those of `update_parameters`.
        first: table index of the first of the n tensors.
        tensors: N.
        matrices: m.
        size: R·C.
    """
    program = tl.program_id(0)
    matrix = program // blocks
    at = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    row = addresses + first + matrix // matrices
    start = (matrix % matrices).to(tl.int64) * size
    here = _tensor(row + tensors, ALIGNMENT) + start + at
    gradient = tl.load(_tensor(row, ALIGNMENT) + start + at, mask=inside, other=0.0)
    old = tl.load(here, mask=inside, other=0.0)
    apply = tl.load(found_inf) == 0.0
    momentum = tl.load(numbers)
    new = _lerp(old, gradient, tl.load(numbers + 1))
    tl.store(here, new, mask=at < tl.where(apply, size, 0))
    value = tl.where(apply, _lerp(gradient, new, momentum), 0.0)
    tl.store(nesterov + matrix.to(tl.int64) * size + at, value.to(nesterov.dtype.element_ty), mask=inside)
    tl.store(sums + program, tl.sum(value * value, 0))
    tl.store(nonzero + program, tl.sum((gradient != 0.0).to(tl.float32), 0))


@triton.jit(do_not_specialize=_SHAPE)
def normalize(nesterov, norms, normalized, size, blocks, BLOCK: tl.constexpr):
    """Write Nesterov's momenta divided by their `norms`, (n·m,) float32: within the range of fp16."""
    program = tl.program_id(0)
    matrix = program // blocks
    at = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    start = matrix.to(tl.int64) * size
    value = tl.load(nesterov + start + at, mask=at < size, other=0.0).to(tl.float32) / tl.load(norms + matrix)
    tl.store(normalized + start + at, value.to(normalized.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=_SHAPE)
def update_parameters(
    addresses, found_inf, numbers, active, factors, directions, columns, first, tensors, matrices, size,
    blocks, NORMALIZE: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Set each parameter to numbers[2]·parameter - numbers[3]·direction; directions are (n, m, R, C) fp16.

    With NORMALIZE each row of a direction is multiplied by its element of `factors`, (n, m, R) float32. Where
    `found_inf`, (), is not 0 or `active`, (n·m,), is 0 parameters do not change. `columns` is C, the other
    arguments are those of `update_momentum`.
    """
    program = tl.program_id(0)
    matrix = program // blocks
    at = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    apply = (tl.load(found_inf) == 0.0) & (tl.load(active + matrix) != 0.0)
    inside = at < tl.where(apply, size, 0)
    row = addresses + first + matrix // matrices
    here = _tensor(row + 2 * tensors, ALIGNMENT) + (matrix % matrices).to(tl.int64) * size + at
    direction = tl.load(directions + matrix.to(tl.int64) * size + at, mask=inside, other=0.0).to(tl.float32)
    if NORMALIZE:
        direction *= tl.load(factors + matrix * (size // columns) + at // columns, mask=inside, other=0.0)
    old = tl.load(here, mask=inside, other=0.0)
    tl.store(here, old * tl.load(numbers + 2) - tl.load(numbers + 3) * direction, mask=inside)


# Rows and columns of a tile of the result, and columns of the left factor that are read at once.
_TILE, _DEPTH = 128, 64


@triton.jit
def _multiply_symmetric(
    left, right, out, size, depth, left_matrix, left_row, left_column, right_matrix, right_row, right_column,
    scale, add, diagonal, ADD: tl.constexpr, EVEN: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Compute the tiles (row, column) with row ≥ column, and write them to (column, row), too."""
    tiles = tl.cdiv(size, TILE)
    row = tl.program_id(0) // tiles
    column = tl.program_id(0) % tiles
    if row >= column:
        matrix = tl.program_id(1).to(tl.int64)
        rows = row * TILE + tl.arange(0, TILE)
        columns = column * TILE + tl.arange(0, TILE)
        inner = tl.arange(0, DEPTH)
        # Beyond the edge any row may be read: what it gives is not written.
        lefts = left + matrix * left_matrix + (rows % size)[:, None] * left_row + inner[None, :] * left_column
        rights = right + matrix * right_matrix + inner[:, None] * right_row
        rights += (columns % size)[None, :] * right_column
        sums = tl.zeros((TILE, TILE), dtype=tl.float32)
        for start in range(0, depth, DEPTH):
            if EVEN:
                a = tl.load(lefts)
                b = tl.load(rights)
            else:
                a = tl.load(lefts, mask=inner[None, :] < depth - start, other=0.0)
                b = tl.load(rights, mask=inner[:, None] < depth - start, other=0.0)
            sums = tl.dot(a, b, sums)
            lefts += DEPTH * left_column
            rights += DEPTH * right_row
        below = rows[:, None] * size + columns[None, :]
        inside = (rows < size)[:, None] & (columns < size)[None, :]
        if ADD:
            # With ADD the left factor is contiguous.
            added = tl.load(left + matrix * left_matrix + below, mask=inside, other=0.0)
            sums = scale * sums + add * added.to(tl.float32)
            sums += tl.where(rows[:, None] == columns[None, :], diagonal, 0.0)
        result = sums.to(out.dtype.element_ty)
        out += matrix * size * size
        tl.store(out + below, result, mask=inside)
        if row > column:
            above = columns[:, None] * size + rows[None, :]
            tl.store(out + above, tl.trans(result), mask=(columns < size)[:, None] & (rows < size)[None, :])


def multiply_symmetric(
    left: Tensor, right: Tensor, scale: float = 1.0, add: float = 0.0, diagonal: float = 0.0
) -> Tensor:
    """Return scale·left·right, and with `add` plus add·left + diagonal·I, where the product is symmetric.

    Half of it is computed. The factors are transposes of each other, or symmetric and commute.

    Args:
        left: (n, S, C) fp16; contiguous with `add`.
        right: (n, C, S) fp16.

    Returns:
        (n, S, S) fp16.
    """
    count, size, depth = left.shape
    out = torch.empty((count, size, size), dtype=left.dtype, device=left.device)
    _multiply_symmetric[(triton.cdiv(size, _TILE) ** 2, count)](
        left, right, out, size, depth, *left.stride(), *right.stride(), scale, add, diagonal,
        ADD=add != 0.0, EVEN=depth % _DEPTH == 0, TILE=_TILE, DEPTH=_DEPTH, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out
