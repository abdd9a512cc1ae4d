"""The tokenizer: any text comes back, no text spells a special token, roles are found, mistakes explained."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from minimind.config.options import PretrainConfig
from minimind.data.prepare import prepare_data
from minimind.errors import ConfigError, DataError
from minimind.tokenizer import (
    PACKAGED,
    SPECIAL_TOKENS,
    Tokenizer,
    check_vocab,
    load_tokenizer,
    sample_text,
    train_tokenizer,
)

SHIPPED = load_tokenizer(None)
PIECES = st.one_of(
    st.text(),
    st.sampled_from([*SPECIAL_TOKENS, "<|", "im_end", "|>", " ", "\r\n", "don't", "二〇二四", "١٢٣", "👩‍🚀"]),
)
TEXTS = st.lists(PIECES).map("".join)


def unigram(*pieces: str) -> tokenizers.Tokenizer:
    """A vocabulary as sentencepiece makes them, in which special tokens are pieces like any other."""
    pieces = pieces or ("<unk>", "</s>", "▁he", "▁", "l", "o", "好", "<", "/", "s", ">")
    backend = tokenizers.Tokenizer(models.Unigram([(piece, -n) for n, piece in enumerate(pieces)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<unk>", "</s>"])
    return backend


def words(*entries: str) -> tokenizers.Tokenizer:
    vocabulary = {entry: id for id, entry in enumerate(entries)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=entries[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def saved(backend: tokenizers.Tokenizer, folder: Path, **config: object) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


# The tokenizer in the package


def test_shipped_tokenizer_has_the_promised_entries():
    assert SHIPPED.vocab_size == 6400
    assert (SHIPPED.pad_token_id, SHIPPED.bos_token_id, SHIPPED.eos_token_id) == (0, 1, 2)
    for id, name in enumerate(SPECIAL_TOKENS):
        assert SHIPPED.decode([id], skip_special_tokens=False) == name
        assert SHIPPED.decode([id]) == ""


@given(TEXTS)
@example("".join(SPECIAL_TOKENS))
@example("".join(map(chr, range(0x250))))
def test_any_text_comes_back_and_holds_no_special_token(text):
    ids = SHIPPED.encode(text)
    assert SHIPPED.decode(ids) == text
    assert all(len(SPECIAL_TOKENS) <= id < SHIPPED.vocab_size for id in ids)


@given(TEXTS)
def test_bytes_per_token_add_up_to_the_length_of_the_text(text):
    assert SHIPPED.bytes_per_token()[SHIPPED.encode(text)].sum() == len(text.encode())


@given(st.lists(TEXTS, max_size=5))
def test_a_batch_is_encoded_as_its_texts_one_by_one(texts):
    assert SHIPPED.encode_batch(texts) == [SHIPPED.encode(text) for text in texts]


def test_every_byte_has_an_entry():
    rules = json.loads((PACKAGED / "tokenizer.json").read_text(encoding="utf-8"))
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(rules["model"]["vocab"])


def test_digits_are_encoded_one_by_one():
    assert len(SHIPPED.encode("20240131")) == 8


def test_half_a_surrogate_pair_becomes_the_replacement_character():
    assert SHIPPED.decode(SHIPPED.encode("a\ud800b\udc00c")) == "a\ufffdb\ufffdc"
    assert SHIPPED.decode(SHIPPED.encode("a\ud83d\ude00")) == "a😀"
    assert SHIPPED.encode_batch(["x", "\ud800"]) == [SHIPPED.encode("x"), SHIPPED.encode("\ufffd")]


def test_special_tokens_stay_out_of_reach_after_pickling():
    copy = pickle.loads(pickle.dumps(SHIPPED))
    assert copy.encode("<|im_end|>") == SHIPPED.encode("<|im_end|>")
    assert copy.fingerprint == SHIPPED.fingerprint


# Saving


@pytest.mark.parametrize("source", ["shipped", "upstream", "unigram"])
def test_transformers_loads_what_is_saved_and_gives_the_same_ids(source, tmp_path, request):
    transformers = pytest.importorskip("transformers")
    if source == "shipped":
        tokenizer = SHIPPED
    elif source == "upstream":
        tokenizer = load_tokenizer(request.getfixturevalue("shared") / "compat" / "minimind3_tokenizer.json")
    else:
        tokenizer = Tokenizer(unigram(), eos_token="</s>")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("hello world", " two  spaces\n\n", "深度学习 2024", "it's", "l'o"):
        ids = tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )


def test_saving_keeps_fingerprint_and_chat_template(tmp_path, shared):
    tokenizer = load_tokenizer(shared / "compat" / "minimind3_tokenizer.json")
    tokenizer.save(tmp_path / "new")
    again = load_tokenizer(tmp_path / "new")
    assert again.fingerprint == tokenizer.fingerprint != SHIPPED.fingerprint
    theirs = json.loads((shared / "compat" / "minimind3_tokenizer_config.json").read_text())
    ours = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())
    assert ours["chat_template"] == theirs["chat_template"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "checksums.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_a_chat_template_in_a_file_of_its_own_is_passed_on(tmp_path, shared):
    transformers = pytest.importorskip("transformers")
    for name in ("tokenizer", "tokenizer_config"):
        text = (shared / "compat" / f"minimind3_{name}.json").read_text(encoding="utf-8")
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
    template = load_tokenizer(tmp_path).chat_template
    # transformers 5 takes it out of the tokenizer_config.json.
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "five")
    tokenizer = load_tokenizer(tmp_path / "five")
    assert tokenizer.chat_template == template
    tokenizer.save(tmp_path / "ours")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "ours").chat_template == template
    (tmp_path / "ours" / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    (tmp_path / "ours" / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"--tokenizer: cannot read .*chat_template.jinja"):
        load_tokenizer(tmp_path / "ours")


# Tokenizers of others


def test_upstream_tokenizer_loads_with_its_roles(shared):
    tokenizer = load_tokenizer(str(shared / "compat" / "minimind3_tokenizer.json"))
    assert tokenizer.vocab_size == 6400
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    text = "a<|im_end|>b <think> 世界"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.bytes_per_token()[ids].sum() == len(text.encode())


def test_a_config_beside_it_names_the_roles(tmp_path):
    backend = words("<unk>", "<s>", "</s>", "stop", "fill", "a")
    file = saved(backend, tmp_path, eos_token={"content": "stop"}, pad_token="fill", bos_token=None)
    tokenizer = load_tokenizer(file)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (None, 3, 4)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def test_without_a_config_known_names_are_the_roles(tmp_path):
    tokenizer = load_tokenizer(saved(words("<unk>", "a", "<eos>", "<bos>"), tmp_path))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (3, 2)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_roles_change_the_fingerprint(tmp_path):
    (tmp_path / "other").mkdir()
    backend = words("<unk>", "a", "<eos>", "<bos>")
    backend.add_special_tokens(["<eos>", "<bos>"])
    one = load_tokenizer(saved(backend, tmp_path))
    other = load_tokenizer(saved(backend, tmp_path / "other", eos_token="<bos>", bos_token="<eos>"))
    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("backend", "text", "left"),
    [
        (unigram(), "helo</s>", "helo"),
        (unigram(), "</s>", ""),
        (words("<unk>", "</s>", "a"), "a </s> a", "a a"),
        (words("</s>", "a"), "a b", "a"),
    ],
)
def test_text_cannot_spell_the_end_token_of_a_word_or_unigram_vocabulary(backend, text, left):
    tokenizer = Tokenizer(backend, eos_token="</s>")
    ids = tokenizer.encode(text)
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids).strip() == left


def test_unknown_words_stay_where_the_unknown_token_has_no_role():
    assert Tokenizer(words("<unk>", "</s>", "a"), eos_token="</s>").encode("a b") == [2, 0]


def test_bytes_of_a_sentencepiece_vocabulary():
    tokenizer = Tokenizer(unigram("<unk>", "</s>", "l", "▁he", "好", "<0xE5>"), eos_token="</s>")
    assert tokenizer.bytes_per_token().tolist() == [0, 0, 1, 3, 3, 1]


def test_bytes_of_a_wordpiece_vocabulary():
    vocabulary = {piece: id for id, piece in enumerate(("[UNK]", "[SEP]", "a", "##ing", "go"))}
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[UNK]", "[SEP]"])
    assert Tokenizer(backend, eos_token="[SEP]").bytes_per_token().tolist() == [0, 0, 2, 3, 3]


def test_truncation_padding_and_templates_of_an_earlier_use_are_ignored(tmp_path):
    backend = tokenizers.Tokenizer.from_str(SHIPPED._backend.to_str())
    backend.enable_truncation(2)
    backend.enable_padding(length=64)
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    text = "one two three four five"
    tokenizer = load_tokenizer(saved(backend, tmp_path))
    assert tokenizer.encode(text) == SHIPPED.encode(text)
    tokenizer.save(tmp_path)
    rules = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert (rules["truncation"], rules["padding"]) == (None, None)


def test_normalizing_tokenizers_load(tmp_path):
    backend = tokenizers.Tokenizer.from_str(SHIPPED._backend.to_str())
    backend.normalizer = normalizers.NFC()
    tokenizer = load_tokenizer(saved(backend, tmp_path))
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "\u00e9"


# Mistakes


def test_a_vocabulary_larger_than_the_model_is_refused():
    check_vocab(SHIPPED, 6400)
    with pytest.raises(ConfigError, match=r"--vocab-size 6399 .* 6400 entries.*at least 6400"):
        check_vocab(SHIPPED, 6399)
    # The size of a model that is there cannot be chosen.
    with pytest.raises(ConfigError, match=r"the embedding of out/model has only 6399; pass .* --tokenizer"):
        check_vocab(SHIPPED, 6399, "out/model")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*tokenizer.json.*save_pretrained"),
        ("not JSON", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        ("[1, 2]", "not a JSON object"),
        ('{"vocab": {}}', "is not a tokenizer: it has no 'model'"),
        ('{"model": {"type": "Unheard of"}}', "cannot read it"),
    ],
)
def test_what_is_no_tokenizer_is_refused(content, message, tmp_path):
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(ConfigError, match=f"^--tokenizer.*{message}"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_an_end_token_is_refused_with_the_fix(tmp_path):
    file = saved(words("<unk>", "a", "b"), tmp_path)
    with pytest.raises(ConfigError, match=r'no end-of-document token.*tokenizer_config\.json.*"eos_token"'):
        load_tokenizer(file)


@pytest.mark.parametrize("name", ["<|done|>", 5])
def test_a_config_that_names_a_missing_token_is_refused(tmp_path, name):
    file = saved(words("<unk>", "</s>", "5"), tmp_path, eos_token=name)
    with pytest.raises(ConfigError) as refused:
        load_tokenizer(file)
    assert f"the vocabulary has no {name!r}, the eos_token that tokenizer_config.json" in str(refused.value)


# Training


def prose(documents: int = 60) -> list[str]:
    return [
        f"In 2024 the {n % 7}th fox of {n} jumps over lazy dog number {n * n}; 第{n}只狐狸跳过懒狗。"
        for n in range(documents)
    ]


def test_trained_tokenizer_is_of_the_packages_kind_and_repeatable():
    tokenizer = train_tokenizer(prose(), 320)
    assert tokenizer.vocab_size == 320
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    text = "A lazy fox 狐狸 <|im_end|>\u0000\U0010ffff"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(" lazy")) == 1
    assert len(tokenizer.encode("2024")) == 4
    assert train_tokenizer(prose(), 320).fingerprint == tokenizer.fingerprint


def test_training_takes_a_bounded_repeatable_sample_from_all_over_the_text():
    texts = [f"word{n} " * 50 for n in range(300)] + ["x" * 200_000]

    def sample(seed: int) -> list[str]:
        return sorted(sample_text(iter(texts), max_bytes=60_000, seed=seed))

    first = sample(0)
    assert 40_000 < sum(map(len, first)) <= 60_000
    assert sample(0) == first
    assert sample(1) != first
    positions = [int(text.split()[0][4:]) for text in first if text.startswith("word")]
    assert min(positions) < 60
    assert max(positions) > 240
    assert sorted(sample_text(texts[:9], max_bytes=60_000)) == sorted(texts[:9])


def test_training_reports_progress():
    calls: list[tuple[int, int]] = []
    train_tokenizer(["狐狸" * 200, "fox " * 100], 275, progress=lambda *call: calls.append(call))
    assert calls == [(1, 1200), (2, 1600)]


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ConfigError, match=r"--vocab-size 271 .*at least 272"):
        train_tokenizer(prose(), 271)


def test_too_little_text_says_how_many_entries_it_gave():
    with pytest.raises(DataError, match=r"enough for only 272 of 6400 entries.*--vocab-size 272"):
        train_tokenizer([], 6400)
    with pytest.raises(DataError, match="enough for only 272 of"):
        train_tokenizer(["every pair once"], 6400)
    with pytest.raises(DataError, match=r"enough for only (2[789]\d|3\d\d) of"):
        train_tokenizer(["the fox the fox the fox"], 6400)


def test_an_error_in_the_source_of_the_text_comes_through():
    def broken():
        yield "text"
        raise DataError("a.jsonl:2 is not JSON")

    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        train_tokenizer(broken(), 300)


# Processes


FORK = """
import os, subprocess, sys
from minimind.tokenizer import load_tokenizer
tokenizer = load_tokenizer()
texts = ["some text"] * 4096
before = tokenizer.encode_batch(texts)
subprocess.run([sys.executable, "-c", ""], preexec_fn=lambda: None, check=True)
child = os.fork()
if child == 0:
    os._exit(0 if tokenizer.encode_batch(texts) == before else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print(os.environ["TOKENIZERS_PARALLELISM"])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("given", "afterwards"), [(None, "true"), ("false", "false")])
def test_forked_children_encode_without_warnings(given, afterwards):
    environment = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    if given is not None:
        environment["TOKENIZERS_PARALLELISM"] = given
    result = subprocess.run(
        [sys.executable, "-c", FORK], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip() == afterwards


def test_sizes_are_float32_of_one_row():
    sizes = SHIPPED.bytes_per_token()
    assert sizes.dtype == np.float32
    assert sizes.shape == (6400,)


def test_deep_json_is_refused_in_one_sentence(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text("[" * 200_000)
    with pytest.raises(ConfigError, match=r"--tokenizer .*tokenizer\.json is not JSON"):
        load_tokenizer(file)
    file.write_text(json.dumps(SHIPPED.rules()))
    (tmp_path / "tokenizer_config.json").write_text('{"a":' * 200_000)
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json is not JSON"):
        load_tokenizer(file)


def test_a_pattern_that_panics_is_refused_in_one_sentence(tmp_path):
    rules = SHIPPED.rules()
    rules["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(a+)+$"
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(rules))
    tokenizer = load_tokenizer(file)
    with pytest.raises(ConfigError, match=r"--tokenizer: its rules fail on this text .*retry-limit"):
        tokenizer.encode("a" * 40 + "b")


def test_unknown_tokens_carry_their_bytes_and_are_warned_of(tmp_path):
    """Bits per byte divide by the bytes of the text, also where the vocabulary lacks it."""
    backend = tokenizers.Tokenizer(
        models.WordLevel({"[UNK]": 0, "</s>": 1, "hello": 2, "world": 3}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.unknown_token_id == 0
    assert SHIPPED.unknown_token_id is None
    text = "hello 世界 world 你好"
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for _ in range(20)))
    config = PretrainConfig(
        data=(str(path),), max_seq_len=16, val_fraction=0.0, cache_dir=str(tmp_path / "c")
    )
    with pytest.warns(UserWarning, match=r"40\.0% of the training tokens are the unknown token"):
        data = prepare_data(config, tokenizer)
    assert "unknown     40.00% of the training tokens are the unknown token" in data.report.lines()
    ids = data.train.tokens(0, data.train.num_tokens)
    assert data.train.bytes_per_token(tokenizer)[ids].sum() == pytest.approx(20 * len(text.encode()))


def test_a_byte_order_mark_is_accepted(tmp_path):
    SHIPPED.save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = tmp_path / name
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_tokenizer(tmp_path).fingerprint == SHIPPED.fingerprint


def test_bytes_are_measured_after_a_word_and_not_after_a_special_token():
    # At the beginning of a text the decoder drops the space of "▁he".
    backend = unigram("<unk>", "</s>", "stop", "▁he", "l")
    backend.add_special_tokens(["stop"])
    assert Tokenizer(backend, eos_token="</s>").bytes_per_token().tolist() == [0, 0, 0, 3, 1]
