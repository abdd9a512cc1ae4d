"""State dicts on a CUDA GPU: loading on another device, and pinned memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint import test_state_dict

from minimind.checkpoint.state_dict import (
    gather_state_dict,
    load_state_dict,
    reserve_host_memory,
)
from minimind.checkpoint.store import CheckpointStore
from support import topologies

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_a_gpu_and_a_cpu_load_what_the_other_saved(tmp_path: Path) -> None:
    accelerator, model, optimizer = topologies.start(cpu=False)
    reserve_host_memory(accelerator, model, optimizer)
    topologies.train(accelerator, model, optimizer, 0, 3)
    snapshot = gather_state_dict(accelerator, model, optimizer, {"step": 3})
    # Training goes on while the copies are on their way.
    losses = topologies.train(accelerator, model, optimizer, 3, 6)
    assert snapshot is not None
    tensors = [*snapshot.weights.values(), *snapshot.optimizer_state.values()]
    assert all(tensor.is_pinned() for tensor in tensors)
    checkpoint = test_state_dict.saved(tmp_path, snapshot)
    for cpu in (False, True):
        topologies.forget_accelerator()
        accelerator, model, optimizer = topologies.start(cpu=cpu, seed=4)
        load_state_dict(accelerator, model, optimizer, checkpoint)
        again = gather_state_dict(accelerator, model, optimizer, {"step": 3})
        assert again is not None
        again.wait()
        for kind in ("weights", "optimizer_state"):
            for name, tensor in getattr(checkpoint, kind)().items():
                assert torch.equal(getattr(again, kind)[name], tensor), name
        assert topologies.train(accelerator, model, optimizer, 3, 6) == pytest.approx(losses, rel=1e-4)
        checkpoint = test_state_dict.saved(tmp_path / str(cpu), again)


@pytest.mark.parametrize("room", [True, False])
def test_a_snapshot_is_of_the_step_at_which_it_was_taken(
    monkeypatch: pytest.MonkeyPatch, *, room: bool
) -> None:
    monkeypatch.setattr("minimind.checkpoint.state_dict.STAGED_SHARE", 0.5 if room else 0.0)
    accelerator, model, optimizer = topologies.start(cpu=False)
    topologies.train(accelerator, model, optimizer, 0, 2)
    wanted = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    # As much work before and after the copies as a large model has.
    busy = torch.randn(8192, 8192, device=accelerator.device)
    for _ in range(20):
        busy = (busy @ busy).clamp(-1, 1)
    allocated = torch.cuda.memory_allocated()
    snapshot = gather_state_dict(accelerator, model, optimizer, {"step": 2})
    assert snapshot is not None
    assert (torch.cuda.memory_allocated() > allocated) == room
    topologies.train(accelerator, model, optimizer, 2, 6)
    snapshot.wait()
    for name, value in snapshot.weights.items():
        assert torch.equal(value, wanted[name]), name
    assert any(not torch.equal(value.cpu(), wanted[name]) for name, value in model.state_dict().items())


def test_the_first_save_pins_nothing_though_a_graph_was_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minimind.checkpoint.state_dict.SMALLEST_PINNED", 64)
    accelerator, model, optimizer = topologies.start(cpu=False)
    reserved = reserve_host_memory(accelerator, model, optimizer)
    topologies.train(accelerator, model, optimizer, 0, 1)
    value = torch.zeros(8, device=accelerator.device)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        value.add_(1)
    addresses = {tensor.data_ptr() for tensor in reserved}
    reserved.clear()
    snapshot = gather_state_dict(accelerator, model, optimizer, {"step": 1})
    assert snapshot is not None
    large = [tensor for tensor in snapshot.weights.values() if tensor.nbytes >= 64]
    assert {tensor.data_ptr() for tensor in large} <= addresses


def test_pinned_memory_is_used_again_by_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minimind.checkpoint.state_dict.SMALLEST_PINNED", 0)
    accelerator, model, optimizer = topologies.start(cpu=False)
    topologies.train(accelerator, model, optimizer, 0, 1)
    store = CheckpointStore(tmp_path, 1)
    addresses = []
    for step in range(3):
        store.wait_until_written()
        snapshot = gather_state_dict(accelerator, model, optimizer, {"step": step})
        assert snapshot is not None
        tensors = [*snapshot.weights.values(), *snapshot.optimizer_state.values()]
        addresses.append({tensor.data_ptr() for tensor in tensors})
        store.save(snapshot)
        del snapshot, tensors
    store.wait()
    assert addresses[0] == addresses[1] == addresses[2]
