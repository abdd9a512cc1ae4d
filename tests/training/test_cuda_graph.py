"""CUDA graphs of a step: gradients, losses, accumulation, other shapes, updates, where they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minimind.data.loader import MicroBatch
from minimind.training import cuda_graph
from minimind.training.cuda_graph import (
    MOST_CAPTURES,
    WARMUP,
    ForwardBackwardGraph,
    StepGraphs,
    UpdateGraph,
    unsupported_reason,
)


class RecordedGraph:
    """Stands for torch.cuda.CUDAGraph on a CPU: computes again what was captured, into the same tensors."""

    def __init__(self) -> None:
        self.compute: Callable[[], None] = lambda: None
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.compute()

    def pool(self) -> str:
        return "pool"

    def reset(self) -> None:
        self.was_reset = True


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
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "Event", lambda **_: SimpleNamespace(record=lambda: None))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
        monkeypatch.setattr(torch.cuda, "graph", self.captures)
        self.stream = "main"
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.stream)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "stream", stream))
        monkeypatch.setattr(cuda_graph, "capture_stream", lambda device: "capture")
        self._last: tuple[MicroBatch, Any, Tensor] | None = None

    def passes(self, batch: MicroBatch, scale: float | Tensor, balance: Any, marks: Any) -> Tensor:
        self.eager += 1
        weight, bias, _ = self.parameters
        loss = ((weight[batch.input_ids] + bias) ** 2 * batch.shift_labels[..., None]).sum()
        if marks is not None:
            marks.mark("forward")
        (loss * scale).backward()
        self._last = batch, scale, loss.detach()
        return loss.detach()

    @contextmanager
    def captures(
        self, graph: RecordedGraph, pool: Any, stream: str, capture_error_mode: str
    ) -> Iterator[None]:
        self.stream = stream
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
            loss.copy_(self.passes(batch, scale, None, None))
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
    losses = [float(model.passes(batch(seed), scale, None, None)) for seed in seeds]
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
    model.passes(other, 1.0, None, None)
    model.passes(batch(8), 1.0, None, None)
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
    assert model.stream == "main"
    found = model.take_gradients()
    _, wanted = by_hand(model, list(range(WARMUP + 3)), 1.0)
    for a, b in zip(found[:2], wanted[:2], strict=True):
        torch.testing.assert_close(a, b)


class Updates:
    """Adds the sum and the limit to a weight; what was captured is computed again by its replay."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model = Model(monkeypatch)
        self.forward_backward = self.model.graph()
        self.weight = 0.0
        self.addresses: tuple[int, ...] = (1, 2)
        self.eager = 0
        self.prepared = 0
        self.pools: list[Any] = []
        self.recorded: list[RecordedGraph] = []
        self.fails = False
        monkeypatch.setattr(torch.cuda, "graph", self.captures)
        self._given: tuple[Tensor, float | Tensor, Tensor] | None = None
        self.graph = UpdateGraph(
            self.update, self.prepare, self.forward_backward, note=self.model.notes.append
        )

    def prepare(self) -> tuple[int, ...]:
        self.prepared += 1
        return self.addresses

    def update(self, sums: Tensor, limit: float | Tensor) -> Tensor:
        self.eager += 1
        self.weight += float(sums[0]) + float(limit)
        values = torch.stack((sums[0], torch.tensor(self.weight)))
        self._given = sums, limit, values
        return values

    @contextmanager
    def captures(
        self, graph: RecordedGraph, pool: Any, stream: str, capture_error_mode: str
    ) -> Iterator[None]:
        if pool is None:
            with self.model.captures(graph, pool, stream, capture_error_mode):
                yield
            return
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        before = self.weight
        yield
        # A capture computes nothing.
        self.weight, self.eager = before, self.eager - 1
        assert self._given is not None
        sums, limit, values = self._given

        def compute() -> None:
            values.copy_(self.update(sums, limit))
            self.eager -= 1

        graph.compute = compute
        self.pools.append(pool)
        self.recorded.append(graph)

    def capture_micro_batches(self) -> None:
        for number in range(WARMUP + 1):
            self.forward_backward(batch(number), 1.0)

    def step(self, number: float) -> list[float]:
        return self.graph(torch.tensor([number, 0.0, 0.0]), number / 10).tolist()


def test_updates_are_captured_after_micro_batches_and_replayed_with_the_values_of_their_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    updates = Updates(monkeypatch)
    for number in range(3):
        updates.step(number)
    assert (updates.eager, updates.graph.captured) == (3, False)
    updates.capture_micro_batches()
    kept = [updates.step(number) for number in range(3, 6)]
    assert (updates.eager, updates.graph.captured, updates.pools) == (3, True, ["pool"])
    assert updates.weight == pytest.approx(1.1 * sum(range(6)))
    # A later replay does not change what an earlier one returned.
    assert [values[0] for values in kept] == [3, 4, 5]
    assert kept[1][1] == pytest.approx(1.1 * sum(range(5)))
    tensor = updates.graph(torch.tensor([6.0, 0.0, 0.0]), 0.6)
    updates.step(7)
    assert tensor[0] == 6


def test_an_update_of_other_addresses_runs_eagerly_and_is_captured_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    updates = Updates(monkeypatch)
    updates.capture_micro_batches()
    for number in range(3 * MOST_CAPTURES):
        if number % 3 == 0:
            updates.addresses = (number, 2)
        updates.step(1)
    assert len(updates.recorded) == MOST_CAPTURES
    assert updates.eager == MOST_CAPTURES
    for _ in range(3):
        updates.addresses = (-1,)
        updates.step(1)
    assert len(updates.recorded) == MOST_CAPTURES
    assert updates.weight == pytest.approx(1.1 * (3 * MOST_CAPTURES + 3))


def test_an_update_without_addresses_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = Updates(monkeypatch)
    updates.capture_micro_batches()
    updates.addresses = ()
    for _ in range(4):
        updates.step(1)
    assert (updates.eager, updates.recorded) == (4, [])


def test_an_update_is_not_prepared_where_no_micro_batch_runs_as_a_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    updates = Updates(monkeypatch)
    updates.forward_backward.release()
    for _ in range(3):
        updates.step(1)
    assert (updates.eager, updates.prepared) == (3, 0)


def test_where_capturing_the_update_fails_one_warning_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = Updates(monkeypatch)
    updates.capture_micro_batches()
    updates.fails = True
    for _ in range(4):
        updates.step(1)
    assert updates.eager == 4
    assert updates.weight == pytest.approx(4.4)
    assert updates.model.notes == [
        "the update is not a CUDA graph: operation not permitted when stream is capturing"
    ]


class Balance:
    """Stands for ExpertBalance: keeps the sums of the micro-batches."""

    def __init__(self) -> None:
        self.added: list[Tensor] = []

    def empty(self) -> Balance:
        return Balance()

    def add(self, sums: Tensor) -> None:
        self.added.append(sums)

    def sums(self) -> tuple[Tensor, ...]:
        return (self.added[-1],)


def test_the_choice_of_experts_is_recorded_for_each_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(monkeypatch)
    plain = model.passes

    def passes(batch: MicroBatch, scale: float | Tensor, balance: Any, marks: Any) -> Tensor:
        if balance is not None:
            balance.add(batch.input_ids.sum().reshape(1))
        return plain(batch, scale, balance, marks)

    model.passes = passes  # type: ignore[method-assign]
    graph = model.graph()
    balance: Any = Balance()
    for number in range(WARMUP + 2):
        graph(batch(number), 1.0, balance)
    assert len(balance.added) == WARMUP + 2
    eager = [float(batch(number).input_ids.sum()) for number in range(WARMUP)]
    assert [float(sums) for sums in balance.added[:WARMUP]] == eager
    # The memory of the graph is overwritten by the next replay.
    assert balance.added[-1] is not balance.added[-2]
    assert balance.added[-1].data_ptr() != balance.added[-2].data_ptr()


@pytest.mark.parametrize("agreed", [[True, True], [False], [True, False]])
def test_all_ranks_run_a_graph_or_none_does(monkeypatch: pytest.MonkeyPatch, agreed: list[bool]) -> None:
    model = Model(monkeypatch)
    answers, asked = iter(agreed), []

    def agree(holds: bool) -> bool:
        asked.append(holds)
        return next(answers)

    graph = model.graph(agree=agree)
    for number in range(WARMUP + 2):
        graph(batch(number), 1.0)
    assert asked == [True] * len(agreed)
    assert graph.captured == all(agreed)
    expected = ["CUDA graphs are not used: another rank could not capture"] * (agreed == [True, False])
    assert model.notes == expected
    found = model.take_gradients()
    _, wanted = by_hand(model, list(range(WARMUP + 2)), 1.0)
    for a, b in zip(found[:2], wanted[:2], strict=True):
        torch.testing.assert_close(a, b)


def test_a_released_graph_is_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = Updates(monkeypatch)
    updates.capture_micro_batches()
    for _ in range(3):
        updates.step(1)
    graphs = StepGraphs(updates.forward_backward, updates.graph)
    eager = updates.model.eager, updates.eager
    graphs.release()
    updates.forward_backward(batch(0), 1.0)
    updates.step(1)
    assert (updates.model.eager, updates.eager) == (eager[0] + 1, eager[1] + 1)
    assert all(graph.was_reset for graph in (*updates.recorded, *updates.model.recorded))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"device": "cpu"}, "CUDA graphs need a CUDA GPU"),
        ({"sharded": True}, "CUDA graphs do not support FSDP2"),
        ({"precision": "fp16"}, "CUDA graphs need bf16 and fused kernels"),
        ({"fused": False}, "CUDA graphs need bf16 and fused kernels"),
        ({"compiled": False}, None),
        ({"packing": False}, None),
        (
            {"compiled": False, "packing": False},
            "CUDA graphs need --packing where the model is not compiled",
        ),
        ({"use_moe": True}, None),
        ({"use_moe": True, "compiled": False}, "CUDA graphs of experts need --compile"),
        (
            {"use_moe": True, "grouped": False},
            "CUDA graphs of experts need compute capability 9.0, and widths that are multiples of 8",
        ),
    ],
)
def test_what_hinders_a_graph_is_named(change: dict[str, Any], reason: str | None) -> None:
    options = {
        "device": "cuda",
        "sharded": False,
        "precision": "bf16",
        "fused": True,
        "compiled": True,
        "packing": True,
        "use_moe": False,
        "grouped": True,
    } | change
    device = torch.device(options.pop("device"))
    assert unsupported_reason(device, **options) == reason
