"""Newton-Schulz on Gram matrices against the standard iteration: time, and error against float64.

    python benchmarks/orthogonalize.py
    python benchmarks/orthogonalize.py --shapes 16x768x768 8x768x2432

A shape is matrices x rows x columns. Times are the medians of CUDA graphs on a GPU, which has no gaps between
small kernels then, else of calls. The kernel column needs a GPU of compute capability 9.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from minimind.optim.kernel_arguments import symmetric_products_supported
from minimind.optim.orthogonalize import newton_schulz
from minimind.training.step_timer import StepTimer

SHAPES = (
    "20x1792x1792",
    "7x1792x4864",
    "41x896x1792",
    "56x1024x1024",
    "21x3072x1024",
    "16x768x768",
    "16x2432x768",
)
ROUNDS = 20


def standard(x: Tensor) -> Tensor:
    """Return five steps of a·x + b·x·xᵀ·x + c·x·xᵀ·x·xᵀ·x (Jordan et al. 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = x.shape[-2] <= x.shape[-1]
    for _ in range(5):
        square = x @ x.mT if wide else x.mT @ x
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        x = polynomial @ x if wide else x @ polynomial
    return x


def milliseconds(function: Callable[[], Tensor], device: torch.device) -> float:
    """Return the median time of a call, captured in a CUDA graph on a GPU."""
    function()
    run: Callable[[], object] = function
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            function()
        run = graph.replay
    timer = StepTimer(device)
    for _ in range(ROUNDS):
        timer.start()
        run()
        timer.mark("call")
    return 1e3 * statistics.median(timer.seconds()["call"])


def with_spectrum(values: Tensor, columns: int) -> Tensor:
    """Return a (1, R, C) float64 matrix of norm 1 with singular values in these proportions, (R,)."""
    rows = len(values)
    u, v = (
        torch.linalg.qr(torch.randn(n, rows, dtype=torch.float64, device=values.device))[0]
        for n in (rows, columns)
    )
    matrix = u * values.double() @ v.mT
    return (matrix / matrix.norm())[None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernel = symmetric_products_supported(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {datetime.date.today()}; milliseconds")
    ways: dict[str, tuple[torch.dtype, Callable[[Tensor], Tensor]]] = {
        "standard, bf16": (torch.bfloat16, standard),
        "standard, fp16": (torch.float16, standard),
        "Gram, fp16": (torch.float16, newton_schulz),
    }
    if kernel:
        ways["Gram, fp16, kernel"] = (torch.float16, lambda x: newton_schulz(x, kernels=True))
    print(f"| matrices | {' | '.join(ways)} |\n|---|{'---:|' * len(ways)}", flush=True)
    torch.manual_seed(0)
    for shape in options.shapes:
        x = torch.randn(*map(int, shape.split("x")), device=device)
        x /= x.norm(dim=(-2, -1), keepdim=True)
        inputs = {dtype: x.to(dtype) for dtype, _ in ways.values()}
        times = [milliseconds(lambda f=f, x=inputs[dtype]: f(x), device) for dtype, f in ways.values()]
        print(f"| {shape} | {' | '.join(f'{time:.3f}' for time in times)} |", flush=True)

    rows, columns = sorted(map(int, options.shapes[0].split("x")[1:]))
    place = torch.arange(1, rows + 1, device=device)
    spectra = {
        "over two decades": torch.logspace(0, -2, rows, device=device),
        "over four decades": torch.logspace(0, -4, rows, device=device),
        "1/k": 1 / place,
        "eight, equal": (place <= 8).float(),
    }
    print("\nRelative error against float64")
    print(f"| {rows} x {columns} | {' | '.join(ways)} |\n|---|{'---:|' * len(ways)}")
    for spectrum, values in spectra.items():
        matrix = with_spectrum(values, columns)
        exact = standard(matrix)
        errors = [(f(matrix.to(dtype)).double() - exact).norm() / exact.norm() for dtype, f in ways.values()]
        print(f"| {spectrum} | {' | '.join(f'{error:.4f}' for error in errors)} |", flush=True)


if __name__ == "__main__":
    main()
