"""A flipped byte or a cut at 20 offsets of every file of a checkpoint is found, without a traceback."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from minimind import pretrain
from minimind.checkpoint.files import best_checkpoint, latest_checkpoint, open_checkpoint
from minimind.errors import CheckpointError
from support.corrupted_files import sweep_all
from support.tiny_runs import tiny, write_corpus

FILES = ("model.safetensors", "optimizer.safetensors", "trainer.json", "manifest.json")
OFFSETS = 20


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    pretrain(tiny(write_corpus(folder / "corpus.jsonl"), folder / "run", max_steps=6, save_interval=3))
    return folder / "run"


def test_every_damaged_byte_is_found_and_the_checkpoint_before_is_used(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints" / "step-00000006"
    found: Counter[str] = Counter()
    for name in FILES:
        file = newest / name
        whole = file.read_bytes()
        for number in range(OFFSETS):
            offset = number * (len(whole) - 1) // (OFFSETS - 1)
            flipped = whole[:offset] + bytes([whole[offset] ^ (1 << number % 8)]) + whole[offset + 1 :]
            for data in (flipped, whole[:offset]):
                file.write_bytes(data)
                warnings: list[str] = []
                latest = latest_checkpoint(newest.parent, warnings.append)
                assert latest is not None
                assert latest.step == 3, (name, offset)
                assert name in warnings[0]
                with pytest.raises(CheckpointError, match=name):
                    open_checkpoint(newest)
                found[name] += 1
        file.write_bytes(whole)
    assert found == dict.fromkeys(FILES, 2 * OFFSETS)
    assert open_checkpoint(newest).step == 6


def test_a_damaged_mark_of_the_best_never_stops_a_run(run: Path, tmp_path: Path) -> None:
    """It only protects a checkpoint from rotation: a wrong one costs no more than that."""
    shutil.copytree(run.parent, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "run" / "checkpoints" / "best.json"
    whole = b'{"step": 3, "val_loss": 7.5}'
    for offset in range(len(whole)):
        for bit in range(8):
            data = bytearray(whole)
            data[offset] ^= 1 << bit
            file.write_bytes(data)
            best_checkpoint(file.parent)
    file.write_bytes(whole[:-1])
    config = tiny(tmp_path / "corpus.jsonl", tmp_path / "run", max_steps=7, save_interval=3, resume="auto")
    assert pretrain(config).steps == 7


@pytest.mark.slow
def test_every_damaged_file_is_found_and_named(tmp_path: Path) -> None:
    """`tests/support/corrupted_files.py FOLDER 20` is the long version."""
    found = sweep_all(tmp_path, 2)
    loose = found.pop("run folder")
    for place, count in found.items():
        assert {outcome for _, outcome in count} == {"found"}, (place, count)
    # A changed digit in these looks like any other value.
    assert not [outcome for _, outcome in loose if outcome.startswith("traceback")]
