"""Text in pieces that are whole, and prompts as documents begin."""

from __future__ import annotations

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from minimind.errors import ConfigError
from minimind.generation.sampling import Sampling
from minimind.generation.text import TextStream, choose_device, continue_texts, encode_prompt, stream_text
from minimind.modeling.config import MiniMindConfig
from minimind.modeling.transformer import MiniMindForCausalLM
from minimind.tokenizer import Tokenizer, load_tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """A vocabulary of bytes and a few words, decoded as those of SentencePiece are."""
    words = ["<unk>", "</s>", "▁the", "▁a", "b"]
    vocabulary = {word: id for id, word in enumerate([*words, *(f"<0x{n:02X}>" for n in range(256))])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return Tokenizer(backend, eos_token="</s>")


TOKENIZERS = {"byte-level": load_tokenizer(), "byte fallback": byte_fallback_tokenizer()}


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60)
@given(data=st.data())
def test_the_pieces_make_up_the_text_and_none_ends_in_half_a_character(kind, data):
    tokenizer = TOKENIZERS[kind]
    texts = st.text(st.sampled_from("ab é漢字🙂👩\u200d👩 the\n"), max_size=20)
    before = tokenizer.encode(data.draw(texts))
    ids = tokenizer.encode(data.draw(texts))
    stream = TextStream(tokenizer.decode, list(before))
    pieces = [stream.push(id) for id in ids]
    assert "\ufffd" not in "".join(pieces)
    assert stream.end() == "", "whole characters do not wait"
    whole = tokenizer.decode(before + ids)
    assert tokenizer.decode(before) + "".join(pieces) == whole


def test_a_character_comes_with_its_last_byte():
    tokenizer = TOKENIZERS["byte fallback"]
    stream = TextStream(tokenizer.decode, [])
    pieces = [stream.push(5 + byte) for byte in "é字b".encode()]
    assert pieces == ["", "é", "", "", "字", "b"]


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60)
@given(data=st.data())
def test_bytes_that_are_no_text_end_up_as_they_are_decoded(kind, data):
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(2, 260), max_size=12))
    stream = TextStream(tokenizer.decode, [])
    pieces = [stream.push(id) for id in ids]
    text = "".join(pieces) + stream.end()
    if kind == "byte-level":
        assert text == tokenizer.decode(ids)
    assert not any(piece.endswith("\ufffd") for piece in pieces)


@pytest.fixture(scope="module")
def model() -> MiniMindForCausalLM:
    torch.manual_seed(0)
    shape = MiniMindConfig(
        vocab_size=6400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return MiniMindForCausalLM(shape)


def test_streamed_and_collected_text_are_the_same(model):
    tokenizer = TOKENIZERS["byte-level"]
    prompts = ["Once upon a time", "", "漢字"]
    written = continue_texts(model, tokenizer, prompts, max_new_tokens=20, seed=3)
    for number, (prompt, text) in enumerate(zip(prompts, written, strict=True)):
        pieces = list(stream_text(model, tokenizer, prompt, max_new_tokens=20, seed=3 + number))
        assert "".join(pieces) == text.text
        assert len(pieces) > 5
        assert (text.prompt, text.tokens, text.ended) == (prompt, 20, "length")


def test_the_end_token_ends_a_text_and_is_not_shown(model):
    tokenizer = TOKENIZERS["byte-level"]
    ending = MiniMindForCausalLM(model.config)
    with torch.no_grad():
        ending.model.norm.weight.zero_()  # all logits are equal: the first token of all is drawn
    first = Sampling(temperature=0)
    (text,) = continue_texts(ending, tokenizer, ["a"], first, max_new_tokens=4)
    assert text.tokens == 4
    assert text.text == ""
    tokenizer.eos_token_id, ours = 0, tokenizer.eos_token_id
    try:
        (text,) = continue_texts(ending, tokenizer, ["a"], first, max_new_tokens=4)
    finally:
        tokenizer.eos_token_id = ours
    assert (text.tokens, text.ended, text.text) == (1, "end", "")


def test_a_prompt_begins_as_documents_do():
    with_start, without = TOKENIZERS["byte-level"], TOKENIZERS["byte fallback"]
    assert encode_prompt(with_start, "ab") == [with_start.bos_token_id, *with_start.encode("ab")]
    assert encode_prompt(with_start, "") == [with_start.bos_token_id]
    assert encode_prompt(without, "b") == without.encode("b")
    assert encode_prompt(without, "") == [without.eos_token_id]


def test_a_device_that_is_not_there_is_refused():
    assert choose_device("cpu").type == "cpu"
    missing = "mps" if torch.cuda.is_available() else "cuda"
    with pytest.raises(ConfigError, match=f"--device {missing} is not available"):
        choose_device(missing)
