"""What --data names: paths, and weights after a colon."""

from __future__ import annotations

import re

import pytest

from minimind.config.options import PretrainConfig
from minimind.data.prepare import prepare_data
from minimind.data.sources import read_sources, split_weight
from minimind.errors import DataError
from support.made_text import write_jsonl


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Two files in the working folder."""
    monkeypatch.chdir(tmp_path)
    return [
        write_jsonl(tmp_path / name, [f"text {i} of {name}" for i in range(40)])
        for name in ("a.jsonl", "b.jsonl")
    ]


def test_weights_are_normalised_and_paths_keep_their_order(two):
    entries = read_sources(["a.jsonl:3", "*b.jsonl:1"])
    assert [entry.weight for entry in entries] == [0.75, 0.25]
    assert [list(entry.files) for entry in entries] == [[two[0]], [two[1]]]
    assert [entry.pattern for entry in entries] == ["a.jsonl", "*b.jsonl"]


def test_without_weights_the_first_entry_that_names_a_file_has_it(two):
    entries = read_sources(["b.jsonl", "*.jsonl"])
    assert [entry.weight for entry in entries] == [None, None]
    assert [list(entry.files) for entry in entries] == [[two[1]], [two[0]]]


@pytest.mark.parametrize("name", ["part:2", "1:0.5", "a:b:nan"])
def test_a_path_that_exists_as_written_has_no_weight(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    assert split_weight(str(folder)) == (str(folder), None)
    assert split_weight(f"{folder}:0.5") == (str(folder), 0.5)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (r"C:\text\a.jsonl", (r"C:\text\a.jsonl", None)),
        (r"C:\text\a.jsonl:0.5", (r"C:\text\a.jsonl", 0.5)),
        ("C:/text:2/a.jsonl", ("C:/text:2/a.jsonl", None)),
        ("s:/12", ("s:/12", None)),
        ("missing.jsonl:half", ("missing.jsonl:half", None)),
        ("b/*.parquet:1e-3", ("b/*.parquet", 0.001)),
        (":0.5", (":0.5", None)),
        ("a.jsonl", ("a.jsonl", None)),
    ],
)
def test_only_a_number_after_the_last_colon_is_a_weight(value, expected):
    assert split_weight(value) == expected


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "-0.0", "1e308"])
def test_a_weight_that_is_no_share_is_refused(two, weight):
    with pytest.raises(
        DataError, match=rf"--data a\.jsonl:{re.escape(weight)}: a weight must be a number above 0"
    ):
        read_sources([f"a.jsonl:{weight}", "b.jsonl:1"])


def test_a_weight_that_is_no_number_is_reported(two):
    with pytest.raises(DataError, match=r"--data a\.jsonl:0,7: '0,7' is not a weight; .* a\.jsonl:0\.5"):
        read_sources(["a.jsonl:0,7"])


def test_weights_for_some_entries_only_are_refused_with_the_fix(two):
    with pytest.raises(
        DataError, match=r"--data b\.jsonl:1 has a weight and --data a\.jsonl has none; .* a\.jsonl:0\.5"
    ):
        read_sources(["a.jsonl", "b.jsonl:1"])


def test_a_file_in_two_entries_with_weights_is_refused(two):
    with pytest.raises(DataError, match=r"--data a\.jsonl:1 and --data \*\.jsonl:2 both name .*a\.jsonl"):
        read_sources(["a.jsonl:1", "*.jsonl:2"])


def config_for(tmp_path, *data, **values):
    values = {"max_seq_len": 16, "val_fraction": 0.0, "cache_dir": str(tmp_path / "cache")} | values
    return PretrainConfig(data=data, **values)


def test_entries_are_distinguished_and_their_weights_are_no_part_of_the_cache(two, tmp_path, tokenizer):
    write_jsonl(tmp_path / "c.jsonl", ["one more"])
    mixed = prepare_data(config_for(tmp_path, "[ac].jsonl:3", "b.jsonl:1"), tokenizer)
    assert mixed.weights == (0.75, 0.25)
    assert mixed.built
    assert [part.num_documents for part in mixed.train.parts] == [41, 40]
    assert sum(part.num_tokens for part in mixed.train.parts) == mixed.train.num_tokens
    assert mixed.train.parts[1].first_document == 41
    other = prepare_data(config_for(tmp_path, "[ac].jsonl:1", "b.jsonl:1"), tokenizer)
    plain = prepare_data(config_for(tmp_path, "[ac].jsonl", "b.jsonl"), tokenizer)
    assert not other.built
    assert not plain.built
    assert plain.weights == ()
    assert plain.report.mixture == ()
    assert mixed.fingerprint == other.fingerprint == plain.fingerprint
    assert (mixed.mixture, plain.mixture) == ("75% of 41 documents, 25% of 40 documents", "none")
    assert other.mixture == "50% of 41 documents, 50% of 40 documents"


def test_the_report_tells_the_epochs_of_each_entry(two, tmp_path, tokenizer):
    report = prepare_data(config_for(tmp_path, "a.jsonl:3", "b.jsonl:1"), tokenizer).report
    first, second = report.mixture
    assert (first.name, first.weight) == ("a.jsonl", 0.75)
    # Both files are equally long.
    assert (first.passes, second.passes) == (pytest.approx(1.5, rel=0.02), pytest.approx(0.5, rel=0.02))
    assert "mixture     a.jsonl: 75.0% of the tokens; an epoch is 1.5 epochs of it" in report.lines()


@pytest.mark.parametrize("empty_first", [True, False])
def test_an_entry_with_a_weight_and_no_text_is_refused(two, tmp_path, tokenizer, empty_first):
    write_jsonl(tmp_path / "empty.jsonl", ["  "])
    values = ["a.jsonl:1", "empty.jsonl:1"]
    with pytest.raises(DataError, match=r"--data empty\.jsonl has a weight but no training documents"):
        prepare_data(config_for(tmp_path, *(values[::-1] if empty_first else values)), tokenizer)


def test_held_out_documents_are_no_part_of_an_entry(two, tmp_path, tokenizer):
    data = prepare_data(config_for(tmp_path, "a.jsonl:3", "b.jsonl:1", val_fraction=0.3), tokenizer)
    documents = [part.num_documents for part in data.train.parts]
    assert [source.train.documents for source in data.report.sources] == documents
    assert [source.train.tokens for source in data.report.sources] == [p.num_tokens for p in data.train.parts]
    assert sum(documents) < 80
