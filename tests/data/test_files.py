"""Which files --data names, what is skipped and why, and what is refused."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from minimind.config.options import PretrainConfig
from minimind.data import encodings, files
from minimind.data.files import find_files
from minimind.data.prepare import prepare_data
from minimind.data.readers import Reading, TextFile
from minimind.data.sources import read_sources
from minimind.errors import DataError
from minimind.tokenizer import load_tokenizer
from support.made_text import write_jsonl

LINES = [json.dumps({"text": f"document {i}"}) for i in range(5)]
TEXTS = [f"document {i}" for i in range(5)]


def read(path: Path, **values) -> list[str]:
    return list(TextFile(path, "--data", **values).documents(Reading()))


def found(*patterns: Path) -> tuple[list[Path], dict[str, int]]:
    skipped: Counter[str] = Counter()
    return find_files([str(pattern) for pattern in patterns], "--data", skipped), dict(skipped)


def test_a_link_is_read_by_the_suffix_of_its_own_name(tmp_path):
    blob = tmp_path / "blobs" / "deadbeef"
    blob.parent.mkdir()
    blob.write_text("\n".join(LINES))
    link = tmp_path / "train.jsonl"
    link.symlink_to(blob)
    (path,), _ = found(link)
    assert read(path) == TEXTS
    assert found(tmp_path) == ([link], {"file without a suffix": 1})


def test_a_file_with_two_names_belongs_to_one_source(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    link = tmp_path / "b.jsonl"
    link.symlink_to(path)
    assert found(path, link)[0] == [path]
    assert [source.files for source in read_sources([str(path), str(link)])] == [(path,), ()]
    with pytest.raises(DataError, match="both name"):
        read_sources([f"{path}:1", f"{link}:1"])


def test_linked_folders_are_searched_and_loops_end(tmp_path):
    real, corpus = tmp_path / "real", tmp_path / "corpus"
    real.mkdir()
    corpus.mkdir()
    write_jsonl(real / "b.jsonl", TEXTS)
    write_jsonl(corpus / "a.jsonl", TEXTS)
    (corpus / "more").symlink_to(real)
    (corpus / "same").symlink_to(real)
    (real / "loop").symlink_to(corpus)
    (corpus / "self").symlink_to(corpus)
    assert found(corpus)[0] == [corpus / "a.jsonl", corpus / "more" / "b.jsonl"]


def test_what_is_skipped_is_counted_by_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "has_zstd", lambda: False)
    for name in ("a.jsonl", "b.ndjson", "c.jsonl.zst", "e.tar.gz", "f.md", "g.md", "h", "._i.jsonl"):
        (tmp_path / name).write_text(LINES[0])
    (tmp_path / "c.json").write_text(json.dumps([{"text": "one"}]))
    (tmp_path / "d.json").write_text(json.dumps({"license": "MIT", "features": {}}, indent=1))
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "a.jsonl").write_text(LINES[0])
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    paths, skipped = found(tmp_path)
    assert [path.name for path in paths] == ["a.jsonl", "b.ndjson", "c.json"]
    assert skipped == {
        ".jsonl.zst file, which needs pip install zstandard": 1,
        "file with the unknown suffix .tar.gz": 1,
        "file with the unknown suffix .md": 2,
        "file without a suffix": 1,
        "hidden file": 1,
        "hidden folder": 1,
        ".json file without documents (no field 'text')": 1,
        f"broken link: {tmp_path / 'gone.txt'}": 1,
        "pipe or device": 1,
    }


def test_a_folder_that_cannot_be_read_is_counted(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "secret").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    reason = f"folder that cannot be read: {tmp_path / 'secret'} (Permission denied)"
    assert found(tmp_path)[1] == {reason: 1}


def test_the_report_counts_skipped_files_and_a_warning_tells_when_they_are_most(tmp_path, tokenizer):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_jsonl(corpus / "a.jsonl", ["some words " * 20] * 5)
    for name in ("b.csv", "c.csv", "d.x1", "d.x2", "d.x3", "d.x4", "d.x5"):
        (corpus / name).touch()
    config = PretrainConfig(data=(str(corpus),), max_seq_len=16, cache_dir=str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match=r"7 files or folders were skipped and only 1 .* suffix \.csv"):
        report = prepare_data(config, tokenizer).report
    assert "skipped     2 x file with the unknown suffix .csv" in report.lines()
    # Without --verbose only what is lost or questionable is shown, at most a few lines of it.
    *shown, more = report.problems()
    assert shown == [line for line in report.lines() if line.startswith(("duplicates", "skipped"))][:5]
    assert more.endswith(" more; --verbose lists them")


def test_folders_of_training_runs_are_skipped_and_named(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    run = tmp_path / "out"
    run.mkdir()
    for name in ("config.toml", "metrics.jsonl"):
        (run / name).write_text('{"step": 1}')
    assert found(tmp_path) == ([tmp_path / "a.jsonl"], {f"folder of a training run: {run}": 1})
    write_jsonl(run / "own.jsonl", TEXTS)
    assert found(run) == ([run / "own.jsonl"], {"file of a training run": 2})


def test_a_pipe_is_refused_with_the_reason(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"--data .*pipe is a pipe or a device.* write it to a file"):
        found(tmp_path / "pipe")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("compress", [lambda data: data, gzip.compress])
def test_json_arrays_and_lines_are_read(tmp_path, mark, compress):
    suffix = ".gz" if compress is gzip.compress else ""
    contents = {
        "array.json": json.dumps([json.loads(line) for line in LINES]),
        "indented.json": json.dumps([json.loads(line) for line in LINES], indent=2),
        "lines.json": "\n".join(LINES),
        "lines.ndjson": "\n".join(LINES),
        "objects.json": "\n".join(json.dumps(json.loads(line), indent=2) for line in LINES),
    }
    for name, content in contents.items():
        path = tmp_path / (name + suffix)
        path.write_bytes(compress(mark + content.encode()))
        assert read(path) == TEXTS, name


def test_a_long_array_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("minimind.data.readers._READ_BYTES", 16)
    path = tmp_path / "a.json"
    texts = ["ein Text mit Umlaut ä und 中文 " * (i % 7 + 1) for i in range(100)]
    path.write_text(json.dumps([{"text": text} for text in texts], ensure_ascii=False), encoding="utf-8")
    assert read(path) == texts


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('[{"text": "a"}, {"text": 3}]', r"item 2: the text is not a string"),
        ('[{"text": "a"}, {"text": ', r"item 2: invalid JSON"),
        ('[{"text": "a"},', r"item 2: invalid JSON"),
        ('[{"text": "a"}, 3]', r"item 2: not a JSON object"),
        ('[{"text": "a"}, ' + "[" * 100_000, r"item 2: invalid JSON"),
    ],
)
def test_a_bad_item_of_an_array_is_named(tmp_path, content, reason):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(DataError, match=rf"a\.json:({reason}).*--bad-lines skip"):
        read(path)
    assert read(path, bad_lines="skip") == ["a"]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ("größer\n".encode("utf-16"), "UTF-16 text; .* iconv -f UTF-16"),
        (("words in a line\n" * 9).encode("utf-16-le"), "UTF-16 text without a byte order mark; .*UTF-16LE"),
        (gzip.compress(b"text", mtime=0), "gzip data; add .gz"),
        (b"%PDF-1.7\n", "a PDF"),
        (b"PK\x03\x04abc", "a ZIP archive"),
        (b"\0" * 100, "binary data"),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json"])
def test_what_is_not_text_is_refused_with_what_it_seems_to_be(tmp_path, content, kind, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    for bad_lines in ("error", "skip"):
        with pytest.raises(DataError, match=rf"--data: .*a{suffix} is not UTF-8 text but seems to be {kind}"):
            read(path, bad_lines=bad_lines)


@pytest.mark.parametrize(
    ("encoding", "text", "name"),
    [("latin-1", "Größe und Öl", "Latin-1"), ("gb18030", "今天天气很好，我们去公园。", "GB18030")],
)
def test_other_encodings_are_named(tmp_path, encoding, text, name):
    path = tmp_path / "a.txt"
    path.write_bytes(f"first\n{text}\n".encode(encoding))
    with pytest.raises(DataError, match=rf"a\.txt:2: broken UTF-8 \(the file seems to be {name}.*convert"):
        read(path)


def test_zstandard_files_are_read(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "a.jsonl.zst"
    half = len(LINES) // 2
    frames = ["\n".join(LINES[:half]) + "\n", "\n".join(LINES[half:])]
    data = b"".join(zstandard.compress(frame.encode()) for frame in frames)
    path.write_bytes(data)
    assert read(path) == TEXTS
    assert found(tmp_path)[0] == [path]
    path.write_bytes(data[:-9])
    with pytest.raises(DataError, match=r"a\.jsonl\.zst:\d+: the zstd data ends early"):
        read(path)
    path.write_bytes(b"no zstd data")
    with pytest.raises(DataError, match=r"a\.jsonl\.zst:1: damaged zstd data"):
        read(path)


def test_without_zstandard_the_error_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr("minimind.data.readers.has_zstd", lambda: False)
    path = tmp_path / "a.jsonl.zst"
    path.touch()
    assert found(path)[0] == [path]
    with pytest.raises(DataError, match=r"a\.jsonl\.zst needs zstandard; pip install zstandard"):
        read(path)


def test_text_is_not_called_binary():
    for text in ("plain\n", "中文，标点。", "\ttabs", "BZ and PK and [list]"):
        assert encodings.binary_format(text.encode()) is None
        assert encodings.likely_encoding(text.encode()) is None


def test_chinese_text_with_a_few_other_letters_is_still_gb18030():
    assert encodings.likely_encoding(("中文" * 10 + "é").encode("gb18030")) == "GB18030 (GBK) text"


def test_a_recursive_glob_enters_each_linked_folder_once(tmp_path):
    corpus = tmp_path / "corpus"
    (corpus / "more" / "deep").mkdir(parents=True)
    top = write_jsonl(corpus / "a.jsonl", TEXTS)
    deep = write_jsonl(corpus / "more" / "deep" / "b.jsonl", [text + "!" for text in TEXTS])
    for name in "xyz":  # three links that lead back would make 3 ** 40 paths
        (corpus / "more" / name).symlink_to(corpus)
    assert found(corpus / "**" / "*.jsonl")[0] == [top, deep]
    assert found(corpus / "**")[0] == [top, deep]
    assert found(corpus / "*" / "**" / "deep" / "*.jsonl")[0] == [deep]
    assert found(corpus / "**" / "more" / "**" / "?.jsonl")[0] == [deep]


@pytest.mark.parametrize("pattern", ["*", "**/*"])
def test_a_glob_counts_what_it_does_not_read(tmp_path, pattern):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.jsonl")
    files_, skipped = found(tmp_path / pattern)
    assert files_ == [path]
    assert skipped == {f"broken link: {tmp_path / 'gone.jsonl'}": 1, "pipe or device": 1}


def test_files_below_a_folder_without_permission_are_not_looked_at(tmp_path, monkeypatch):
    """As root, no folder is unreadable, so the system is asked in another way."""
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    secret = tmp_path / "secret"
    secret.mkdir()
    stat, scandir = os.stat, os.scandir

    def refuse(path, call, *args, **options):
        if str(secret) + "/" in str(path) or (call is scandir and str(path) == str(secret)):
            raise PermissionError(13, "Permission denied", str(path))
        return call(path, *args, **options)

    monkeypatch.setattr(os, "stat", lambda path, *a, **o: refuse(path, stat, *a, **o))
    monkeypatch.setattr(os, "scandir", lambda path: refuse(path, scandir))
    assert found(tmp_path) == (
        [tmp_path / "a.jsonl"],
        {f"folder that cannot be read: {secret} (Permission denied)": 1},
    )
    with pytest.raises(DataError, match="--data"):
        read_sources([str(secret / "b.jsonl")])


def test_a_token_cache_among_the_data_is_skipped(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    path = write_jsonl(corpus / "a.jsonl", TEXTS * 4)
    config = PretrainConfig(data=(str(corpus),), cache_dir=str(corpus / "cache"), max_seq_len=8)
    prepare_data(config, load_tokenizer())
    assert found(corpus) == ([path], {"folder of a token cache": 1, "file with the unknown suffix .lock": 1})


def test_a_saved_data_set_with_a_deep_or_blocking_list_of_files_is_refused(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="cannot be read; save the data set again"):
        found(tmp_path)
    (tmp_path / "state.json").unlink()
    os.mkfifo(tmp_path / "state.json")
    with pytest.raises(DataError, match="cannot be read; save the data set again"):
        found(tmp_path)
