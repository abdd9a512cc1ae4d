"""A vocabulary whose ids leave some numbers unused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from minimind.config.options import PretrainConfig
from minimind.data.prepare import prepare_data
from minimind.errors import ConfigError
from minimind.tokenizer import Tokenizer, check_vocab


@pytest.fixture
def tokenizer() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel({"<end>": 0, "a": 3, "b": 9}, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend, eos_token="<end>")


def test_the_embedding_must_reach_the_largest_id(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 10
    assert max(tokenizer.encode("a b")) == 9
    check_vocab(tokenizer, 10)
    with pytest.raises(ConfigError, match="less than the tokenizer's 10 entries"):
        check_vocab(tokenizer, 9)
    assert tokenizer.bytes_per_token().shape == (10,)


def test_data_with_gaps_in_its_ids_is_prepared(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("a b b\n" * 20)
    config = PretrainConfig(
        data=(str(tmp_path / "corpus.txt"),),
        cache_dir=str(tmp_path / "cache"),
        max_seq_len=4,
        val_fraction=0.0,
    )
    data = prepare_data(config, tokenizer)
    assert np.unique(data.train.tokens(0, data.train.num_tokens)).tolist() == [0, 3, 9]
