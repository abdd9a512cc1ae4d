"""Forward and backward as a CUDA graph: gradients, losses, accumulation, other shapes, where it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minimind.data.loader import MicroBatch
from minimind.training.cuda_graph import WARMUP, ForwardBackwardGraph, unsupported_reason


class RecordedGraph:
    """Stands for torch.cuda.CUDAGraph on a CPU: computes again what was captured, into the same tensors."""

    def __init__(self) -> None:
        self.compute: Callable[[], None] = lambda: None
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.compute()


class Model:
    """Two parameters, a summed loss of the sequences, and what was asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, memory: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parameters = [
            nn.Parameter(torch.rand(5, 3, generator=generator)),
            nn.Parameter(torch.rand(3, generator=generator)),
            nn.Parameter(torch.rand(2, generator=generator)),  # has no part in the loss
        ]
        self.eager = 0
        self.fails = False
        self.notes: list[str] = []
        self.recorded: list[RecordedGraph] = []
        properties = SimpleNamespace(total_memory=1000)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1000 * memory)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "Event", lambda **_: SimpleNamespace(record=lambda: None))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
        monkeypatch.setattr(torch.cuda, "graph", self.captures)
        self._last: tuple[MicroBatch, Any, Tensor] | None = None

    def passes(self, batch: MicroBatch, scale: float | Tensor, marks: Any) -> Tensor:
        self.eager += 1
        weight, bias, _ = self.parameters
        loss = ((weight[batch.input_ids] + bias) ** 2 * batch.shift_labels[..., None]).sum()
        if marks is not None:
            marks.mark("forward")
        (loss * scale).backward()
        self._last = batch, scale, loss.detach()
        return loss.detach()

    @contextmanager
    def captures(self, graph: RecordedGraph, capture_error_mode: str) -> Iterator[None]:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        yield
        assert self._last is not None
        batch, scale, loss = self._last
        used = self.parameters[:2]
        own = [p.grad for p in used]

        def compute() -> None:
            kept = [p.grad for p in used]
            for p in used:
                p.grad = None
            loss.copy_(self.passes(batch, scale, None))
            for p, mine, before in zip(used, own, kept, strict=True):
                assert mine is not None
                assert p.grad is not None
                mine.copy_(p.grad)
                p.grad = before
            self.eager -= 1

        graph.compute = compute
        self.recorded.append(graph)

    def graph(self, **options: Any) -> ForwardBackwardGraph:
        return ForwardBackwardGraph(self.passes, self.parameters, note=self.notes.append, **options)

    def take_gradients(self) -> list[Tensor | None]:
        """Return copies, and leave none, as an optimizer does."""
        found = [None if p.grad is None else p.grad.clone() for p in self.parameters]
        for p in self.parameters:
            p.grad = None
        return found


def batch(seed: int, sequences: int = 2) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(0, 5, (sequences, 4), generator=generator) for _ in range(2))
    return MicroBatch(ids, labels, None, None)


def by_hand(model: Model, seeds: list[int], scale: float) -> tuple[list[float], list[Tensor | None]]:
    losses = [float(model.passes(batch(seed), scale, None)) for seed in seeds]
    return losses, model.take_gradients()


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_losses_and_gradients_equal_those_without_a_graph(
    monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    model = Model(monkeypatch)
    graph = model.graph()
    for step in range(4):
        seeds = [10 * step + number for number in range(accumulation)]
        scale = 0.5 + step
        expected, gradients = by_hand(model, seeds, scale)
        # Added up as a step does it: the next call may write over what this one returned.
        losses = [float(graph(batch(seed), scale)) for seed in seeds]
        assert losses == expected
        for found, wanted in zip(model.take_gradients(), gradients, strict=True):
            torch.testing.assert_close(found, wanted)
    assert model.recorded[0].replays == 4 * accumulation - WARMUP


def test_the_graph_begins_behind_the_warm_up_and_its_capture_adds_no_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Model(monkeypatch)
    graph = model.graph()
    for number in range(WARMUP):
        graph(batch(number), 1.0)
        assert not graph.captured
    graph(batch(WARMUP), 1.0)
    assert graph.captured
    found = model.take_gradients()
    _, wanted = by_hand(model, list(range(WARMUP + 1)), 1.0)
    assert found[2] is None
    for a, b in zip(found[:2], wanted[:2], strict=True):
        torch.testing.assert_close(a, b)


def test_sequences_of_another_shape_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(monkeypatch)
    graph = model.graph()
    for number in range(WARMUP + 1):
        graph(batch(number), 1.0)
    model.take_gradients()
    replays, eager = model.recorded[0].replays, model.eager
    other = batch(7, sequences=3)
    graph(other, 1.0)
    assert (model.recorded[0].replays, model.eager) == (replays, eager + 1)
    # And go together with those of the graph in one step.
    graph(batch(8), 1.0)
    found = model.take_gradients()
    model.passes(other, 1.0, None)
    model.passes(batch(8), 1.0, None)
    for a, b in zip(found[:2], model.take_gradients()[:2], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("memory", "always", "used"), [(0.59, False, True), (0.61, False, False), (0.61, True, True)]
)
def test_a_run_that_fills_the_gpu_has_no_graph_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, memory: float, always: bool, used: bool
) -> None:
    model = Model(monkeypatch, memory=memory)
    graph = model.graph(always=always)
    for number in range(WARMUP + 2):
        graph(batch(number), 1.0)
    assert graph.captured == used
    assert model.notes == []


def test_where_capturing_fails_one_warning_is_given_and_training_continues(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Model(monkeypatch)
    model.fails = True
    graph = model.graph()
    for number in range(WARMUP + 3):
        graph(batch(number), 1.0)
    assert model.notes == ["CUDA graphs are not used: operation not permitted when stream is capturing"]
    found = model.take_gradients()
    _, wanted = by_hand(model, list(range(WARMUP + 3)), 1.0)
    for a, b in zip(found[:2], wanted[:2], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"device": "cpu"}, "CUDA graphs need a CUDA GPU"),
        ({"num_processes": 2}, "CUDA graphs need a single process"),
        ({"precision": "fp16"}, "CUDA graphs need bf16 and fused kernels"),
        ({"fused": False}, "CUDA graphs need bf16 and fused kernels"),
        ({"compiled": False}, None),
        ({"packing": False}, None),
        (
            {"compiled": False, "packing": False},
            "CUDA graphs need --packing where the model is not compiled",
        ),
        ({"use_moe": True}, "CUDA graphs do not support experts"),
    ],
)
def test_what_hinders_a_graph_is_named(change: dict[str, Any], reason: str | None) -> None:
    options = {
        "device": "cuda",
        "num_processes": 1,
        "precision": "bf16",
        "fused": True,
        "compiled": True,
        "packing": True,
        "use_moe": False,
    } | change
    device = torch.device(options.pop("device"))
    assert unsupported_reason(device, **options) == reason
