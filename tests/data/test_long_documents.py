"""A long document costs little memory beside its text and has the ids of the whole text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers

from minimind.config.options import PretrainConfig
from minimind.data import tokenization
from minimind.data.long_documents import cut_pattern, pieces
from minimind.data.prepare import prepare_data
from minimind.tokenizer import SPLIT, load_tokenizer

SHIPPED = load_tokenizer()
WORDS = st.sampled_from(
    [
        "foo",
        "Bar's",
        "don't",
        "42",
        "3.14",
        "中文",
        "，",
        "。",
        "'ll",
        "-",
        "_x",
        "é",
        "e\u0301",
        "ß",
        "'",
        " ",
    ]
) | st.sampled_from(["\u00a0", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\u3000", "/", "}", "x.y", "안녕"])
TEXTS = st.lists(WORDS | st.characters(exclude_categories=["Cs"]), max_size=60).map("".join)
LLAMA = SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def splitting(pre_tokenizer, normalizer=None) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    return backend


KNOWN = {
    "qwen2": splitting(pre_tokenizers.Split(Regex(SPLIT), "isolated")),
    "llama3": splitting(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    ),
    "gpt2": splitting(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "gpt2 with a space": splitting(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "bert": splitting(pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()),
    "words": splitting(pre_tokenizers.Whitespace(), normalizers.NFKC()),
    "split and digits": splitting(
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(True)]),
        normalizers.Lowercase(),
    ),
    "metaspace": splitting(pre_tokenizers.Metaspace()),
    "metaspace, first": splitting(pre_tokenizers.Metaspace(prepend_scheme="first")),
}


def words(backend: tokenizers.Tokenizer, text: str) -> list[str]:
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("name", KNOWN)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_pieces_are_split_into_the_same_words_as_the_whole(name, text):
    backend = KNOWN[name]
    cut = cut_pattern(json.loads(backend.to_str()))
    assert cut is not None
    parts = list(pieces(text, cut, size=5))
    assert "".join(parts) == text
    assert [word for part in parts for word in words(backend, part)] == words(backend, text)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_pieces_have_the_ids_of_the_whole(text):
    parts = pieces(text, cut_pattern(SHIPPED.rules()), size=5)
    assert [id for ids in SHIPPED.encode_batch(list(parts)) for id in ids] == SHIPPED.encode(text)


def test_prose_is_cut_often():
    cut = cut_pattern(SHIPPED.rules())
    for text in ("one two three " * 100, "中文没有空格，只有标点。" * 100, "lines\n" * 200):
        assert max(map(len, pieces(text, cut, size=50))) < 70


@pytest.mark.parametrize(
    "backend",
    [
        splitting(pre_tokenizers.Split(Regex(r".*?end"), "isolated")),
        splitting(pre_tokenizers.ByteLevel(use_regex=False)),
        splitting(pre_tokenizers.Whitespace(), normalizers.Replace(" ", "_")),
        splitting(
            pre_tokenizers.Whitespace(), normalizers.Sequence([normalizers.Strip(), normalizers.NFC()])
        ),
    ],
)
def test_a_tokenizer_that_may_join_is_given_the_whole(backend):
    assert cut_pattern(json.loads(backend.to_str())) is None
    assert list(pieces("one two", None, size=1)) == ["one two"]


def test_an_added_token_with_a_space_is_never_cut():
    backend = splitting(pre_tokenizers.Whitespace())
    backend.add_tokens(["new york"])
    assert cut_pattern(json.loads(backend.to_str())) is None


def test_the_cache_has_the_ids_of_the_whole_text(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenization, "_LONG_CHARACTERS", 1000)
    monkeypatch.setattr(tokenization, "PIECE_CHARACTERS", 100)
    texts = ["short one", "a longer text, with 中文。 " * 300, "another", "x" * 5000, "line\n" * 500]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = PretrainConfig(
        data=(str(path),), max_seq_len=32, val_fraction=0.0, cache_dir=str(tmp_path / "cache")
    )
    train = prepare_data(config, SHIPPED).train
    for number, text in enumerate(texts):
        assert train.document(number).tolist() == [1, *SHIPPED.encode(text), 2]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".txt", ".json"])
def test_one_document_of_20_mb_takes_less_than_300_mb(tmp_path, suffix):
    text = "some words, and others that follow them in a long line; " * 380_000
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": [text]}), path)
    elif suffix == ".txt":
        path.write_text(text)
    else:
        path.write_text(json.dumps({"text": text} if suffix == ".jsonl" else [{"text": text}]))

    def peak(*data: Path) -> int:
        code = (
            "import resource, sys\n"
            "from minimind.config.options import PretrainConfig\n"
            "from minimind.data.prepare import prepare_data\n"
            "from minimind.tokenizer import load_tokenizer\n"
            "config = PretrainConfig(data=tuple(sys.argv[2:]), cache_dir=sys.argv[1], val_fraction=0.0)\n"
            "prepare_data(config, load_tokenizer())\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)\n"
        )
        paths = os.pathsep.join(path for path in sys.path if path)
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "cache"), *map(str, data)],
            env=os.environ | {"PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=True,
        )
        return int(done.stdout)

    small = tmp_path / "small.jsonl"
    small.write_text(json.dumps({"text": text[:100_000]}))
    assert peak(path) - peak(small) < len(text) / 1e6 + 300
