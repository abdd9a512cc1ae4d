"""How tokens are stored, and which documents are held out."""

from __future__ import annotations

import numpy as np
import pytest

from minimind.config.options import PretrainConfig
from minimind.data.prepare import prepare_data
from minimind.data.shards import token_dtype
from minimind.data.tokenization import hash_text
from support.made_text import ByteTokenizer, write_jsonl


class LastIdTokenizer(ByteTokenizer):
    """Gives every document the largest id as its only token."""

    def encode_batch(self, texts):
        return [[self.vocab_size - 1] for _ in texts]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_the_largest_id_of_a_vocabulary_is_stored_unchanged(tmp_path, vocab_size, dtype):
    assert token_dtype(vocab_size) == dtype
    corpus = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    config = PretrainConfig(
        data=(str(corpus),), cache_dir=str(tmp_path / "cache"), max_seq_len=4, val_fraction=0.0
    )
    data = prepare_data(config, LastIdTokenizer(vocab_size))
    tokens = data.train.document(0)
    assert tokens.dtype == dtype
    assert tokens.tolist() == [1, vocab_size - 1, 2]


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_a_fraction_of_the_documents_is_held_out_by_their_hashes(tmp_path, tokenizer, fraction):
    texts = [f"document number {i}" for i in range(3000)]
    corpus = write_jsonl(tmp_path / "a.jsonl", texts)
    config = PretrainConfig(
        data=(str(corpus),), cache_dir=str(tmp_path / "cache"), max_seq_len=8, val_fraction=fraction
    )
    data = prepare_data(config, tokenizer)
    held_out = [text for text in texts if hash_text(text)[0] < fraction * 2**64]
    shards = data.validation
    found = [tokenizer.decode(shards.document(i).tolist()) for i in range(shards.num_documents)]
    assert found == held_out
    assert data.train.num_documents == 3000 - len(held_out)
    # Three standard deviations.
    assert len(held_out) == pytest.approx(3000 * fraction, abs=3 * (3000 * fraction * (1 - fraction)) ** 0.5)
