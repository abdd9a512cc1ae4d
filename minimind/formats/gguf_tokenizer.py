"""Write a tokenizer into GGUF metadata: vocabulary, merges, and the name of the pre-tokenizer.

llama.cpp has built-in pre-tokenizers, which the file selects by name (`llama-vocab.cpp`). A different split
yields different tokens without any error, so a tokenizer without an exact equivalent there is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from ..tokenizer import SPLIT, Tokenizer

# As in `enum llama_token_type`.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

_OTHER_WAY = "export --format huggingface and try llama.cpp's convert_hf_to_gguf.py, which supports more"


def vocabulary(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Return the metadata of a tokenizer, as llama.cpp's converter writes it.

    Args:
        tokenizer: a byte-level BPE.
        vocab_size: entries of the embedding; unused ones get placeholder tokens.

    Raises:
        ConfigError: when llama.cpp has no equivalent of this tokenizer.
    """
    rules = tokenizer.rules()
    split = pre_tokenizer_name(rules)
    tokens, types = _entries(rules, vocab_size)
    values: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        # Recent versions of the tokenizers library write pairs, older ones strings.
        "tokenizer.ggml.merges": [
            pair if isinstance(pair, str) else " ".join(pair) for pair in rules["model"]["merges"]
        ],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        # As in training; the end token is for the model to write.
        "tokenizer.ggml.add_bos_token": tokenizer.bos_token_id is not None,
        "tokenizer.ggml.add_eos_token": False,
    }
    if isinstance(tokenizer.chat_template, str):
        values["tokenizer.chat_template"] = tokenizer.chat_template
    return {key: value for key, value in values.items() if value is not None}


def pre_tokenizer_name(rules: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of a pre-tokenizer.

    Args:
        rules: the content of a tokenizer.json.

    Raises:
        ConfigError: when it is no byte-level BPE, normalizes text, or has an unsupported pre-tokenizer.
    """
    model = rules["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback") or model.get("ignore_merges"):
        raise ConfigError(f"the tokenizer is no byte-level BPE, which GGUF export needs; {_OTHER_WAY}.")
    normalizer = rules.get("normalizer")
    # Qwen's tokenizers ask for NFC, which llama.cpp ignores.
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise ConfigError(
            f"the tokenizer normalizes text ({normalizer.get('type')}), llama.cpp does not; {_OTHER_WAY}."
        )
    steps = _steps(rules.get("pre_tokenizer"))
    for name, known in _SPLITS.items():
        if steps == known:
            return name
    raise ConfigError(f"the pre-tokenizer is none of those supported ({', '.join(_SPLITS)}); {_OTHER_WAY}.")


# Pre-tokenizers in the form of `_steps`, by their name in llama.cpp.
_SPLITS = {
    "qwen2": [("Split", SPLIT, "Isolated", False), ("ByteLevel", False, False)],
    "gpt-2": [("ByteLevel", False, True)],
}


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[tuple[Any, ...]]:
    """Return the steps of a pre-tokenizer, without settings that have no effect."""
    if pre_tokenizer is None:
        return []
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return [step for inner in pre_tokenizer["pretokenizers"] for step in _steps(inner)]
    if kind == "Split":
        return [
            (kind, pre_tokenizer["pattern"].get("Regex"), pre_tokenizer["behavior"], pre_tokenizer["invert"])
        ]
    if kind == "ByteLevel":
        return [(kind, pre_tokenizer["add_prefix_space"], pre_tokenizer.get("use_regex", True))]
    return [(kind,)]


def _entries(rules: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Return the string and the type of every id."""
    tokens = [f"[PAD{id}]" for id in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, id in rules["model"]["vocab"].items():
        tokens[id], types[id] = token, NORMAL
    for added in rules["added_tokens"]:
        token, id = added["content"], added["id"]
        # Markers such as <|fim_prefix|> are control tokens even where they are not declared special.
        looks_special = token.startswith("<|") and token.endswith("|>")
        tokens[id], types[id] = token, CONTROL if added["special"] or looks_special else USER_DEFINED
    return tokens, types
