"""The token cache never gives other tokens than it was built with."""

from __future__ import annotations

import os
import socket
import warnings
from pathlib import Path

import numpy as np
import pytest

from minimind.config.options import PretrainConfig
from minimind.data import cache, checksums
from minimind.data.batch_plan import BatchPlan
from minimind.data.checksums import CheckedArray, ChecksummedFile
from minimind.data.loader import Loader
from minimind.data.prepare import prepare_data
from minimind.errors import DataError
from support.made_text import write_jsonl

FILES = [
    "manifest.json",
    *(
        f"train{name}{end}"
        for name in ("-00000.bin", ".offsets", ".blocks", ".lengths")
        for end in ("", ".crc")
    ),
    *(f"validation{name}" for name in ("-00000.bin", ".offsets", ".blocks", ".lengths")),
]


def prepare(tmp_path: Path, tokenizer, val_fraction: float = 0.1):
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file in files:
        if not file.exists():
            write_jsonl(file, [f"document {i} of {file.name} " + "word " * (i % 17) for i in range(60)])
    config = PretrainConfig(
        data=tuple(map(str, files)),
        max_seq_len=32,
        val_fraction=val_fraction,
        cache_dir=str(tmp_path / "cache"),
    )
    return prepare_data(config, tokenizer)


def everything(data) -> list[list[int]]:
    """All that training and validation read."""
    plan = BatchPlan(8, 1, 1)
    read = []
    for shards in (data.train, data.validation):
        loader = Loader(shards, seq_len=32, packing=True, plan=plan, seed=1, process_index=0, device="cpu")
        read += [step.micro_batches[0].input_ids.tolist() for step in loader.steps(0)]
    return read


def damage(file: Path, how: str, place: float) -> None:
    content = bytearray(file.read_bytes())
    at = min(int(len(content) * place), len(content) - 1)
    if how == "cut":
        del content[at:]
    else:
        content[at] ^= 1 << int(how)
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "large"),
    [*((name, False) for name in FILES), *((name, True) for name in FILES[1:5])],
)
def test_no_corruption_is_silent_or_a_traceback(tmp_path, tokenizer, monkeypatch, name, large):
    """Flip bits of and truncate each file of a cache that is checked at once, or as it is read."""
    if large:
        monkeypatch.setattr(cache._check, "__defaults__", (0,))
    monkeypatch.setattr(checksums, "CHUNK_BYTES", 1 << 10)
    expected = everything(prepare(tmp_path, tokenizer))
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    for how in ("2", "7", "cut"):
        for place in (0.0, 0.6, 1.0):
            damage(folder / name, how, place)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    data = prepare(tmp_path, tokenizer)
                    read = everything(data)
                except DataError as error:
                    if not large or str(folder / name) not in str(error):
                        raise
                    data = prepare(tmp_path, tokenizer)
                    read = everything(data)
            assert data.built
            assert name in str(caught[0].message) or large
            assert read == expected
            assert not prepare(tmp_path, tokenizer).built


def test_a_file_that_is_missing_is_named_and_built_again(tmp_path, tokenizer):
    prepare(tmp_path, tokenizer)
    (file,) = (tmp_path / "cache").rglob("train.blocks.crc")
    file.unlink()
    with pytest.warns(UserWarning, match=r"damaged .*train\.blocks\.crc is missing"):
        assert prepare(tmp_path, tokenizer).built


def test_a_write_that_does_not_reach_the_disk_is_found_when_the_cache_is_built(
    tmp_path, tokenizer, monkeypatch
):
    write = ChecksummedFile.write

    def lose_a_bit(self, data):
        write(self, data)
        if self._path.name == "train.offsets":
            self._file.seek(0)
            self._file.write(b"\1")
            self._file.seek(0, 2)

    monkeypatch.setattr(ChecksummedFile, "write", lose_a_bit)
    with pytest.raises(DataError, match=r"does not read back: .*train\.offsets does not match"):
        prepare(tmp_path, tokenizer)


def test_an_array_checks_only_the_chunks_that_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "CHUNK_BYTES", 80)
    file = ChecksummedFile(tmp_path / "a")
    for start in range(0, 100, 7):
        file.write(np.arange(start, min(start + 7, 100)))
    file.close()
    damage(tmp_path / "a", "3", 0.55)
    array = CheckedArray(tmp_path / "a", np.dtype(np.int64))
    assert len(array.unchecked) == 10
    assert array[3] == 3
    assert array[np.array([49, 1])].tolist() == [49, 1]
    assert array[60:].tolist() == list(range(60, 100))
    array.check_spans(np.array([0, 45]), np.array([30, 5]))
    assert np.flatnonzero(array.unchecked).tolist() == [3, 5]
    for read in (
        lambda: array[55],
        lambda: array[:],
        lambda: array[np.array([1, 59])],
        lambda: array.check_spans(np.array([49]), np.array([2])),
        lambda: np.diff(array),
    ):
        with pytest.raises(DataError, match=r"/a does not match its checksum at byte 400"):
            read()


def test_a_folder_with_another_name_is_kept(tmp_path, tokenizer):
    other = tmp_path / "cache" / f"x.building-{socket.gethostname()}-1.bak"
    other.mkdir(parents=True)
    prepare(tmp_path, tokenizer)
    assert other.is_dir()


def test_an_id_outside_the_vocabulary_is_refused(tmp_path, tokenizer):
    tokenizer.vocab_size = 100
    with pytest.raises(DataError, match=r"returned the id \d+, outside its vocabulary of 100 entries"):
        prepare(tmp_path, tokenizer)


def test_equal_digests_mean_equal_tokens(tmp_path, tokenizer):
    """Documents of the same lengths have the same positions, but not the same digests."""

    def digests(number: int) -> list[str]:
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in ("a.jsonl", "b.jsonl"):
            write_jsonl(
                folder / name, [f"document {i % 10} with the letter {'xyx'[number]}" for i in range(90)]
            )
        train = prepare(folder, tokenizer, val_fraction=0.0).train
        loader = Loader(
            train, seq_len=32, packing=True, plan=BatchPlan(8, 1, 1), seed=1, process_index=0, device="cpu"
        )
        return [step.digest for step in loader.steps(0)]

    first, second, third = map(digests, range(3))
    assert len(first) == len(second) > 5
    assert not set(first) & set(second)
    assert first == third


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
@pytest.mark.parametrize("plant", [os.mkfifo, lambda path: os.symlink(f"{path}.other", path)])
def test_a_pipe_or_link_in_place_of_a_lock_file_is_refused(tmp_path, plant):
    plant(tmp_path / "key.lock")
    with pytest.raises(OSError, match=r"not a regular file|symbolic links|No such device"):
        cache.open_or_build(tmp_path, "key", lambda folder: {})
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]
