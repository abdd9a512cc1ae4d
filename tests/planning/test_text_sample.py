"""Samples of training text, and tokenizers trained on them."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest

from minimind import PretrainConfig, load_tokenizer
from minimind.data.shards import random_shards
from minimind.data.tokenization import hash_text
from minimind.errors import DataError
from minimind.evaluation.scaling_law import TYPICAL, Difficulty
from minimind.planning import text_sample
from minimind.planning.text_sample import TextSample, _spread, read_sample, text_size, trained_tokenizer

WORDS = [chr(97 + k) + "eiou"[k % 4] + chr(110 + k % 9) for k in range(17)]


def documents(number: int) -> list[str]:
    return [
        " ".join(WORDS[(k * k + 3 * n) % len(WORDS)] + str((k * n) % 97) for k in range(40))
        for n in range(number)
    ]


def write(path: Path, texts: list[str]) -> Path:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)
    return path


def config(path: Path, **options: object) -> PretrainConfig:
    return PretrainConfig(data=(str(path),), cache_dir=str(path.parent / "cache"), **options)  # type: ignore[arg-type]


def test_a_small_text_is_read_whole(tmp_path: Path) -> None:
    texts = documents(50)
    sample = read_sample(config(write(tmp_path / "a.jsonl", texts)))
    assert list(sample.documents) == texts
    assert sample.num_bytes == sum(map(len, texts))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_the_size_of_a_large_text_is_estimated(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = documents(3000)
    monkeypatch.setattr(text_sample, "SAMPLE_BYTES", 100_000)
    monkeypatch.setattr(text_sample, "_AHEAD_BYTES", 50_000)
    sample = read_sample(config(write(tmp_path / name, texts)))
    assert sum(map(len, sample.documents)) < 200_000
    # A compressed file is read in blocks of 128 kB.
    assert sample.num_bytes == pytest.approx(sum(map(len, texts)), rel=0.02 if name == "a.jsonl" else 0.2)


def test_a_large_file_is_sampled_from_all_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"part {n // 100} " + text for n, text in enumerate(documents(3200))]
    monkeypatch.setattr(text_sample, "SAMPLE_BYTES", 100_000)
    sample = read_sample(config(write(tmp_path / "a.jsonl", texts)))
    assert {text.split()[1] for text in sample.documents} == {str(n) for n in range(32)}


@pytest.mark.parametrize(("times", "spread"), [(1.9, False), (2.2, True)])
def test_a_file_of_up_to_twice_the_sample_is_read_from_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: float, spread: bool
) -> None:
    texts = documents(400)
    path = write(tmp_path / "a.jsonl", texts)
    monkeypatch.setattr(text_sample, "SAMPLE_BYTES", path.stat().st_size / times)
    sample = read_sample(config(path)).documents
    assert (sample == tuple(texts[: len(sample)])) == (not spread)
    assert len(sample) < 300


@pytest.mark.parametrize(("weights", "share"), [(("", ""), 0.25), ((":0.6", ":0.4"), 0.6)])
def test_a_file_has_the_share_of_the_sample_that_it_has_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: tuple[str, str], share: float
) -> None:
    first = write(tmp_path / "a.jsonl", ["first " + text for text in documents(1000)])
    second = write(tmp_path / "b.jsonl", ["other " + text for text in documents(3000)])
    monkeypatch.setattr(text_sample, "SAMPLE_BYTES", 100_000)
    monkeypatch.setattr(text_sample, "_AHEAD_BYTES", 10_000)
    data = tuple(f"{path}{weight}" for path, weight in zip((first, second), weights, strict=True))
    sample = read_sample(PretrainConfig(data=data)).documents
    number = sum(text.startswith("first") for text in sample)
    assert number / len(sample) == pytest.approx(share, abs=0.05)


def test_the_difficulty_is_that_of_other_documents_and_falls_with_more_to_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = random.Random(0)

    def difficulty(words: int, number: int = 400) -> Difficulty:
        texts = (" ".join(WORDS[draw.randrange(words)] for _ in range(60)) for _ in range(number))
        return text_sample._difficulty(TextSample(tuple(texts), 1e6), 0.0)

    easy, hard = difficulty(3), difficulty(17)
    assert 0 < easy.bits < hard.bits < 8
    assert 0 < hard.slope < 0.3
    # From few documents it is what 1 MB would reach.
    draw.seed(1)
    few = difficulty(17, 50)
    monkeypatch.setattr(text_sample, "_BIGRAM_BYTES", 16_000_000)
    draw.seed(1)
    assert difficulty(17, 50).bits == pytest.approx(few.bits / 16**TYPICAL.slope)


@pytest.mark.parametrize("texts", [("",), ("a",), ("word " * 4000,), ("", "x" * 50)])
def test_few_documents_have_a_difficulty(texts: tuple[str, ...]) -> None:
    found = text_sample._difficulty(TextSample(texts, 1e6), 0.05)
    assert 0 <= found.bits < 20
    assert found.documents >= 1
    assert found.at(1e5) == pytest.approx(found.bits, rel=0.5)


def test_the_sample_has_documents_of_the_validation_data(tmp_path: Path) -> None:
    training, held = write(tmp_path / "a.jsonl", documents(20)), write(tmp_path / "v.jsonl", documents(7)[3:])

    def sample(*val_data: str) -> TextSample:
        return read_sample(PretrainConfig(data=(str(training),), val_data=val_data))

    assert sample(str(held)).validation == tuple(documents(7)[3:])
    assert sample(str(held)).documents == sample().documents == tuple(documents(20))
    # Data sets of the Hub are not loaded for it.
    assert sample("hf://owner/name").validation == ()
    with pytest.raises(DataError, match=r"^--val-data .*missing.jsonl does not exist"):
        sample(str(tmp_path / "missing.jsonl"))


def test_the_difficulty_is_that_of_the_validation_documents() -> None:
    draw = random.Random(0)

    def texts(words: int, number: int, length: int = 60) -> tuple[str, ...]:
        return tuple(" ".join(WORDS[draw.randrange(words)] for _ in range(length)) for _ in range(number))

    training = texts(3, 400)
    alike, other = (TextSample(training, 1e6, validation) for validation in (texts(3, 200), texts(17, 200)))
    easy, hard = (text_sample._difficulty(sample, 0.0) for sample in (alike, other))
    assert easy.bits < 0.7 * hard.bits
    assert easy.documents == pytest.approx(200, rel=0.02)
    # One long document is half of the data.
    (long,) = texts(3, 1, 60 * 200)
    few = text_sample._difficulty(TextSample(training, 1e6, (*alike.validation, long)), 0.0)
    assert few.documents == pytest.approx(4, rel=0.05)


def test_the_documents_that_a_run_holds_out_are_predicted_and_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(text_sample, "_LEAST_VALIDATION", 100)
    texts = tuple(documents(400))
    held_out = {text for text in texts if hash_text(text)[0] / 2.0**64 < 0.2}
    seen: list[list[list[int]]] = []

    def bits(counted: list[list[int]], predicted: list[list[int]], num_bytes: int) -> float:
        seen.append([counted, predicted])
        return 2.0

    monkeypatch.setattr(text_sample, "bigram_bits", bits)
    found = text_sample._difficulty(TextSample(texts, 1e5), 0.2)
    encode = load_tokenizer().encode
    counted, predicted = seen[0]
    assert sorted(predicted) == sorted(map(encode, held_out))
    assert sorted(counted) == sorted(encode(text) for text in texts if text not in held_out)
    assert found.documents == pytest.approx(len(held_out), rel=0.02)


def test_pieces_from_all_over_the_text_are_counted_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_sample, "_BIGRAM_BYTES", 20_000)
    monkeypatch.setattr(text_sample, "_PIECE", 200)
    counted: list[str] = []
    tokenizer = load_tokenizer()

    def bits(ids: list[list[int]], predicted: list[list[int]], num_bytes: int) -> float:
        counted[:] = counted or map(tokenizer.decode, ids)
        return 2.0

    monkeypatch.setattr(text_sample, "bigram_bits", bits)
    # Half of the text is one document.
    training = ("long " * 8000, *("short " * 40 for _ in range(167)))
    text_sample._difficulty(TextSample(training, 1e5, tuple(documents(200))), 0.0)
    assert sum(map(len, counted)) == pytest.approx(20_000, abs=200)
    assert 0.3 < sum("long" in piece for piece in counted) / len(counted) < 0.6


def test_vocabularies_are_prefixes_of_one_that_is_trained_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_sample, "VOCABULARIES", (290, 300, 310, 10**6))
    monkeypatch.setattr(text_sample, "BYTES_PER_ENTRY", 10)
    options = config(write(tmp_path / "a.jsonl", documents(100)))
    sample = read_sample(options)
    assert sample.vocabularies() == (290, 300, 310)
    size = text_size(options, sample, choose_tokenizer=True, val_fraction=0.01)
    packaged, *trained = size.tokenizers
    assert (packaged.vocab_size, packaged.trained) == (load_tokenizer().vocab_size, False)
    assert [choice.vocab_size for choice in trained] == [290, 300, 310]
    lengths = [choice.bytes_per_token for choice in trained]
    assert 0.5 < lengths[0] < lengths[1] < lengths[2]
    assert size.num_bytes == pytest.approx(0.99 * sample.num_bytes)
    monkeypatch.setattr(text_sample, "_train", lambda sample: pytest.fail("trained twice"))
    folder = trained_tokenizer(options, sample, 300)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == 300
    text = "alpha3 omega, never seen: é"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert trained_tokenizer(options, sample, 300) == folder


def test_a_cache_that_cannot_be_written_does_not_hinder_the_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_sample, "VOCABULARIES", (290, 10**6))
    monkeypatch.setattr(text_sample, "BYTES_PER_ENTRY", 10)
    options = config(write(tmp_path / "a.jsonl", documents(100)))
    (tmp_path / "cache").write_text("in the way")
    size = text_size(options, read_sample(options), choose_tokenizer=True)
    assert [choice.vocab_size for choice in size.tokenizers] == [load_tokenizer().vocab_size, 290]


def test_only_the_given_tokenizer_counts_where_none_is_to_be_chosen(tmp_path: Path) -> None:
    sample = TextSample(tuple(documents(10)), 1e4)
    size = text_size(config(tmp_path / "a"), sample, choose_tokenizer=False)
    assert [choice.trained for choice in size.tokenizers] == [False]


def test_a_text_that_is_too_uniform_for_a_tokenizer_uses_that_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_sample, "BYTES_PER_ENTRY", 1)
    sample = TextSample(("ab " * 400,) * 4, 5e3)
    size = text_size(config(tmp_path / "a"), sample, choose_tokenizer=True)
    assert sample.vocabularies()
    assert [choice.trained for choice in size.tokenizers] == [False]


def test_invalid_lines_are_left_to_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = ["[" * 100_000, '{"text": "\\ud800"}', "5", "", '{"text": "good"}']
    path.write_text("\n".join(lines))
    assert set(_spread(path, "text", 1e9)[0]) == {"good"}


def test_a_step_is_measured_on_documents_as_long_as_those_of_the_text(tmp_path: Path) -> None:
    sample = TextSample(("a" * 299, "é" * 2999, ""), 1e4)
    lengths = sample.document_lengths(bytes_per_token=2.0)
    assert lengths == [151, 3000, 2]
    shards = random_shards(tmp_path / "tokens", 100, lengths)
    found = set(np.diff(shards.offsets).tolist())
    assert found == set(lengths)
    assert 1.5e6 < shards.num_tokens < 3.5e6
    long = random_shards(tmp_path / "long", 100, [10**9])
    assert long.num_documents == 4
    assert long.num_tokens < 3e6
