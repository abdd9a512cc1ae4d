"""Files become documents, and errors name file and line."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from minimind.data import readers as sources
from minimind.data.files import find_files, identify
from minimind.data.readers import Reading, TextFile
from minimind.errors import DataError


def read(path: Path, reading: Reading | None = None, **values) -> list[str]:
    return list(TextFile(path, "--data", **values).documents(reading or Reading()))


def jsonl(path: Path, *lines: bytes | str) -> Path:
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return path


def test_jsonl_and_gzip_give_the_same_documents(tmp_path):
    texts = ["one", "zwei\nlines", "三", "\U0001f600"]
    plain = jsonl(tmp_path / "a.jsonl", *(json.dumps({"text": t}) for t in texts))
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read(plain) == read(packed) == texts


def test_another_field_and_a_byte_order_mark(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"body": "one"}', "", '{"body": "two"}')
    assert read(path, text_key="body") == ["one", "two"]


def test_white_space_is_dropped_and_counted(tmp_path):
    reading = Reading()
    path = jsonl(tmp_path / "a.jsonl", '{"text": " \\n\\u3000"}', '{"text": ""}', '{"text": "x"}')
    assert read(path, reading) == ["x"]
    assert reading.empty == 2


BAD_LINES = {
    b'{"text": "cut': "invalid JSON",
    b"[1, 2]": "not a JSON object",
    b'{"title": "x"}': "no 'text' field",
    b'{"text": null}': "the text is not a string",
    b'{"text": "\xff\xfe"}': "broken UTF-8",
    b'{"text": "\\ud800"}': "half of a surrogate pair",
    b"[" * 100_000: "invalid JSON",
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items(), ids=BAD_LINES.values())
def test_a_bad_line_stops_with_file_line_and_fix(tmp_path, line, reason):
    path = jsonl(tmp_path / "a.jsonl", '{"text": "good"}', line)
    with pytest.raises(DataError, match=rf"a\.jsonl:2: {reason}.*--bad-lines skip"):
        read(path)


def test_bad_lines_are_skipped_and_counted_when_asked(tmp_path):
    reading = Reading()
    path = jsonl(tmp_path / "a.jsonl", '{"text": "good"}', *BAD_LINES, '{"text": "after"}')
    assert read(path, reading, bad_lines="skip") == ["good", "after"]
    assert reading.bad_lines.total() == len(BAD_LINES)
    assert reading.bad_lines["invalid JSON"] == 2


def test_gzip_that_ends_early_is_reported_and_keeps_what_came_before(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    lines = b"".join(json.dumps({"text": f"document {i * 7919}"}).encode() + b"\n" for i in range(2000))
    path.write_bytes(gzip.compress(lines)[:-2000])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:\d+: the gzip data ends early"):
        read(path)
    reading = Reading()
    assert read(path, reading, bad_lines="skip")[:2] == ["document 0", "document 7919"]
    assert reading.bad_lines == {"the gzip data ends early": 1}


def test_a_file_that_is_no_gzip_is_reported(tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:1: damaged gzip data"):
        read(jsonl(tmp_path / "a.jsonl.gz", '{"text": "x"}'))


def test_a_small_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufefffirst\n\nsecond ä\n".encode())
    assert read(path) == ["first\n\nsecond ä\n"]


@pytest.mark.parametrize("newlines", [True, False])
def test_a_large_text_file_is_cut_without_losing_a_character(tmp_path, monkeypatch, newlines):
    monkeypatch.setattr(sources, "TEXT_PIECE_BYTES", 1000)
    text = "".join(f"line {i} 三é\U0001f600" + ("\n" if newlines else "-") for i in range(400))
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    pieces = read(path)
    assert "".join(pieces) == text
    assert all(len(piece.encode()) <= 2000 for piece in pieces)
    assert len(pieces) > 5
    assert all(piece.endswith("\n") for piece in pieces) == newlines
    # A line of 999 bytes does not fill a piece.
    path.write_bytes(b"x" * 998 + b"\n" + b"yy\n")
    assert len(read(path)) == 1


def test_a_broken_line_of_a_text_file_is_reported_by_number(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\nthr\xff\xffee\nfour\n")
    with pytest.raises(DataError, match=r"a\.txt:3: broken UTF-8"):
        read(path)
    assert read(path, bad_lines="skip") == ["one\ntwo\nfour\n"]
    path.write_bytes("unfinished ä".encode()[:-1])
    with pytest.raises(DataError, match=r"a\.txt:1: broken UTF-8"):
        read(path)


def test_parquet_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", None, "zwei"], "n": [1, 2, 3]}), path)
    with pytest.raises(DataError, match=r"a\.parquet:2: the text is not a string"):
        read(path)
    assert read(path, bad_lines="skip") == ["one", "zwei"]
    with pytest.raises(DataError, match=r"no column 'body'; set --text-key to one of text, n"):
        read(path, text_key="body")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet is not a valid Parquet file"):
        read(path)


def test_parquet_without_its_package_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "a.parquet"
    path.touch()
    with pytest.raises(DataError, match=r"pip install pyarrow"):
        read(path)


def test_folders_and_globs_are_sorted_and_files_come_once(tmp_path):
    for name in ("b.jsonl", "sub/a.txt", "c.jsonl.gz", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    expected = [tmp_path / name for name in ("b.jsonl", "c.jsonl.gz", "sub/a.txt")]
    assert find_files([str(tmp_path)], "--data") == expected
    assert find_files([str(tmp_path / "**" / "*")], "--data") == expected
    assert find_files([str(tmp_path / "sub"), str(tmp_path)], "--data") == [expected[2], *expected[:2]]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("missing.jsonl", r"--val-data .*missing\.jsonl does not exist; pass"),
        ("*.jsonl", r"--val-data .*\*\.jsonl matches no data file; use one of \.jsonl"),
        ("a.csv", r"--val-data .*a\.csv has an unknown suffix; use one of \.jsonl"),
        ("", r"--val-data .* contains no data file"),
    ],
)
def test_paths_that_lead_nowhere_name_the_option(tmp_path, pattern, message):
    (tmp_path / "a.csv").touch()
    with pytest.raises(DataError, match=message):
        find_files([str(tmp_path / pattern)], "--val-data")


def test_a_file_that_cannot_be_opened_is_named_with_its_option(tmp_path):
    # A folder where the file was is an error for every user, also one who may read everything.
    path = tmp_path / "a.jsonl"
    path.mkdir()
    for use in (lambda: identify(path, "--data"), lambda: read(path)):
        with pytest.raises(DataError, match=r"--data: .*a\.jsonl cannot be read \(Is a directory\)"):
            use()


def test_parquet_reports_its_progress_in_bytes(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["text"] * 1024}), path)
    reading = Reading()
    documents = TextFile(path, "--data").documents(reading)
    for _ in range(513):
        next(documents)
    assert 0.4 < reading.done_bytes / path.stat().st_size < 0.6
