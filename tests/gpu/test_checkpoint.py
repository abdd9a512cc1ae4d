"""State dicts on a CUDA GPU: loading on another device, and pinned memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint import test_state_dict

from minimind.checkpoint.state_dict import (
    SMALLEST_PINNED,
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
    losses = topologies.train(accelerator, model, optimizer, 3, 6)
    assert snapshot is not None
    tensors = [*snapshot.weights.values(), *snapshot.optimizer_state.values()]
    assert [tensor.is_pinned() for tensor in tensors] == [one.nbytes >= SMALLEST_PINNED for one in tensors]
    checkpoint = test_state_dict.saved(tmp_path, snapshot)
    for cpu in (False, True):
        topologies.forget_accelerator()
        accelerator, model, optimizer = topologies.start(cpu=cpu, seed=4)
        load_state_dict(accelerator, model, optimizer, checkpoint)
        again = gather_state_dict(accelerator, model, optimizer, {"step": 3})
        assert again is not None
        for kind in ("weights", "optimizer_state"):
            for name, tensor in getattr(checkpoint, kind)().items():
                assert torch.equal(getattr(again, kind)[name], tensor), name
        assert topologies.train(accelerator, model, optimizer, 3, 6) == pytest.approx(losses, rel=1e-4)
        checkpoint = test_state_dict.saved(tmp_path / str(cpu), again)


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
