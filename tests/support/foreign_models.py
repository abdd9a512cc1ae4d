"""Tiny random models of transformers, as folders with a tokenizer."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from minimind.config.options import PretrainConfig
from minimind.tokenizer import Tokenizer, train_tokenizer

from .tiny_runs import WORDS

# By model type, what makes them tiny.
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA, "tie_word_embeddings": True},
    "qwen2": _LLAMA,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    # Wider than the documents by which the separation is measured.
    "mistral": {**_LLAMA, "sliding_window": 8},
    "opt": {
        **{name: _LLAMA[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
        **{"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128},
    },
    "mixtral": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "bert": {
        **{name: _LLAMA[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
        "intermediate_size": 64,
    },
}


def continuing(folder: str | Path, **options: Any) -> PretrainConfig:
    """Return options of a run that continues the weights there, whose sizes are not given."""
    return PretrainConfig(from_weight=str(folder), max_seq_len=32, **options)


@cache
def tokenizer() -> Tokenizer:
    return train_tokenizer([" ".join(WORDS[number:] + WORDS) for number in range(len(WORDS))], 300)


def save_shape(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a model of that type, the same each time."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    own = tokenizer()
    ids = {"bos_token_id": own.bos_token_id, "eos_token_id": own.eos_token_id, "pad_token_id": None}
    config = CONFIG_MAPPING[name](**SHAPES[name], vocab_size=own.vocab_size, **ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.max_length = 77
    model.save_pretrained(folder)
    own.save(folder)
    return folder
