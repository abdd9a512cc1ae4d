"""Text to token ids and back: load a tokenizer, train one, and know how many bytes each id stands for.

The tokenizer in the package is a byte-level BPE of 6400 entries; any `tokenizer.json` can take its place.
Here text is always text: a document that contains the letters of a special token is encoded as those
letters, so it can neither end a document early nor open a chat turn.
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

from .errors import ConfigError, DataError

PACKAGED = Path(__file__).parent / "assets" / "tokenizer"
"""Folder of the tokenizer in the package."""

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|reserved_{n}|>" for n in range(13)))
"""First entries of a tokenizer trained here: padding, start, end, and 13 that later training may name."""

# The split of Qwen2: contractions, words with one leading mark, digits one by one, runs of marks, space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What tokens are called where no tokenizer_config.json says it, in order of preference.
_KNOWN_NAMES = {
    "bos_token": ("<|im_start|>", "<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]"),
    "eos_token": ("<|im_end|>", "</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "<|eot_id|>", "[SEP]"),
    "pad_token": ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>"),
}
_BYTE_SYMBOLS = frozenset(pre_tokenizers.ByteLevel.alphabet())
_BYTE_FALLBACK = re.compile(r"<0x[0-9A-F]{2}>")
_FIX = (
    "Give a tokenizer.json or the folder that holds one; transformers writes it with "
    "AutoTokenizer.from_pretrained(...).save_pretrained(folder)."
)
_PIECE_CHARACTERS = 1 << 16

# Unless this is set when a process forks, tokenizers prints a warning in the child, even if that only runs an
# unrelated command. A child has none of the Rust threads and would wait for them for ever.
if "TOKENIZERS_PARALLELISM" not in os.environ:
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))


class Tokenizer:
    """A tokenizer and the roles of its special tokens.

    Attributes:
        vocab_size: entries, reserved ones included; every id is below it.
        bos_token_id: starts a document, None where the vocabulary has no such token.
        eos_token_id: ends a document.
        pad_token_id: fills rows; the end token where the vocabulary has no padding.
        chat_template: for those who train further; passed on as it was found, None where there is none.
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
        """Take over `backend`, whose vocabulary holds the tokens named."""
        pad_token = pad_token or eos_token
        self._roles = {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
        self.chat_template = chat_template
        # A tokenizer.json may carry the cut-off and padding of some earlier use.
        backend.no_truncation()
        backend.no_padding()
        # A role must be a special token, or decoding would print it and text could spell it. Its id stays.
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
        self._struck = self._ids_text_can_spell(rules["model"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # The switch is no part of a pickled backend.
        self._backend.encode_special_tokens = True

    def _ids_text_can_spell(self, model: Mapping[str, Any]) -> frozenset[int]:
        """Return the special ids to strike from encoded text; an unknown token without a role stays.

        Byte-level BPE cannot reach a special token from text. Unigram and word vocabularies can, as their
        special tokens are pieces like any other.
        """
        names = [self._added[id].content for id in self._special_ids]
        spelled = self._backend.encode_batch(names + [f"a{name}" for name in names], add_special_tokens=False)
        if self._byte_level and all(self._special_ids.isdisjoint(encoding.ids) for encoding in spelled):
            return frozenset()
        unknown = model.get("unk_token")
        if model.get("unk_id") is not None:
            unknown = model["vocab"][model["unk_id"]][0]
        kept = {unknown}.difference(self._roles.values())
        return frozenset(id for id in self._special_ids if self._added[id].content not in kept)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without start or end token; see `encode_batch`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without start or end tokens, encoded on all cores.

        Half a surrogate pair is not Unicode text and has no bytes: it is encoded as U+FFFD. Two halves that
        belong together are encoded as the character they stand for.
        """
        try:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:
            halves = (text.encode("utf-16-le", "surrogatepass") for text in texts)
            texts = [half.decode("utf-16-le", "replace") for half in halves]
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        if self._struck:
            return [[id for id in encoding.ids if id not in self._struck] for encoding in encodings]
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of some ids; bytes that are no valid UTF-8 show as U+FFFD."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def bytes_per_token(self) -> np.ndarray:
        """Return the UTF-8 bytes each id stands for, float32 (V,), 0 for special and unused ids.

        Byte-level: summed over an encoded text this is exactly its length in bytes, provided that the
        tokenizer does not normalize text. Other vocabularies: what the id adds to the text of the one before.
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
        """Return the content of `tokenizer.json`."""
        return json.loads(self._backend.to_str())

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and the two files beside it that transformers' AutoTokenizer reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        named = {role: name for role, name in self._roles.items() if name is not None}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        template = {} if self.chat_template is None else {"chat_template": self.chat_template}
        _write(folder / "special_tokens_map.json", named)
        _write(folder / "tokenizer_config.json", {**config, **self._roles, **template})
        _write(folder / "tokenizer.json", self.rules())


def load_tokenizer(path: str | Path | None = None) -> Tokenizer:
    """Load a tokenizer.

    Args:
        path: a `tokenizer.json` or a folder that holds one; None takes the one in the package. A file
            `NAME.json` finds its roles in `NAME_config.json` beside it, else by the names in common use.

    Raises:
        ConfigError: when there is no tokenizer at the path or nothing in it can end a document.
    """
    file = PACKAGED if path is None else Path(path)
    if file.is_dir():
        file /= "tokenizer.json"
    rules = _read_json(file)
    if "model" not in rules:
        raise ConfigError(f"--tokenizer {file} holds no tokenizer: it has no 'model'. {_FIX}")
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(rules))
    except Exception as error:  # what the Rust side raises has no type of its own
        raise ConfigError(
            f"--tokenizer {file}: tokenizers {tokenizers.__version__} cannot read it ({error}). "
            "Save it again with the transformers installed here, or update tokenizers."
        ) from error
    config_file = file.with_name(f"{file.stem}_config.json")
    config = _read_json(config_file) if config_file.is_file() else {}
    bos, eos, pad = (_find_role(role, backend, config, file) for role in _KNOWN_NAMES)
    if eos is None:
        raise ConfigError(
            f"--tokenizer {file} has no token that ends a document. Name one of its tokens in a file "
            f'{config_file.name} beside it: {{"eos_token": "..."}}.'
        )
    template = config.get("chat_template")
    if template is None and file.name == "tokenizer.json":
        template = _template_beside(file)
    return Tokenizer(backend, eos_token=eos, bos_token=bos, pad_token=pad, chat_template=template)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--tokenizer: cannot read {file} ({error.strerror}). {_FIX}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--tokenizer {file} is not JSON ({error}). {_FIX}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--tokenizer {file} is not a JSON object. {_FIX}")
    return content


def _template_beside(file: Path) -> str | None:
    """Return the chat template that transformers 5 puts into a file of its own, None where it has not."""
    template = file.with_name("chat_template.jinja")
    try:
        return template.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--tokenizer: cannot read {template} ({error}); save it as UTF-8 text.") from error


def _find_role(role: str, backend: tokenizers.Tokenizer, config: Mapping[str, Any], file: Path) -> str | None:
    """Return the token the config names for a role, else the first known name in the vocabulary."""
    named = config.get(role)
    if isinstance(named, dict):
        named = named.get("content")
    if named is not None and (not isinstance(named, str) or backend.token_to_id(named) is None):
        raise ConfigError(
            f"--tokenizer {file}: the vocabulary has no {named!r}, the {role} that {file.stem}_config.json "
            "beside it names. Correct the name there."
        )
    # A config that says null means it, except that documents must end.
    if named is None and (role not in config or role == "eos_token"):
        named = next((name for name in _KNOWN_NAMES[role] if backend.token_to_id(name) is not None), None)
    return named


def check_vocab(tokenizer: Tokenizer, model_vocab_size: int, model: str | None = None) -> None:
    """Raise ConfigError, saying what would do, when the model has too few rows for the tokenizer.

    Args:
        tokenizer: for the model.
        model_vocab_size: rows of its embedding.
        model: where its weights lie; None for one that is still to be made, whose size can be chosen.
    """
    if tokenizer.vocab_size > model_vocab_size:
        if model is not None:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} entries, but the embedding of {model} only "
                f"{model_vocab_size} rows; name the one it was trained with by --tokenizer."
            )
        raise ConfigError(
            f"--vocab-size {model_vocab_size} is less than the tokenizer's {tokenizer.vocab_size} entries. "
            f"Leave the option out, give at least {tokenizer.vocab_size}, or choose another --tokenizer."
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

    At most `max_bytes` of the text are kept: a random sample in which every document, or piece of 65,536
    characters of a long one, has the same chance. The same texts in the same order give the same tokenizer.

    Args:
        texts: documents, read once.
        vocab_size: entries, of which 256 are the bytes and 16 are special.
        max_bytes: UTF-8 bytes to train on; Chinese takes about 60 times as much memory, English far less.
        seed: of the sampling.
        progress: called with (documents read, bytes read) after each document.

    Raises:
        ConfigError: when `vocab_size` leaves no room for the bytes and the special tokens.
        DataError: when the text is too small or too uniform to fill the vocabulary.
    """
    smallest = len(_BYTE_SYMBOLS) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ConfigError(
            f"--vocab-size {vocab_size} is too small for a tokenizer: 256 bytes and {len(SPECIAL_TOKENS)} "
            f"special tokens need {smallest}. Give at least {smallest}."
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
        max_token_length=24,  # in bytes: long rules and runs of spaces are not worth an entry
        show_progress=False,
    )
    backend.train_from_iterator(sample_text(texts, max_bytes, seed, progress), trainer)
    entries = backend.get_vocab_size(with_added_tokens=True)
    if entries < vocab_size:
        raise DataError(
            f"the text gave only {entries} of the {vocab_size} entries asked for; "
            f"give more text, or --vocab-size {entries}."
        )
    pad, bos, eos = SPECIAL_TOKENS[:3]
    return Tokenizer(backend, eos_token=eos, bos_token=bos, pad_token=pad)


def sample_text(
    texts: Iterable[str], max_bytes: int, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> Iterator[str]:
    """Yield at most `max_bytes` of the texts, in pieces: those that drew the smallest random numbers."""
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
                # Later numbers above it would be dropped too: the sample is as if drawn from everything.
                largest, size, _ = heapq.heappop(kept)
                threshold = -largest
                kept_bytes -= size
        if progress is not None:
            progress(documents, bytes_read)
    while kept:
        # Handed over and let go, so that the trainer's counts grow while the sample shrinks.
        yield kept.pop()[2].encode("utf-8", "replace").decode()


def _write(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that is either whole or not there."""
    draft = file.with_name(f"{file.name}.tmp")
    draft.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, file)
