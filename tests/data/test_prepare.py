"""Text becomes tokens once: cache hits, rebuilds, interrupted builds, several processes, clear errors."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import socket
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minimind.config.options import PretrainConfig
from minimind.data import cache, documents, prepare, tokenization
from minimind.data.prepare import default_cache_dir, prepare_data
from minimind.data.report import DataReport, sequence_costs
from minimind.data.tokenization import hash_text
from minimind.errors import DataError
from support.made_text import ByteTokenizer, write_jsonl

TEXTS = [f"document number {i} " + "word " * (i % 17) for i in range(300)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "a.jsonl", TEXTS)


def config_for(tmp_path: Path, *data: Path | str, **values) -> PretrainConfig:
    values = {"max_seq_len": 32, "val_fraction": 0.0, "cache_dir": str(tmp_path / "cache")} | values
    return PretrainConfig(data=tuple(map(str, data)), **values)


def texts_of(shards, tokenizer) -> list[str]:
    return [tokenizer.decode(shards.document(i).tolist()) for i in range(shards.num_documents)]


def test_documents_keep_their_order_between_begin_and_end_tokens(tmp_path, corpus, tokenizer):
    data = prepare_data(config_for(tmp_path, corpus), tokenizer)
    assert data.built
    assert data.validation is None
    assert texts_of(data.train, tokenizer) == TEXTS
    assert all(data.train.document(i)[[0, -1]].tolist() == [1, 2] for i in range(300))
    assert data.train.lengths.tolist() == [len(text) + 2 for text in TEXTS]
    assert data.train.document(0).dtype == np.uint16


def test_a_large_vocabulary_is_stored_in_four_bytes_and_bos_is_optional(tmp_path, corpus):
    tokenizer = ByteTokenizer(vocab_size=70_000, bos=False)
    data = prepare_data(config_for(tmp_path, corpus), tokenizer)
    assert data.train.document(0).dtype == np.uint32
    assert data.train.document(0).tolist() == [b + 3 for b in TEXTS[0].encode()] + [2]


def test_a_warm_cache_tokenizes_nothing_and_gives_the_same(tmp_path, corpus, tokenizer):
    config = config_for(tmp_path, corpus, val_fraction=0.1)
    cold = prepare_data(config, tokenizer)
    calls = tokenizer.calls
    start = time.perf_counter()
    warm = prepare_data(config, tokenizer)
    assert time.perf_counter() - start < 0.2
    assert not warm.built
    assert tokenizer.calls == calls
    assert (warm.fingerprint, warm.report) == (cold.fingerprint, cold.report)
    assert texts_of(warm.validation, tokenizer) == texts_of(cold.validation, tokenizer)


@pytest.mark.parametrize("change", ["text", "tokenizer", "key", "fraction", "same size and time"])
def test_a_change_of_source_tokenizer_or_setting_builds_again(tmp_path, corpus, tokenizer, change):
    first = prepare_data(config_for(tmp_path, corpus), tokenizer)
    values = {}
    if change == "text":
        write_jsonl(corpus, ["something else"] * 10)
    elif change == "tokenizer":
        tokenizer = ByteTokenizer(vocab_size=301)
    elif change == "key":
        corpus.write_text('{"body": "other words, and enough of them for a sequence"}\n')
        values["text_key"] = "body"
    elif change == "fraction":
        values["val_fraction"] = 0.5
    else:
        status = corpus.stat()
        corpus.write_bytes(corpus.read_bytes().replace(b"document number 0", b"document NUMBER 0"))
        os.utime(corpus, ns=(status.st_atime_ns, status.st_mtime_ns))
    second = prepare_data(config_for(tmp_path, corpus, **values), tokenizer)
    assert second.built
    assert second.fingerprint != first.fingerprint


def test_moved_text_is_still_the_same_text_and_reordered_text_is_not(tmp_path, corpus, tokenizer):
    first = prepare_data(config_for(tmp_path, corpus), tokenizer)
    moved = corpus.rename(tmp_path / "b.jsonl")
    second = prepare_data(config_for(tmp_path, moved), tokenizer)
    assert second.built
    assert second.fingerprint == first.fingerprint
    assert second.train.fingerprint == first.train.fingerprint
    write_jsonl(moved, TEXTS[::-1])
    assert prepare_data(config_for(tmp_path, moved), tokenizer).fingerprint != first.fingerprint


def test_the_sequence_length_is_no_part_of_the_cache(tmp_path, corpus, tokenizer):
    prepare_data(config_for(tmp_path, corpus), tokenizer)
    longer = prepare_data(config_for(tmp_path, corpus, max_seq_len=64), tokenizer)
    assert not longer.built
    assert longer.report.seq_len == 64


def test_a_build_that_dies_is_not_treated_as_finished_and_is_cleaned_up(tmp_path, corpus, tokenizer):
    context = multiprocessing.get_context("fork")
    config = config_for(tmp_path, corpus)

    class Dying(ByteTokenizer):
        def encode_batch(self, texts):
            os.kill(os.getpid(), 9)

    process = context.Process(target=prepare_data, args=(config, Dying()))
    process.start()
    process.join()
    folder = tmp_path / "cache"
    assert process.exitcode == -9
    assert [path for path in folder.iterdir() if ".building-" in path.name]
    data = prepare_data(config, tokenizer)
    assert data.built
    assert texts_of(data.train, tokenizer) == TEXTS
    assert not [path for path in folder.iterdir() if ".building-" in path.name]


def test_a_build_that_fails_leaves_nothing_behind(tmp_path, corpus, tokenizer):
    def fail(texts):
        raise KeyboardInterrupt

    tokenizer.encode_batch = fail
    with pytest.raises(KeyboardInterrupt):
        prepare_data(config_for(tmp_path, corpus), tokenizer)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock"}


@pytest.mark.parametrize("damage", ["cut", "manifest"])
def test_a_damaged_cache_is_built_again(tmp_path, corpus, tokenizer, damage):
    config = config_for(tmp_path, corpus)
    prepare_data(config, tokenizer)
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    if damage == "cut":
        os.truncate(folder / "train-00000.bin", 10)
    else:
        (folder / "manifest.json").write_text("{")
    again = prepare_data(config, tokenizer)
    assert again.built
    assert texts_of(again.train, tokenizer) == TEXTS


class SlowTokenizer(ByteTokenizer):
    def encode_batch(self, texts):
        time.sleep(0.5)
        return super().encode_batch(texts)


def _prepare_and_tell(config, queue):
    data = prepare_data(config, SlowTokenizer())
    queue.put((data.built, data.train.num_tokens))


def test_processes_that_start_together_build_once(tmp_path, corpus):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    config = config_for(tmp_path, corpus)
    processes = [context.Process(target=_prepare_and_tell, args=(config, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(built for built, _ in results) == [False, False, True]
    assert len({tokens for _, tokens in results}) == 1


def test_held_out_documents_stay_when_files_are_added_or_reordered(tmp_path, tokenizer):
    one = write_jsonl(tmp_path / "one.jsonl", TEXTS[:150])
    two = write_jsonl(tmp_path / "two.jsonl", TEXTS[150:])
    held_out = {}
    for name, files in {"one": [one], "both": [one, two], "turned": [two, one]}.items():
        data = prepare_data(config_for(tmp_path, *files, val_fraction=0.2), tokenizer)
        held_out[name] = set(texts_of(data.validation, tokenizer))
        assert not held_out[name] & set(texts_of(data.train, tokenizer))
    assert held_out["both"] == held_out["turned"] == held_out["one"] | (held_out["both"] & set(TEXTS[150:]))
    assert held_out["one"] <= held_out["both"]
    assert 30 <= len(held_out["both"]) <= 90


def test_the_hash_that_splits_is_fixed_for_ever():
    assert hash_text("minimind") == (2598110885896034164, 8)


def test_validation_files_are_all_validation(tmp_path, corpus, tokenizer):
    other = write_jsonl(tmp_path / "v.jsonl", ["held out", TEXTS[3], TEXTS[3]])
    config = config_for(tmp_path, corpus, val_data=(str(other),), val_fraction=0.5)
    data = prepare_data(config, tokenizer)
    assert texts_of(data.validation, tokenizer) == ["held out", TEXTS[3], TEXTS[3]]
    assert data.train.num_documents == 300
    assert data.report.validation_in_train == 2
    assert data.report.validation.duplicates == 1
    assert "2 validation documents are also training documents" in "\n".join(data.report.lines())


def test_no_document_held_out_is_said_and_not_an_error(tmp_path, corpus, tokenizer):
    data = prepare_data(config_for(tmp_path, corpus, val_fraction=1e-9), tokenizer)
    assert data.validation is None
    assert "--val-fraction 1e-09 selected none of 300 documents" in data.report.notes[0]


def test_the_report_counts_what_is_there(tmp_path, tokenizer):
    texts = ["ab", "ab", "  ", "c" * 100, "äöü"]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    with path.open("a") as file:
        file.write("not json\n[]\n")
    config = config_for(tmp_path, path, bad_lines="skip", max_seq_len=10)
    report = prepare_data(config, tokenizer).report
    assert report.train.amount.documents == 4
    assert report.train.amount.text_bytes == 2 + 2 + 100 + 6
    assert report.train.amount.tokens == 110 + 4 * 2
    assert report.train.lengths == {"p10": 4, "p50": 4, "p90": 102, "p99": 102, "max": 102}
    assert report.train.duplicates == 1
    assert report.sources[0].empty == 1
    assert report.sources[0].bad_lines == {"invalid JSON": 1, "not a JSON object": 1}
    used = {1, 2} | {byte + 3 for text in texts if text.strip() for byte in text.encode()}
    assert report.unused_vocabulary == tokenizer.vocab_size - len(used)
    # Rows of 10: the long document loses all but 11 of its 102 tokens; inputs are 3 + 3 + 10 + 7.
    assert report.padded.truncated == pytest.approx((102 - 11) / 118)
    assert report.padded.padding == pytest.approx(1 - 23 / 40)
    assert report.packed.truncated == 0
    assert report.packed.padding == pytest.approx(1 - 117 / 120)
    assert DataReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_progress_reaches_the_size_of_the_files(tmp_path, corpus, tokenizer):
    seen = []
    prepare_data(config_for(tmp_path, corpus), tokenizer, lambda *values: seen.append(values))
    assert seen[-1] == (corpus.stat().st_size,) * 2


@pytest.mark.parametrize(
    ("texts", "values", "message"),
    [
        ([], {}, r"--data .*a\.jsonl has no text"),
        (["  ", ""], {}, r"has no text \(2 documents were empty"),
        (["short"], {}, r"has 7 training tokens, .* --max-seq-len 32; add data or lower"),
        (["one document"], {"val_fraction": 0.999999}, r"--val-fraction 0.999999 holds out all 1 documents"),
    ],
)
def test_too_little_text_is_a_clear_error(tmp_path, tokenizer, texts, values, message):
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    with pytest.raises(DataError, match=message):
        prepare_data(config_for(tmp_path, path, **values), tokenizer)


def test_an_empty_validation_file_is_named(tmp_path, corpus, tokenizer):
    empty = write_jsonl(tmp_path / "v.jsonl", [])
    with pytest.raises(DataError, match=r"--val-data .*v\.jsonl has no text"):
        prepare_data(config_for(tmp_path, corpus, val_data=(str(empty),)), tokenizer)


def test_a_full_disk_names_the_cache_option(tmp_path, corpus, tokenizer, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare, "encode", full)
    with pytest.raises(DataError, match=r"is full; .* --cache-dir"):
        prepare_data(config_for(tmp_path, corpus), tokenizer)


def test_a_cache_that_is_no_folder_names_the_cache_option(tmp_path, corpus, tokenizer):
    with pytest.raises(DataError, match=r"cannot be written .* --cache-dir"):
        prepare_data(config_for(tmp_path, corpus, cache_dir=str(corpus)), tokenizer)


def test_without_data_the_embedded_text_is_used(tmp_path, tokenizer, monkeypatch):
    embedded = ["some embedded text", " ", "and more of it, for a sequence"]
    monkeypatch.setattr(documents, "builtin_documents", lambda: iter(embedded))
    monkeypatch.setattr(documents, "builtin_fingerprint", lambda: "first")
    data = prepare_data(config_for(tmp_path), tokenizer)
    assert texts_of(data.train, tokenizer) == [embedded[0], embedded[2]]
    assert data.report.sources[0].empty == 1
    assert not prepare_data(config_for(tmp_path), tokenizer).built
    monkeypatch.setattr(documents, "builtin_fingerprint", lambda: "second")
    assert prepare_data(config_for(tmp_path), tokenizer).built


def test_what_dead_builds_left_is_removed_and_live_ones_stay(tmp_path, corpus, tokenizer):
    folder = tmp_path / "cache"
    host = socket.gethostname()
    dead = multiprocessing.get_context("fork").Process(target=int)
    dead.start()
    dead.join()
    old, new = folder / "k1.building-elsewhere-5", folder / "k2.building-elsewhere-5"
    ours, live = folder / f"k3.building-{host}-{dead.pid}", folder / f"k4.building-{host}-{os.getpid()}"
    for draft in (old, new, ours, live):
        draft.mkdir(parents=True)
    os.utime(old, (0, 0))
    prepare_data(config_for(tmp_path, corpus), tokenizer)
    assert [draft.exists() for draft in (old, new, ours, live)] == [False, True, False, True]


def test_without_file_locks_a_build_still_works(tmp_path, corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(cache, "fcntl", None)
    assert prepare_data(config_for(tmp_path, corpus), tokenizer).built
    assert not prepare_data(config_for(tmp_path, corpus), tokenizer).built


def test_the_default_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "minimind"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "minimind"


def test_the_report_names_each_source(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", ["ab", "cde"])
    report = prepare_data(config_for(tmp_path, path, max_seq_len=4), tokenizer).report
    assert f"source      {path}: 2 documents, 9 tokens trained on" in report.lines()
    assert report.lines()[0] == "training    2 documents, 5 B, 9 tokens (0.56 bytes per token)"


def test_text_shorter_than_a_sequence_is_packed_into_one():
    packed, padded = sequence_costs(np.array([[11], [1]]), 20)
    assert (packed.padding, padded.padding) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("train", "validation", "repeated", "shared"),
    [
        ([3, 1, 3, 3, 2], [9, 2], 2, 1),  # 9 would be behind the last one
        ([5, 6], [6, 6, 1, 7, 5], 0, 3),
        ([], [1], 0, 0),
        ([1], [], 0, 0),
    ],
)
def test_equal_documents_are_counted_in_and_between_the_splits(train, validation, repeated, shared):
    found = SimpleNamespace(duplicates={}, shared=0)
    with tempfile.TemporaryFile() as one, tempfile.TemporaryFile() as other:
        for file, hashes in ((one, train), (other, validation)):
            np.array(hashes, np.uint64).tofile(file)
        tokenization._count_duplicates(found, {"train": one, "validation": other})
    assert (found.duplicates["train"], found.shared) == (repeated, shared)


def test_batches_that_nobody_waits_for_are_not_tokenized(tokenizer, monkeypatch):
    """After an error or a signal, which must not wait for all that was queued."""
    release, began = threading.Event(), []

    def encode(*arguments):
        began.append(arguments)
        assert len(began) == 1 or release.wait(10)

    monkeypatch.setattr(tokenization, "_encode_batch", encode)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    one = np.zeros(1, np.int64)
    batches = [tokenization._Batch([""], one, one, one, 0, 0) for _ in range(9)]
    running = tokenization._tokenized(iter(batches), tokenizer, np.dtype(np.uint16))
    next(running)
    threading.Timer(0.02, release.set).start()
    running.close()
    assert len(began) <= 3  # the first one, and one for each of two threads
