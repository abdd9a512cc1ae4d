"""Non-blocking copies of scalars from a device to the host."""

from __future__ import annotations

import math

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
