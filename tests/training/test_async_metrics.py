"""Non-blocking copies of scalars from a device to the host."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from minimind.training.async_metrics import AsyncScalars


def read(readback: AsyncScalars, everything: bool = False) -> list:
    return [(arrival.tag, arrival.values) for arrival in readback.ready(everything=everything)]


def test_on_a_cpu_values_arrive_at_once_in_order_with_their_tags():
    readback: AsyncScalars[str] = AsyncScalars(torch.device("cpu"))
    readback.enqueue("a", torch.tensor([1.5, math.inf]))
    readback.enqueue("b", torch.tensor(2))
    assert read(readback) == [("a", [1.5, math.inf]), ("b", [2])]
    assert read(readback) == []


def test_values_are_those_of_the_moment_of_putting():
    readback: AsyncScalars[int] = AsyncScalars(torch.device("cpu"))
    values = torch.zeros(2, requires_grad=True)
    readback.enqueue(1, values)
    with torch.no_grad():
        values += 5
    assert read(readback) == [(1, [0.0, 0.0])]


def test_shapes_are_flattened():
    readback: AsyncScalars[int] = AsyncScalars(torch.device("cpu"))
    readback.enqueue(1, torch.arange(4.0).view(2, 2))
    assert read(readback) == [(1, [0.0, 1.0, 2.0, 3.0])]


def test_on_a_cpu_values_are_made_when_they_are_put():
    now = [5.0]
    readback: AsyncScalars[int] = AsyncScalars(torch.device("cpu"), clock=lambda: now[0])
    readback.enqueue(1, torch.zeros(1))
    now[0] = 9.0
    assert [arrival.time for arrival in readback.ready()] == [5.0]


def needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")


@pytest.mark.gpu
def test_on_a_gpu_values_arrive_a_fixed_number_of_puts_later():
    needs_cuda()
    readback: AsyncScalars[int] = AsyncScalars(torch.device("cuda"), delay=2)
    seen = []
    for step in range(5):
        readback.enqueue(step, torch.full((2,), float(step), device="cuda"))
        seen.append([tag for tag, _ in read(readback)])
    assert seen == [[], [], [0], [1], [2]]
    assert read(readback, everything=True) == [(3, [3.0, 3.0]), (4, [4.0, 4.0])]


@pytest.mark.gpu
def test_putting_does_not_wait_for_a_busy_gpu():
    needs_cuda()
    readback: AsyncScalars[int] = AsyncScalars(torch.device("cuda"))
    values = torch.ones(2, device="cuda")
    readback.enqueue(0, values)  # the first pinned allocation may wait
    torch.cuda.synchronize()
    torch.cuda._sleep(500_000_000)
    values += 1
    busy = torch.cuda.Event()
    busy.record()
    readback.enqueue(1, values)
    assert not busy.query()
    assert read(readback, everything=True) == [(0, [1.0, 1.0]), (1, [2.0, 2.0])]


@pytest.mark.gpu
def test_on_a_gpu_times_are_those_of_the_device_not_of_the_reading():
    needs_cuda()
    readback: AsyncScalars[int] = AsyncScalars(torch.device("cuda"), delay=5)
    work = torch.ones(1, device="cuda")
    for step in range(4):
        torch.cuda._sleep(50_000_000)  # some 30 ms
        readback.enqueue(step, work)
    torch.cuda.synchronize()
    times = [arrival.time for arrival in readback.ready(everything=True)]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert all(0.01 < gap < 0.2 for gap in gaps)
