"""Load, train and apply tokenizers, and return the bytes that each id stands for.

The tokenizer in the package is a byte-level BPE of 6400 entries; any `tokenizer.json` can replace it. The
name of a special token in a document is encoded as plain text: it can neither end a document nor open a turn.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from ..errors import ConfigError, DataError
from ..io.atomic import replace_files
from ..io.checksums import check_files
from .files import (
    FIX,
    PACKAGED,
    chatml_template,
    no_panic,
    read_json,
    template_beside,
    with_start_token,
    without_start_token,
)

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|reserved_{n}|>" for n in range(13)))
"""First entries of a trained tokenizer: padding, start, end, and 13 reserved ones."""

# The pattern of Qwen2: contractions, words with one leading mark, single digits, punctuation, white space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Common names of each role, for tokenizers without a tokenizer_config.json, in order of preference.
_KNOWN_NAMES = {
    "bos_token": ("<|im_start|>", "<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]"),
    "eos_token": ("<|im_end|>", "</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "<|eot_id|>", "[SEP]"),
    "pad_token": ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>"),
}
_BYTE_SYMBOLS = frozenset(pre_tokenizers.ByteLevel.alphabet())
_BYTE_FALLBACK = re.compile(r"<0x[0-9A-F]{2}>")
_PIECE_CHARACTERS = 1 << 16

# Unless this is set when a process forks, tokenizers prints a warning in the child, even for an unrelated
# command. A child has none of the Rust threads and would deadlock.
if "TOKENIZERS_PARALLELISM" not in os.environ:
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))


class Tokenizer:
    """A tokenizer and the roles of its special tokens.

    Attributes:
        vocab_size: entries, including reserved ones; every id is below it.
        bos_token_id: start token of a document, or None.
        eos_token_id: end token of a document.
        pad_token_id: padding; the end token if the vocabulary has no padding token.
        unknown_token_id: stands for text outside the vocabulary, or None.
        special_tokens: ids of the special tokens by name.
        chat_template: Jinja template for later training, passed on unchanged. By default ChatML if start and
            end token are `<|im_start|>` and `<|im_end|>`, else None.
        fingerprint: SHA-256 (hex) of the vocabulary, the rules and the roles.
    """

    bos_token_id: int | None
    eos_token_id: int
    pad_token_id: int

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token: str,
        bos_token: str | None = None,
        pad_token: str | None = None,
        chat_template: Any = None,
    ) -> None:
        """Wrap `backend`, whose vocabulary contains the named tokens."""
        pad_token = pad_token or eos_token
        self._roles = {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
        if chat_template is None and (bos_token, eos_token) == SPECIAL_TOKENS[1:3]:
            chat_template = chatml_template()
        self.chat_template = chat_template
        # A tokenizer.json may contain truncation and padding settings.
        backend.no_truncation()
        backend.no_padding()
        # A role must be a special token: otherwise decoding prints it and text can produce it. Its id stays.
        special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        for name in self._roles.values():
            if name is not None and name not in special:
                backend.add_special_tokens([AddedToken(name, special=True, normalized=False)])
        backend.encode_special_tokens = True
        self._backend = backend

        ids = backend.get_vocab()
        self.bos_token_id = None if bos_token is None else ids[bos_token]
        self.eos_token_id, self.pad_token_id = ids[eos_token], ids[pad_token]
        self.vocab_size = max(ids.values()) + 1
        rules = json.loads(backend.to_str())
        canonical = json.dumps([rules, self._roles], sort_keys=True, separators=(",", ":"))
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
        self._byte_level = '"ByteLevel"' in json.dumps(rules.get("decoder"))
        self._added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(id for id, token in self._added.items() if token.special)
        self.special_tokens = {self._added[id].content: id for id in self._special_ids}
        self._stripped_ids = self._special_ids_in_text(rules["model"])
        self.unknown_token_id = ids.get(_unknown_token(rules["model"]) or "")

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # A pickled backend loses this setting.
        self._backend.encode_special_tokens = True

    def _special_ids_in_text(self, model: Mapping[str, Any]) -> frozenset[int]:
        """Return the special ids to remove from encoded text; an unknown token without a role stays.

        Byte-level BPE never encodes text as a special token. Unigram and word vocabularies can, because their
        special tokens are ordinary pieces.
        """
        names = [self._added[id].content for id in self._special_ids]
        spelled = self._backend.encode_batch(names + [f"a{name}" for name in names], add_special_tokens=False)
        if self._byte_level and all(self._special_ids.isdisjoint(encoding.ids) for encoding in spelled):
            return frozenset()
        kept = {_unknown_token(model)}.difference(self._roles.values())
        return frozenset(id for id in self._special_ids if self._added[id].content not in kept)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without start or end token; see `encode_batch`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without start or end tokens, encoded on all cores.

        Half a surrogate pair has no UTF-8 encoding and becomes U+FFFD; two matching halves become their
        character.
        """
        try:
            with no_panic("--tokenizer"):
                encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:
            halves = (text.encode("utf-16-le", "surrogatepass") for text in texts)
            texts = [half.decode("utf-16-le", "replace") for half in halves]
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        if self._stripped_ids:
            return [[id for id in encoding.ids if id not in self._stripped_ids] for encoding in encodings]
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of some ids; invalid UTF-8 becomes U+FFFD."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def bytes_per_token(self) -> np.ndarray:
        """Return the UTF-8 bytes each id stands for, float32 (V,), 0 for special and unused ids.

        Byte-level: the sum over an encoded text is exactly its length in bytes, unless the tokenizer
        normalizes text. Other vocabularies: the bytes that the id adds to decoded text.
        """
        sizes = np.zeros(self.vocab_size, dtype=np.float32)
        vocabulary = self._backend.get_vocab()
        words = (id for token, id in vocabulary.items() if id not in self._added and token.isalpha())
        before = [min(words, default=self.eos_token_id)]
        offset = len(self.decode(before).encode())
        for token, id in vocabulary.items():
            if id in self._special_ids:
                continue
            if self._byte_level and id not in self._added and _BYTE_SYMBOLS.issuperset(token):
                sizes[id] = len(token)
            elif self._byte_level or id in self._added:
                sizes[id] = len(token.encode())
            elif _BYTE_FALLBACK.fullmatch(token):
                sizes[id] = 1
            else:
                sizes[id] = max(len(self.decode([*before, id]).encode()) - offset, 0)
        return sizes

    def rules(self) -> dict[str, Any]:
        """Return the content of `tokenizer.json`, without the start token that `save` adds."""
        return json.loads(self._backend.to_str())

    def save(self, folder: str | Path, *, model_max_length: int | None = None) -> None:
        """Write `tokenizer.json` and the two files beside it that transformers' AutoTokenizer reads.

        Other programs then begin a text with the start token, as documents begin in training.

        Args:
            folder: created where it does not exist.
            model_max_length: positions of the model, in tokens.
        """
        named = {role: name for role, name in self._roles.items() if name is not None}
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "padding_side": "right",
            **self._roles,
        }
        rules = self.rules()
        bos = self._roles["bos_token"] or ""
        # A post-processor of the user's own may add it already.
        if self.bos_token_id is not None and self.bos_token_id not in self._backend.encode("a").ids:
            rules = with_start_token(rules, bos, self.bos_token_id)
            config["add_bos_token"] = True
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        files = {"special_tokens_map.json": named, "tokenizer_config.json": config, "tokenizer.json": rules}
        with replace_files(Path(folder)) as written:
            for name, content in files.items():
                text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
                (written / name).write_text(text, encoding="utf-8")


def _unknown_token(model: Mapping[str, Any]) -> str | None:
    if model.get("unk_id") is not None:
        return model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def load_tokenizer(path: str | Path | None = None) -> Tokenizer:
    """Load a tokenizer.

    Args:
        path: a `tokenizer.json` or its folder; None loads the one in the package. The roles of `NAME.json`
            are read from `NAME_config.json` beside it, otherwise found by common names.

    Raises:
        ConfigError: when the path has no tokenizer or the tokenizer has no end token.
    """
    file = PACKAGED if path is None else Path(path)
    if file.is_dir():
        file /= "tokenizer.json"
    config_file = file.with_name(f"{file.stem}_config.json")
    if path is not None:
        check_files(file.parent, (file.name, config_file.name))
    rules = read_json(file)
    if "model" not in rules:
        raise ConfigError(f"--tokenizer {file} is not a tokenizer: it has no 'model'. {FIX}")
    try:
        with no_panic(f"--tokenizer {file}"):
            backend = tokenizers.Tokenizer.from_str(json.dumps(without_start_token(rules)))
    except Exception as error:  # the Rust extension raises plain Exception
        raise ConfigError(
            f"--tokenizer {file}: tokenizers {tokenizers.__version__} cannot read it ({error}). "
            "Save it again with the transformers installed here, or update tokenizers."
        ) from error
    config = read_json(config_file) if config_file.is_file() else {}
    bos, eos, pad = (_find_role(role, backend, config, file) for role in _KNOWN_NAMES)
    if eos is None:
        raise ConfigError(
            f"--tokenizer {file} has no end-of-document token. Name one of its tokens in "
            f'{config_file.name} beside it: {{"eos_token": "..."}}.'
        )
    template = config.get("chat_template")
    if template is None and file.name == "tokenizer.json":
        template = template_beside(file)
    return Tokenizer(backend, eos_token=eos, bos_token=bos, pad_token=pad, chat_template=template)


def _find_role(role: str, backend: tokenizers.Tokenizer, config: Mapping[str, Any], file: Path) -> str | None:
    """Return the token that the config names for a role, otherwise the first known name in the vocabulary."""
    named = config.get(role)
    if isinstance(named, dict):
        named = named.get("content")
    # The library takes no lone surrogates, which JSON can escape.
    if named is not None and (
        not isinstance(named, str) or not _is_unicode(named) or backend.token_to_id(named) is None
    ):
        raise ConfigError(
            f"--tokenizer {file}: the vocabulary has no {named!r}, the {role} that {file.stem}_config.json "
            "beside it names. Correct the name there."
        )
    # An explicit null is respected, except for the end token, which is required.
    if named is None and (role not in config or role == "eos_token"):
        named = next((name for name in _KNOWN_NAMES[role] if backend.token_to_id(name) is not None), None)
    return named


def _is_unicode(text: str) -> bool:
    return re.search("[\ud800-\udfff]", text) is None


def check_vocab(tokenizer: Tokenizer, model_vocab_size: int, model: str | None = None) -> None:
    """Raise ConfigError when the model's embedding is smaller than the tokenizer's vocabulary.

    Args:
        model_vocab_size: entries of its embedding.
        model: path of its weights; None for a new model, whose --vocab-size can be chosen.
    """
    if tokenizer.vocab_size > model_vocab_size:
        if model is not None:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} entries, but the embedding of {model} has "
                f"only {model_vocab_size}; pass the tokenizer it was trained with as --tokenizer."
            )
        raise ConfigError(
            f"--vocab-size {model_vocab_size} is less than the tokenizer's {tokenizer.vocab_size} entries. "
            f"Remove the option, pass at least {tokenizer.vocab_size}, or choose another --tokenizer."
        )


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    max_bytes: int = 32_000_000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tokenizer:
    """Train a byte-level BPE of the package's kind.

    At most `max_bytes` are kept: a uniform random sample of the documents, long ones in pieces of 65,536
    characters. The same documents in the same order give the same tokenizer.

    Args:
        texts: the documents; iterated once.
        vocab_size: entries, including 256 bytes and 16 special tokens.
        max_bytes: UTF-8 bytes to train on; Chinese needs about 60 times this in memory, English far less.
        progress: called with (documents read, bytes read) after each document.

    Raises:
        ConfigError: when `vocab_size` is too small for the bytes and the special tokens.
        DataError: when the data is too small or too uniform to fill the vocabulary.
    """
    smallest = len(_BYTE_SYMBOLS) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ConfigError(
            f"--vocab-size {vocab_size} is too small for a tokenizer: 256 bytes and {len(SPECIAL_TOKENS)} "
            f"special tokens need {smallest}. Pass at least {smallest}."
        )
    backend = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    to_symbols = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_symbols])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(_BYTE_SYMBOLS),
        max_token_length=24,  # in bytes: excludes long rulers and runs of spaces
        show_progress=False,
    )
    backend.train_from_iterator(sample_text(texts, max_bytes, seed, progress), trainer)
    entries = backend.get_vocab_size(with_added_tokens=True)
    if entries < vocab_size:
        raise DataError(
            f"the data is enough for only {entries} of {vocab_size} entries; "
            f"add data, or pass --vocab-size {entries}."
        )
    pad, bos, eos = SPECIAL_TOKENS[:3]
    return Tokenizer(backend, eos_token=eos, bos_token=bos, pad_token=pad)


def sample_text(
    texts: Iterable[str], max_bytes: int, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> Iterator[str]:
    """Yield a random sample of pieces, at most `max_bytes`: those with the smallest random numbers."""
    draw = random.Random(seed)
    kept: list[tuple[float, int, str]] = []
    kept_bytes = bytes_read = documents = 0
    threshold = 1.0
    for documents, text in enumerate(texts, start=1):
        for start in range(0, len(text), _PIECE_CHARACTERS):
            piece = text[start : start + _PIECE_CHARACTERS]
            size = len(piece.encode("utf-8", "surrogatepass"))
            bytes_read += size
            if (number := draw.random()) < threshold:
                heapq.heappush(kept, (-number, size, piece))
                kept_bytes += size
            while kept_bytes > max_bytes:
                # Later pieces above the threshold would be dropped too, so the sample stays uniform.
                largest, size, _ = heapq.heappop(kept)
                threshold = -largest
                kept_bytes -= size
        if progress is not None:
            progress(documents, bytes_read)
    while kept:
        # Popped, so that the sample shrinks while the trainer's counts grow.
        yield kept.pop()[2].encode("utf-8", "replace").decode()
