"""Prints the relative errors of Muon's kernels compared to plain PyTorch.

With --interpret the kernels run on the CPU in Triton's interpreter. That must be set before Triton is
imported, hence a separate process. With --shared two such processes share the work and are compared with
one.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile

import torch
from torch import Tensor, nn
from torch import distributed as dist

from minimind.optim import muon
from support import fused_cases
from support.fused_cases import error

# Wide, tall, square, a stack, and one smaller than a block. Only the first fills all its blocks; it and the
# stack have matrices of a multiple of 16 elements, which allows vectorized loads.
SHAPES = {
    "cpu": [(32, 64), (95, 33), (51, 51), (3, 48, 24), (1, 7)],
    "cuda": [(256, 768), (769, 255), (515, 515), (8, 336, 128), (1, 7)],
}
STEPS = 2


def parameters(device: str, offset: int) -> list[nn.Parameter]:
    """Return two of each shape; with an offset they are not aligned to 16 bytes."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for shape in SHAPES[device] * 2:
        memory = torch.empty(offset + math.prod(shape), device=device)
        weight = memory[offset:].view(shape)
        found.append(nn.Parameter(weight.copy_(torch.randn(shape, generator=generator))))
    return found


def give_gradients(parameters: list[nn.Parameter], seed: int, *, idle: bool) -> None:
    """Put gradients on the parameters; with `idle` the second matrix of each stack gets a zero gradient."""
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device)
        if idle and p.ndim > 2:
            p.grad[1] = 0.0


def run(
    device: str,
    *,
    kernels: bool,
    offset: int = 0,
    normalize: bool = False,
    group: dist.ProcessGroup | None = None,
) -> tuple[list[list[Tensor]], list[Tensor], bool]:
    """Take some steps; return updates, momenta, and whether a skipped step changed nothing.

    Args:
        group: ranks that share the work, and have no gradients of the matrices of others.
    """
    taken = parameters(device, offset)
    optimizer = muon.Muon(
        [{"params": taken, "algorithm": "muon", "weight_decay": 0.1, "normalize_rows": normalize}],
        lr=0.05,
        kernels=kernels,
        process_group=group,
    )
    if kernels:
        optimizer._with_pytorch = None  # must not be used instead
    updates = []
    for step in range(STEPS):
        before = [p.detach().clone() for p in taken]
        give_gradients(taken, 1 + step, idle=step == STEPS - 1)
        for p in taken:
            if group is not None and optimizer.owners[id(p)] != group.rank():
                p.grad.fill_(math.nan)
        optimizer.found_inf = torch.zeros((), device=device)
        optimizer.step()
        updates.append([p.detach() - old for p, old in zip(taken, before, strict=True)])
    optimizer.gather_momenta()
    momenta = [optimizer.state[p]["momentum_buffer"] for p in taken]
    squares = [optimizer.state[p]["row_mean_square"] for p in taken] if normalize else []
    before = [t.detach().clone() for t in (*taken, *momenta, *squares)]
    for p in taken:
        p.grad.fill_(math.nan)
    optimizer.found_inf = torch.ones((), device=device)
    optimizer.step()
    return updates, momenta, same(before, [*taken, *momenta, *squares])


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def errors(case: str, ours: list[Tensor], wanted: list[Tensor]) -> dict[str, float]:
    found = {}
    for index, (our, want) in enumerate(zip(ours, wanted, strict=True)):
        name = f"{case}, {tuple(our.shape)} at {index}"
        found[name] = error(our, want.double())
    return found


def products(device: str) -> dict[str, float]:
    """Return the relative errors of symmetric products in fp16, compared with float64."""
    from minimind.optim.muon_kernels import multiply_symmetric

    torch.manual_seed(0)
    found = {}
    for count, size, depth in ((2, 40, 64), (1, 33, 50), (1, 16, 7)):
        x = torch.randn(count, size, depth, device=device).half()
        exact = x.double() @ x.double().mT
        for name, left in (("wide", x), ("tall", x.mT.contiguous().mT)):
            found[f"{name} {size} x {depth}"] = error(multiply_symmetric(left, left.mT), exact)
        gram = (exact / exact.norm()).half()
        square = gram.double() @ gram.double()
        found[f"squared {size}"] = error(multiply_symmetric(gram, gram), square)
        polynomial = multiply_symmetric(gram, gram, scale=2.0, add=-5.0, diagonal=3.0)
        identity = torch.eye(size, dtype=torch.float64, device=device)
        found[f"polynomial {size}"] = error(polynomial, 2 * square - 5 * gram.double() + 3 * identity)
    return found


def all_cases(device: str) -> dict[str, dict[str, float]]:
    """Return relative errors by case, and which `properties` hold."""
    found: dict[str, dict[str, float]] = {"updates": {}, "momenta": {}, "properties": {}}
    if device == "cpu" or muon.symmetric_products_supported(torch.device(device)):
        found["products"] = products(device)
    for offset, normalize in ((0, False), (1, True)):
        plain, plain_momenta, _ = run(device, kernels=False, normalize=normalize)
        updates, momenta, stayed = run(device, kernels=True, offset=offset, normalize=normalize)
        case = f"from an offset of {offset}{', with normalized rows' * normalize}"
        found["momenta"] |= errors(case, momenta, plain_momenta)
        for step in range(STEPS):
            found["updates"] |= errors(f"{case}, step {step}", updates[step], plain[step])
        again = run(device, kernels=True, offset=offset, normalize=normalize)[0]
        found["properties"] |= {
            f"{case} a skipped step changes nothing": stayed,
            f"{case} the same steps give the same": all(map(same, updates, again)),
            f"{case} only an idle matrix of a stack is not updated": all(
                bool(matrix.any()) != (index == 1)
                for update in updates[-1]
                if update.ndim > 2
                for index, matrix in enumerate(update)
            ),
        }
    return found


def interpret() -> None:
    """Run the kernels in Triton's interpreter from now on."""
    fused_cases.interpret()
    from minimind.optim import muon_kernels

    # So that small matrices have several blocks and tiles.
    muon._BLOCK = 256
    muon_kernels._TILE, muon_kernels._DEPTH = 16, 16
    muon.kernels_supported = lambda tensors: True


def run_on_rank(rank: int, store: str) -> None:
    """Compute the relative errors of ranks that share the work, compared with one; the first prints all."""
    interpret()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found: dict[str, float] = {}
    for normalize in (False, True):
        plain, momenta, _ = run("cpu", kernels=True, normalize=normalize)
        shared, gathered, stayed = run("cpu", kernels=True, normalize=normalize, group=dist.group.WORLD)
        for step in range(STEPS):
            found |= errors(f"rows {normalize}, step {step}", shared[step], plain[step])
        found |= errors(f"rows {normalize}, momenta", gathered, momenta)
        found[f"rows {normalize}, skipped"] = 0.0 if stayed else math.inf
    # Lines that two processes write to one pipe can mix.
    ranks: list[dict[str, float]] = [{}, {}]
    dist.all_gather_object(ranks, found)
    if rank == 0:
        print(json.dumps(ranks))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    if "--shared" in sys.argv:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(run_on_rank, (f"{folder}/store",), nprocs=2)
    else:
        device = "cuda"
        if "--interpret" in sys.argv:
            interpret()
            device = "cpu"
        print(json.dumps(all_cases(device)))
