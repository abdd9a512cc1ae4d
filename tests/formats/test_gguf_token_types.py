"""The type of every token in a GGUF file, by the numbers of llama.cpp's `enum llama_token_type`."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken

from minimind.formats.gguf_tokenizer import vocabulary
from minimind.tokenizer import Tokenizer, load_tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


@pytest.fixture
def tokenizer() -> Tokenizer:
    backend = load_tokenizer(None)._backend
    copy = type(backend).from_str(backend.to_str())
    copy.add_tokens([AddedToken("<think>", special=False), AddedToken("<|fim_prefix|>", special=False)])
    return Tokenizer(copy, eos_token="<|im_end|>", bos_token="<|im_start|>", pad_token="<|endoftext|>")


def test_each_token_has_the_type_that_llama_cpp_expects(tokenizer: Tokenizer) -> None:
    values = vocabulary(tokenizer, tokenizer.vocab_size + 2)
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == tokenizer.vocab_size + 2
    special = {i for i, token in tokenizer._added.items() if token.special}
    assert len(special) == 16
    marks = {tokens.index("<think>"): USER_DEFINED, tokens.index("<|fim_prefix|>"): CONTROL}
    unused = dict.fromkeys((tokenizer.vocab_size, tokenizer.vocab_size + 1), UNUSED)
    expected = dict.fromkeys(range(len(types)), NORMAL) | dict.fromkeys(special, CONTROL) | marks | unused
    assert dict(enumerate(types)) == expected
    assert tokens[-2:] == [f"[PAD{tokenizer.vocab_size}]", f"[PAD{tokenizer.vocab_size + 1}]"]
    assert values["tokenizer.ggml.add_bos_token"] is True
    assert values["tokenizer.ggml.add_eos_token"] is False
