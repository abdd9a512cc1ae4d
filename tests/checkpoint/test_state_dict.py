"""Gathering a training state and putting it back: exact, and on another topology than it came from."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.amp import GradScaler

from minimind.checkpoint.files import StoredCheckpoint
from minimind.checkpoint.state_dict import gather_state_dict, load_state_dict
from minimind.checkpoint.store import CheckpointStore, Snapshot
from minimind.distributed.collectives import run_on_main_and_broadcast
from minimind.errors import CheckpointError
from support import topologies


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    topologies.forget_accelerator()
    yield
    topologies.forget_accelerator()


def saved(folder: Path, snapshot: Snapshot | None) -> StoredCheckpoint:
    assert snapshot is not None
    store = CheckpointStore(folder, 9)
    store.save(snapshot)
    store.wait()
    return store.open(folder / f"step-{snapshot.step:08d}")


def assert_same(one: StoredCheckpoint | Snapshot, other: StoredCheckpoint | Snapshot) -> None:
    """Compare every tensor bit by bit, and the values of the parameter groups."""
    for kind in ("weights", "optimizer_state"):
        left, right = (getattr(x, kind) for x in (one, other))
        left, right = (x() if callable(x) else x for x in (left, right))
        assert left.keys() == right.keys()
        assert len(left) > 0
        for name in left:
            assert left[name].dtype == right[name].dtype, name
            assert torch.equal(left[name], right[name]), name
    groups = [json.loads(json.dumps(x.trainer["param_groups"])) for x in (one, other)]
    assert groups[0] == groups[1]


def test_a_resumed_run_takes_the_very_same_steps(tmp_path: Path) -> None:
    accelerator, model, optimizer = topologies.start()
    topologies.train(accelerator, model, optimizer, 0, 3)
    optimizer.param_groups[0]["lr"] = 0.1 + 0.2  # not a short decimal
    checkpoint = saved(tmp_path, gather_state_dict(accelerator, model, optimizer, {"step": 3}))
    uninterrupted = topologies.train(accelerator, model, optimizer, 3, 8)
    wanted = gather_state_dict(accelerator, model, optimizer, {"step": 8})

    topologies.forget_accelerator()
    accelerator, model, optimizer = topologies.start(seed=9)
    extra = load_state_dict(accelerator, model, optimizer, checkpoint)
    assert extra["step"] == 3
    again = gather_state_dict(accelerator, model, optimizer, {"step": 3})
    assert again is not None
    assert_same(checkpoint, again)
    assert isinstance(optimizer.param_groups[0]["betas"], tuple)
    assert optimizer.param_groups[0]["lr_scale"] == 0.5
    assert topologies.train(accelerator, model, optimizer, 3, 8) == uninterrupted
    found = gather_state_dict(accelerator, model, optimizer, {"step": 8})
    assert found is not None
    assert wanted is not None
    assert_same(found, wanted)


def test_a_snapshot_does_not_follow_the_training(tmp_path: Path) -> None:
    accelerator, model, optimizer = topologies.start()
    topologies.train(accelerator, model, optimizer, 0, 2)
    snapshot = gather_state_dict(accelerator, model, optimizer, {"step": 2})
    checkpoint = saved(tmp_path, snapshot)
    topologies.train(accelerator, model, optimizer, 2, 4)
    assert snapshot is not None
    assert_same(checkpoint, snapshot)
    assert checkpoint.optimizer_state()["norm.weight|step"].item() == 2


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    accelerator, model, optimizer = topologies.start()
    checkpoint = saved(tmp_path, gather_state_dict(accelerator, model, optimizer, {"step": 0}))
    assert "head.weight" not in checkpoint.weights()
    assert checkpoint.trainer["tied"] == {"head.weight": "embed.weight"}
    topologies.forget_accelerator()
    accelerator, model, optimizer = topologies.start(seed=1)
    load_state_dict(accelerator, model, optimizer, checkpoint)
    assert topologies.tied(model)
    assert torch.equal(model.head.weight, checkpoint.weights()["embed.weight"])


def test_an_optimizer_that_has_not_stepped_is_restored_as_such(tmp_path: Path) -> None:
    accelerator, model, optimizer = topologies.start()
    snapshot = gather_state_dict(accelerator, model, optimizer, {"step": 0})
    checkpoint = saved(tmp_path, snapshot)
    assert checkpoint.optimizer_state() == {}
    load_state_dict(accelerator, model, optimizer, checkpoint)
    assert len(optimizer.optimizer.state) == 0


def test_names_are_those_of_the_bare_model_when_parts_are_compiled(tmp_path: Path) -> None:
    accelerator, model, optimizer = topologies.start()
    plain = gather_state_dict(accelerator, model, optimizer, {"step": 0})
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    compiled = gather_state_dict(accelerator, torch.compile(model, backend="eager"), optimizer, {"step": 0})
    assert plain is not None
    assert compiled is not None
    assert plain.weights.keys() == compiled.weights.keys()


def test_values_changed_on_purpose_are_kept(tmp_path: Path) -> None:
    accelerator, model, optimizer = topologies.start()
    checkpoint = saved(tmp_path, gather_state_dict(accelerator, model, optimizer, {"step": 0}))
    for group in optimizer.param_groups:
        group.update(weight_decay=group["weight_decay"] * 2, eps=1e-3)
    load_state_dict(accelerator, model, optimizer, checkpoint, keep_group_values={"weight_decay"})
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    assert [group["eps"] for group in optimizer.param_groups] == [1e-8, 1e-8]


def test_the_scale_of_fp16_is_restored(tmp_path: Path) -> None:
    accelerator, model, optimizer = topologies.start()
    accelerator.scaler = GradScaler("cpu", init_scale=512.0, growth_interval=7)
    checkpoint = saved(tmp_path, gather_state_dict(accelerator, model, optimizer, {"step": 0}))
    wanted = accelerator.scaler.state_dict()
    accelerator.scaler = GradScaler("cpu")
    assert accelerator.scaler.state_dict() != wanted
    load_state_dict(accelerator, model, optimizer, checkpoint)
    assert accelerator.scaler.state_dict() == wanted
    accelerator.scaler = None
    load_state_dict(accelerator, model, optimizer, checkpoint)


def test_a_checkpoint_of_another_shape_is_refused_before_anything_changes(tmp_path: Path) -> None:
    accelerator, model, optimizer = topologies.start()
    topologies.train(accelerator, model, optimizer, 0, 1)
    checkpoint = saved(tmp_path, gather_state_dict(accelerator, model, optimizer, {"step": 1}))
    _, narrow, narrow_optimizer = topologies.start(width=4)
    before = gather_state_dict(accelerator, narrow, narrow_optimizer, {"step": 0})
    with pytest.raises(CheckpointError, match=r"blocks\.0\.linear\.weight is \(6, 6\) in it and \(4, 4\)"):
        load_state_dict(accelerator, narrow, narrow_optimizer, checkpoint)
    after = gather_state_dict(accelerator, narrow, narrow_optimizer, {"step": 0})
    assert before is not None
    assert after is not None
    assert all(torch.equal(before.weights[name], after.weights[name]) for name in before.weights)


def test_missing_unknown_and_untied_parameters_are_named(tmp_path: Path) -> None:
    accelerator, model, optimizer = topologies.start()
    checkpoint = saved(tmp_path, gather_state_dict(accelerator, model, optimizer, {"step": 0}))
    for options, message in (
        ({"blocks": 3}, r"it lacks blocks\.2\.linear\.weight"),
        ({"blocks": 1}, r"it has blocks\.1\.linear\.weight, which the model does not have"),
        ({"tie": False}, r"it lacks head\.weight"),
    ):
        _, other, other_optimizer = topologies.start(**options)
        with pytest.raises(CheckpointError, match=message):
            load_state_dict(accelerator, other, other_optimizer, checkpoint)
    del optimizer.param_groups[1]
    with pytest.raises(CheckpointError, match="other groups of parameters"):
        load_state_dict(accelerator, model, optimizer, checkpoint)


def test_extra_may_not_take_the_names_collect_uses() -> None:
    accelerator, model, optimizer = topologies.start()
    with pytest.raises(ValueError, match="scaler"):
        gather_state_dict(accelerator, model, optimizer, {"step": 0, "scaler": None})


def test_run_on_main_and_broadcast_returns_or_raises_what_the_work_did() -> None:
    accelerator, _, _ = topologies.start()
    assert run_on_main_and_broadcast(accelerator, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        run_on_main_and_broadcast(accelerator, lambda: 1 // 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "optimizer_name"), [("ddp", "adamw"), ("fsdp2", "adamw"), ("fsdp2", "muon")]
)
def test_another_topology_loads_the_same_state_and_continues_alike(
    tmp_path: Path, topology: str, optimizer_name: str
) -> None:
    muon = optimizer_name == "muon"
    accelerator, model, optimizer = topologies.start(muon=muon)
    topologies.train(accelerator, model, optimizer, 0, 3)
    plain = saved(tmp_path / "plain", gather_state_dict(accelerator, model, optimizer, {"step": 3}))
    losses = topologies.train(accelerator, model, optimizer, 3, 7)

    run_processes(tmp_path, topology, optimizer_name)
    results = [json.loads((tmp_path / f"{topology}-{rank}.json").read_text()) for rank in (0, 1)]
    # What two processes loaded and saved again is the same to the bit.
    assert_same(plain, CheckpointStore.open(tmp_path / topology / "step-00000003"))
    for result in results:
        assert result["losses"] == pytest.approx(losses[:2], rel=1e-6)
        assert result["tied"]
        # Every process refuses, and none is left waiting.
        assert "does not fit this run" in result["refusals"][0]
        assert "there is no checkpoint" in result["refusals"][1]
        assert "division" in result["refusals"][2]

    # And back to one process.
    topologies.forget_accelerator()
    accelerator, model, optimizer = topologies.start(seed=8, muon=muon)
    load_state_dict(accelerator, model, optimizer, CheckpointStore.open(tmp_path / topology))
    assert topologies.tied(model)
    assert topologies.train(accelerator, model, optimizer, 5, 7) == pytest.approx(losses[2:], rel=1e-6)


def run_processes(folder: Path, *args: str, count: int = 2) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in map(str, range(count)):
        environment = os.environ | {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "ACCELERATE_USE_CPU": "true",
            "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        command = [sys.executable, topologies.__file__, str(folder), *args]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output.decode()
