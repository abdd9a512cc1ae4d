"""A tokenizer in the metadata of a GGUF file: entries, merges, and how llama.cpp is to split text.

llama.cpp splits by rules of its own, which a name in the file chooses (`llama-vocab.cpp`). Text that is split
otherwise than in training gives other tokens without any error, so a tokenizer whose rule has no exact name
there is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from ..tokenizer import SPLIT, Tokenizer

# As in `enum llama_token_type`.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

_OTHER_WAY = "write --format huggingface and try llama.cpp's convert_hf_to_gguf.py, which knows more of them"


def vocabulary(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Return the metadata of a tokenizer by key, as llama.cpp's converter writes it.

    Args:
        tokenizer: a byte-level BPE.
        vocab_size: rows of the embedding; those without an entry are filled up.

    Raises:
        ConfigError: when llama.cpp has no equal of this tokenizer.
    """
    rules = tokenizer.rules()
    split = pre_tokenizer_name(rules)
    tokens, types = _entries(rules, vocab_size)
    values: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        # Pairs in new files of the tokenizers library, strings in old ones.
        "tokenizer.ggml.merges": [
            pair if isinstance(pair, str) else " ".join(pair) for pair in rules["model"]["merges"]
        ],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        # As with the tokenizer itself, a prompt is what is typed.
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }
    if isinstance(tokenizer.chat_template, str):
        values["tokenizer.chat_template"] = tokenizer.chat_template
    return {key: value for key, value in values.items() if value is not None}


def pre_tokenizer_name(rules: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of the way a tokenizer splits text before merging.

    Args:
        rules: the content of a tokenizer.json.

    Raises:
        ConfigError: when it is no byte-level BPE, changes text, or splits in a way that is not known.
    """
    model = rules["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback") or model.get("ignore_merges"):
        raise ConfigError(f"the tokenizer is no byte-level BPE, which GGUF export needs; {_OTHER_WAY}.")
    normalizer = rules.get("normalizer")
    # Qwen's files ask for NFC, which llama.cpp leaves out for all of them.
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise ConfigError(
            f"the tokenizer changes text first ({normalizer.get('type')}), which llama.cpp does not; "
            f"{_OTHER_WAY}."
        )
    steps = _steps(rules.get("pre_tokenizer"))
    for name, known in _SPLITS.items():
        if steps == known:
            return name
    raise ConfigError(
        f"the tokenizer splits text in a way that is not among those known here ({', '.join(_SPLITS)}); "
        f"{_OTHER_WAY}."
    )


# Steps of a pre-tokenizer as `_steps` gives them, by llama.cpp's name for all of them together.
_SPLITS = {
    "qwen2": [("Split", SPLIT, "Isolated", False), ("ByteLevel", False, False)],
    "gpt-2": [("ByteLevel", False, True)],
}


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[tuple[Any, ...]]:
    """Return what a pre-tokenizer does, without the settings that change nothing."""
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
    """Return the text and the type of every id."""
    tokens = [f"[PAD{id}]" for id in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, id in rules["model"]["vocab"].items():
        tokens[id], types[id] = token, NORMAL
    for added in rules["added_tokens"]:
        token, id = added["content"], added["id"]
        # Marks such as <|fim_prefix|> are not for the reader even where nothing calls them special.
        looks_special = token.startswith("<|") and token.endswith("|>")
        tokens[id], types[id] = token, CONTROL if added["special"] or looks_special else USER_DEFINED
    return tokens, types
