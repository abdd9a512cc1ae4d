"""Writing, verifying, rotating and surviving: the store against what a disk and a kernel can do to it."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file

from minimind.checkpoint import store as checkpoint_module
from minimind.checkpoint.files import StoredCheckpoint
from minimind.checkpoint.store import CheckpointStore, Snapshot
from minimind.errors import CheckpointError
from minimind.io import atomic
from minimind.io.atomic import write_file
from minimind.io.safetensors import write_tensors

FILES = ("model.safetensors", "optimizer.safetensors", "trainer.json", "manifest.json")


def snapshot(step: int, size: int = 300) -> Snapshot:
    """A state whose every number follows from the step."""
    generator = torch.Generator().manual_seed(step)
    weights = {"a.weight": torch.randn(size, 3, generator=generator), "b": torch.full((2,), float(step))}
    optimizer_state = {
        "a.weight|exp_avg": torch.randn(size, 3, generator=generator),
        "a.weight|step": torch.tensor(float(step)),
    }
    return Snapshot(step, weights, optimizer_state, {"step": step, "tokens": step * 1000, "lr": step / 3})


def assert_holds(stored: StoredCheckpoint, step: int) -> None:
    expected = snapshot(step)
    assert stored.step == step
    assert stored.trainer == expected.trainer
    for found, wanted in (
        (stored.weights(), expected.weights),
        (stored.optimizer_state(), expected.optimizer_state),
    ):
        assert found.keys() == wanted.keys()
        assert all(found[name].dtype == wanted[name].dtype for name in wanted)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def filled(folder: Path, *steps: int, keep: int = 10, keep_every: int | None = None) -> CheckpointStore:
    store = CheckpointStore(folder, keep, keep_every=keep_every)
    for step in steps:
        store.save(snapshot(step))
    store.wait()
    return store


def steps_of(store: CheckpointStore) -> list[int]:
    return [entry.step for entry in store.entries()]


def hidden(folder: Path) -> list[str]:
    return [child.name for child in folder.iterdir() if child.name.startswith(".")]


# What is saved is what is loaded.


def test_round_trip_is_exact(tmp_path: Path) -> None:
    store = filled(tmp_path / "run" / "checkpoints", 7)
    latest = store.latest()
    assert latest is not None
    assert_holds(latest, 7)
    assert sorted(child.name for child in latest.path.iterdir()) == sorted(FILES)
    assert latest.path.name == "step-00000007"
    assert hidden(store.folder) == []


def test_what_must_come_first_is_done_before_a_checkpoint_is_there(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    seen: list[tuple[str, int]] = []
    store.save(
        snapshot(7),
        first=lambda: seen.append((threading.current_thread().name, len(list(tmp_path.iterdir())))),
    )
    store.wait()
    assert [count for _, count in seen] == [0]
    assert seen[0][0].startswith("checkpoint")
    assert steps_of(store) == [7]


DTYPES = st.sampled_from(
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)


@settings(max_examples=30)
@given(
    st.dictionaries(
        st.text(st.characters(blacklist_categories=["Cs"]), min_size=1).filter(lambda s: s != "__metadata__"),
        st.tuples(DTYPES, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)),
        max_size=6,
    )
)
def test_tensor_files_read_back_by_the_safetensors_library(
    tmp_path_factory: pytest.TempPathFactory, layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]
) -> None:
    file = tmp_path_factory.mktemp("tensors") / "x.safetensors"
    tensors = {name: (torch.randn(shape) * 9).to(dtype) for name, (dtype, shape) in layout.items()}
    write_tensors(file, tensors)
    found = load_file(file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_tensors_lie_at_multiples_of_their_item_size(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    write_tensors(file, {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(2, dtype=torch.float64)})
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    start = 8 + length + json.loads(data[8 : 8 + length])["b"]["data_offsets"][0]
    assert start % 8 == 0


def test_what_the_caller_changes_after_save_is_not_saved(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    trainer = {"step": 1, "trackers": {"id": "first"}}
    store.save(Snapshot(1, {}, {}, trainer))
    trainer["trackers"]["id"] = "second"  # type: ignore[index]
    store.wait()
    assert store.open(tmp_path).trainer["trackers"]["id"] == "first"


def test_a_checkpoint_opens_by_its_own_its_run_and_its_checkpoints_folder(tmp_path: Path) -> None:
    store = filled(tmp_path / "checkpoints", 1, 2)
    assert_holds(store.open(tmp_path / "checkpoints" / "step-00000001"), 1)
    assert_holds(store.open(tmp_path), 2)
    assert_holds(store.open(tmp_path / "checkpoints"), 2)
    moved = (tmp_path / "checkpoints" / "step-00000001").rename(tmp_path / "favourite")
    assert_holds(store.open(moved), 1)


@pytest.mark.parametrize("missing", ["nowhere", "nowhere/step-00000004"])
def test_opening_nothing_says_so(tmp_path: Path, missing: str) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        CheckpointStore.open(tmp_path / missing)


# Damage is found and named.


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "missing", "extended"])
def test_damage_is_named_and_the_previous_checkpoint_used(tmp_path: Path, name: str, damage: str) -> None:
    store = filled(tmp_path, 1, 2)
    file = tmp_path / "step-00000002" / name
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    file.write_bytes({"truncate": data[:-1], "empty": b"", "extended": data + b"x"}.get(damage, data))
    if damage == "missing":
        file.unlink()
    warnings: list[str] = []
    latest = store.latest(warnings.append)
    assert latest is not None
    assert_holds(latest, 1)
    assert len(warnings) == 1
    assert name in warnings[0]
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        store.open(tmp_path / "step-00000002")


def test_no_single_bit_of_a_checkpoint_can_flip_unseen(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 1)
    store.save(snapshot(5, size=2))
    store.wait()
    stored = store.entries()[0]
    assert stored.problem() is None
    for name in FILES:
        file = stored.path / name
        data = bytearray(file.read_bytes())
        # Each bit of the manifest, which nothing else vouches for; a sample of the others.
        for bit in range(0, len(data) * 8, 1 if name == "manifest.json" else 37):
            data[bit // 8] ^= 1 << bit % 8
            file.write_bytes(data)
            assert stored.problem() is not None, (name, bit)
            data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
    assert stored.problem() is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
@pytest.mark.parametrize("name", [*FILES, "../best.json"])
def test_a_fifo_is_damage_and_does_not_block(tmp_path: Path, name: str) -> None:
    store = filled(tmp_path, 1)
    store.mark_best(1, 1.0)
    store.wait()
    file = tmp_path / "step-00000001" / name
    file.unlink()
    os.mkfifo(file)
    if name in FILES:
        assert "regular" in str(store.entries()[0].problem()) or "bytes" in str(store.entries()[0].problem())
    else:
        assert store.best() is None


@pytest.mark.parametrize("name", ["manifest.json", "trainer.json"])
def test_deep_json_is_damage(tmp_path: Path, name: str) -> None:
    store = filled(tmp_path, 1)
    (tmp_path / "step-00000001" / name).write_text("[" * 200_000)
    assert name in str(store.entries()[0].problem())
    with pytest.raises(CheckpointError, match=name):
        _ = store.entries()[0].trainer if name == "trainer.json" else store.open(tmp_path / "step-00000001")


def test_when_all_are_damaged_the_message_says_so(tmp_path: Path) -> None:
    store = filled(tmp_path, 1, 2)
    for entry in store.entries():
        (entry.path / "model.safetensors").unlink()
    warnings: list[str] = []
    assert store.latest(warnings.append) is None
    assert len(warnings) == 2
    with pytest.raises(CheckpointError, match="all 2 checkpoints are damaged"):
        store.open(tmp_path)


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    import pickle

    store = filled(tmp_path, 1)
    file = tmp_path / "step-00000001" / "model.safetensors"
    file.write_bytes(pickle.dumps({"weight": 1}))
    manifest_file = file.with_name("manifest.json")
    manifest = json.loads(manifest_file.read_text())
    manifest["files"][file.name] = write_file(file, [file.read_bytes()])
    manifest_file.write_text(json.dumps(manifest))
    stored = store.open(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        stored.weights()


# Rotation.


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    for step, val_loss in ((1, 5.0), (2, 3.0), (3, 4.0), (4, 3.5), (5, math.nan), (6, 3.0)):
        store.save(snapshot(step))
        store.mark_best(step, val_loss)
    store.wait()
    assert steps_of(store) == [2, 5, 6]
    assert store.best() == (2, 3.0)
    store.mark_best(6, 2.0)
    store.wait()
    assert steps_of(store) == [5, 6]
    assert hidden(tmp_path) == []


def test_the_best_is_known_to_the_next_process(tmp_path: Path) -> None:
    first = filled(tmp_path, 1, 2)
    first.mark_best(1, 2.5)
    first.wait()
    store = filled(tmp_path, 3, 4, 5, keep=1)
    store.mark_best(5, 2.6)
    store.wait()
    assert store.best() == (1, 2.5)
    assert steps_of(store) == [1, 5]


def test_those_of_every_so_many_steps_stay(tmp_path: Path) -> None:
    store = filled(tmp_path, *range(1, 9), keep=1, keep_every=3)
    assert steps_of(store) == [3, 6, 8]
    # Unless the run has gone back to before them.
    store.rewind(5)
    store.save(snapshot(7))
    store.wait()
    assert steps_of(store) == [3, 7]


def test_rotation_counts_only_checkpoints_that_verify(tmp_path: Path) -> None:
    filled(tmp_path, 20, 30)
    for step in (20, 30):
        file = tmp_path / f"step-000000{step}" / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    store = filled(tmp_path, 3, 6, 9, keep=2)
    assert [entry.step for entry in store.entries() if entry.problem() is None] == [6, 9]


def test_a_checkpoint_is_not_saved_before_what_must_come_first(tmp_path: Path) -> None:
    errors: list[CheckpointError] = []
    store = CheckpointStore(tmp_path, 2, on_error=errors.append)
    store.save(snapshot(1), first=lambda: raising(errno.ENOSPC)("metrics.jsonl"))
    store.wait_until_written()
    assert steps_of(store) == []
    assert "step 1 was not saved: No space left on device at metrics.jsonl; free space" in str(errors[0])


def test_marking_a_step_without_checkpoint_does_nothing(tmp_path: Path) -> None:
    store = filled(tmp_path, 1)
    store.mark_best(1, 3.0)
    store.mark_best(2, 1.0)
    store.wait()
    assert store.best() == (1, 3.0)


def test_old_checkpoints_stay_until_the_new_one_is_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(tmp_path, 1, keep=1)
    seen: list[list[int]] = []
    sync = checkpoint_module.sync_folder

    def watch(folder: Path) -> None:
        seen.append(steps_of(store))
        sync(folder)

    monkeypatch.setattr(checkpoint_module, "sync_folder", watch)
    monkeypatch.setattr(atomic, "sync_folder", watch)
    store.save(snapshot(2))
    store.wait()
    assert seen == [[1], [1, 2]]
    assert steps_of(store) == [2]


def test_after_rewind_newer_checkpoints_go_once_the_next_is_safe(tmp_path: Path) -> None:
    first = filled(tmp_path, 1, 2, 3, 4)
    first.mark_best(4, 1.0)
    first.wait()
    store = CheckpointStore(tmp_path, 2)
    store.rewind(2)
    assert steps_of(store) == [1, 2, 3, 4]
    store.save(snapshot(3))
    store.wait()
    assert steps_of(store) == [2, 3]
    store.save(snapshot(4))
    store.wait()
    # The mark belonged to the abandoned step 4, not to this one.
    assert store.best() is None


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = filled(tmp_path, 1)
    store.save(Snapshot(1, {}, {}, {"step": 1, "again": True}))
    store.wait()
    assert store.open(tmp_path).trainer["again"]
    assert hidden(tmp_path) == []


def test_clean_puts_back_a_checkpoint_whose_replacement_was_not_finished(tmp_path: Path) -> None:
    store = filled(tmp_path, 1)
    (tmp_path / "step-00000001").rename(tmp_path / ".step-00000001.replaced-99")
    (tmp_path / ".step-00000002.tmp-99").mkdir()
    (tmp_path / ".step-00000003.deleted-99").mkdir()
    store.clean()
    assert hidden(tmp_path) == []
    assert_holds(store.open(tmp_path), 1)


# The background.


def test_save_returns_before_the_write_and_a_second_save_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    write = checkpoint_module.write_tensors

    def slow(*args: object) -> object:
        gate.wait()
        return write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint_module, "write_tensors", slow)
    store = CheckpointStore(tmp_path, 5)
    assert store.save(snapshot(1)) < 0.1
    assert steps_of(store) == []
    threading.Timer(0.2, gate.set).start()
    assert store.save(snapshot(2)) > 0.1
    assert steps_of(store)[0] == 1
    store.wait()
    assert steps_of(store) == [1, 2]


@pytest.mark.parametrize("fails", [False, True])
def test_the_snapshot_is_let_go_when_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    if fails:
        monkeypatch.setattr(checkpoint_module, "write_tensors", raising(errno.ENOSPC))
    store = CheckpointStore(tmp_path, 1)
    state = snapshot(1)
    reference = weakref.ref(state.weights["a.weight"])
    store.save(state)
    del state
    store.wait_until_written()
    assert (store.last_error is not None) == fails
    assert reference() is None


def test_a_save_under_way_is_finished_when_the_interpreter_exits(tmp_path: Path) -> None:
    code = (
        "import torch; from pathlib import Path; from minimind.checkpoint.store import *; "
        f"CheckpointStore(Path({str(tmp_path)!r}), 1).save("
        "Snapshot(3, {'w': torch.ones(1 << 20)}, {}, {'step': 3}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert CheckpointStore.open(tmp_path).step == 3


# Failure leaves what was there.


def raising(number: int):
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number), str(args[0]))

    return fail


@pytest.mark.parametrize("place", ["write_tensors", "write_file", "sync_folder"])
@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO]
)
def test_an_error_of_the_disk_is_reported_and_nothing_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, number: int
) -> None:
    filled(tmp_path, 1)
    errors: list[CheckpointError] = []
    store = CheckpointStore(tmp_path, 1, on_error=errors.append)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, place, raising(number))
        store.save(snapshot(2))
        store.wait_until_written()
        with pytest.raises(CheckpointError, match=f"step 2 was not saved: {os.strerror(number)}"):
            store.wait()
    assert errors == [store.last_error]
    assert steps_of(store) == [1]
    assert_holds(store.open(tmp_path), 1)
    assert hidden(tmp_path) == []
    store.save(snapshot(3))
    store.wait()
    assert store.last_error is None
    assert steps_of(store) == [3]


@pytest.mark.parametrize(("owner", "call"), [(Path, "mkdir"), (Path, "rename"), (atomic, "create_file")])
def test_a_folder_that_cannot_be_written_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, call: str
) -> None:
    store = filled(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(owner, call, raising(errno.EACCES))
        store.save(snapshot(2))
        store.wait_until_written()
    assert "allow writing there, or use another --output-dir" in str(store.last_error)
    assert steps_of(store) == [1]
    assert hidden(tmp_path) == []


def test_a_real_full_file_is_survived(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    code = f"""
import resource, torch
from pathlib import Path
from minimind.checkpoint.store import CheckpointStore, Snapshot
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
store = CheckpointStore(Path({str(tmp_path)!r}), 1)
store.save(Snapshot(2, {{"w": torch.ones(1 << 20)}}, {{}}, {{"step": 2}}))
store.wait_until_written()
print(store.last_error)
store.save(Snapshot(3, {{"w": torch.ones(8)}}, {{}}, {{"step": 3}}))
store.wait()
"""
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "step 2 was not saved: File too large" in result.stdout
    assert "model.safetensors" in result.stdout
    assert "ulimit -f" in result.stdout
    assert hidden(tmp_path) == []
    assert CheckpointStore.open(tmp_path).step == 3


def test_too_little_space_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(tmp_path, 1, keep=1)
    usage = type("Usage", (), {"free": 10_000_000})
    monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(checkpoint_module, "write_tensors", None)
    store.save(snapshot(2))
    store.wait_until_written()
    assert "it needs 17 MB and 10 MB are free" in str(store.last_error)
    assert "--keep-checkpoints" in str(store.last_error)
    assert steps_of(store) == [1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["weights", "optimizer_state"])
def test_a_state_that_is_not_finite_is_refused(tmp_path: Path, value: float, part: str) -> None:
    store = filled(tmp_path, 1, keep=1)
    bad = snapshot(2)
    getattr(bad, part)["spoilt"] = torch.tensor([0.0, value, 1.0])
    assert bad.first_not_finite() == "spoilt"
    assert snapshot(2).first_not_finite() is None
    store.save(bad)
    with pytest.raises(CheckpointError, match="spoilt is not finite"):
        store.wait()
    assert steps_of(store) == [1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_killed_at_any_moment_the_newest_checkpoint_is_whole(tmp_path: Path) -> None:
    rounds, interrupted, reported = 45, 0, 0
    chance = random.Random(3)
    for _ in range(rounds):
        start = reported
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                save_for_ever(tmp_path, start, writer)
            finally:
                os._exit(1)
        os.close(writer)
        with os.fdopen(reader, "rb") as stream:
            first = stream.read(4)  # until the first save of this round has been reported
            time.sleep(chance.uniform(0, 0.05))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            received = first + stream.read()
        reported = int.from_bytes(received[-4:], "little")
        store = CheckpointStore(tmp_path, 2)
        interrupted += bool(hidden(tmp_path))
        assert all(entry.problem() is None for entry in store.entries())
        store.clean()
        assert hidden(tmp_path) == []
        latest = store.latest(pytest.fail)
        assert latest is not None
        assert reported <= latest.step <= reported + 1
        assert_holds(latest, latest.step)
        # Two newest, the best, and one that rotation had not yet reached.
        assert len(store.entries()) <= 4
    assert interrupted > rounds // 4


def save_for_ever(folder: Path, step: int, pipe: int) -> None:
    torch.set_num_threads(1)
    store = CheckpointStore(folder, 2)
    while True:
        step += 1
        store.save(snapshot(step))
        store.mark_best(step, abs(step % 7 - 3.0))
        store.wait()
        os.write(pipe, step.to_bytes(4, "little"))


def test_a_snapshot_is_read_only_when_its_tensors_have_arrived(tmp_path: Path) -> None:
    weights = {"w": torch.full((4,), math.nan)}
    store = CheckpointStore(tmp_path, 1)
    store.save(Snapshot(1, weights, {}, {"step": 1}, lambda: weights["w"].fill_(7.0)))
    store.wait()
    assert torch.equal(store.open(tmp_path / "step-00000001").weights()["w"], torch.full((4,), 7.0))
