"""Triton kernels of Muon's step, for CUDA GPUs: what comes before and after the products of matrices.

Each reads and writes the memory once, for all tensors of one shape together. The tensors lie anywhere in the
memory of the GPU: a kernel gets a table of their addresses.

Shapes: n tensors of one shape, of m matrices each, R rows and C columns; a matrix falls into B blocks, and a
program has one of them. N tensors stand in the table, (3, N) int64: gradients, momenta, parameters, all
contiguous and float32. Loading this file needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that differ from shape to shape while nothing is gained by knowing them: else each would be compiled
# once more when it happens to be 1 or a multiple of 16.
_SHAPE = ["first", "tensors", "matrices", "blocks"]


@triton.jit
def _tensor(addresses, ALIGNMENT: tl.constexpr):
    # Told how an address is aligned, a thread moves several numbers at once.
    return tl.multiple_of(tl.load(addresses).to(tl.pointer_type(tl.float32)), ALIGNMENT)


@triton.jit
def _lerp(start, end, weight):
    """From the nearer end and rounded once, as torch.lerp does it."""
    near = weight < 0.5
    return tl.fma(tl.where(near, weight, weight - 1.0), end - start, tl.where(near, start, end))


@triton.jit(do_not_specialize=_SHAPE)
def move_momenta(
    addresses, found_inf, ahead, sums, first, tensors, matrices, size, blocks, momentum, rest,
    ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Move the momenta in place; write Nesterov's, (n, m, R, C) bf16, and its sums of squares, (n·m, B).

    Where `found_inf`, (), is not 0 the momenta stay and Nesterov's are 0.

    Args:
        first: index in the table of the first of the n tensors.
        tensors: N.
        matrices: m.
        size: R·C.
        blocks: B.
        rest: 1 - momentum.
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
    keep = tl.load(found_inf) == 0.0
    new = _lerp(old, gradient, rest)
    tl.store(here, new, mask=at < tl.where(keep, size, 0))
    value = tl.where(keep, _lerp(gradient, new, momentum), 0.0)
    tl.store(ahead + matrix.to(tl.int64) * size + at, value.to(ahead.dtype.element_ty), mask=inside)
    tl.store(sums + program, tl.sum(value * value, 0))


@triton.jit(do_not_specialize=_SHAPE)
def move_parameters(
    addresses, found_inf, directions, first, tensors, matrices, size, blocks, kept, rate,
    ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Have each parameter be kept·parameter - rate·direction, in place; directions are (n, m, R, C) bf16.

    Where `found_inf`, (), is not 0 they stay. The other arguments are those of `move_momenta`.
    """
    program = tl.program_id(0)
    matrix = program // blocks
    at = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.where(tl.load(found_inf) == 0.0, size, 0)
    row = addresses + first + matrix // matrices
    here = _tensor(row + 2 * tensors, ALIGNMENT) + (matrix % matrices).to(tl.int64) * size + at
    direction = tl.load(directions + matrix.to(tl.int64) * size + at, mask=inside, other=0.0).to(tl.float32)
    old = tl.load(here, mask=inside, other=0.0)
    tl.store(here, old * kept - rate * direction, mask=inside)
