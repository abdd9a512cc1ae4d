"""Triton kernels of Muon's step for CUDA GPUs: momentum before and weight update after the matrix products.

Each kernel reads and writes memory once, for all tensors of one shape. A table holds their addresses.

Shapes: n tensors of one shape, each m matrices of R rows and C columns; a matrix has B blocks, one per
program. The table is (3, N) int64: gradients, momenta and parameters of all N tensors, contiguous float32.
Importing this file needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
def update_parameters(
    addresses, found_inf, numbers, active, factors, directions, columns, first, tensors, matrices, size,
    blocks, NORMALIZE: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Set each parameter to numbers[2]·parameter - numbers[3]·direction; directions are (n, m, R, C) bf16.

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
