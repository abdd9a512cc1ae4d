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

SHIPPED = Path(__file__).parent / "assets" / "tokenizer"
"""Folder of the tokenizer in the package."""

ROLES = ("bos_token", "eos_token", "pad_token")
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
_PIECE_CHARACTERS = 1 << 16
_TOKEN_CHARACTERS = 24


def _keep_parallel_and_quiet() -> None:
    """Let the Rust threads work, and let forked children do without them unasked.

    Unless this variable is set when a process forks, tokenizers prints a warning in the child, also for the
    fork of an unrelated subprocess. A child has none of the threads, so there the answer must be "false".
    """
    if "TOKENIZERS_PARALLELISM" not in os.environ:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                after_in_child=lambda: os.environ.__setitem__("TOKENIZERS_PARALLELISM", "false")
            )


_keep_parallel_and_quiet()


class Tokenizer:
    """A tokenizer and the roles of its special tokens.

    Attributes:
        vocab_size: entries, reserved ones included; every id is below it.
        bos_token_id: starts a document, None where the vocabulary has no such token.
        eos_token_id: ends a document.
        pad_token_id: fills rows; the end token where the vocabulary has no padding.
        fingerprint: SHA-256 (hex) of the vocabulary, the rules and the roles.
    """

    bos_token_id: int | None
    eos_token_id: int
    pad_token_id: int

    def __init__(
        self, backend: tokenizers.Tokenizer, roles: Mapping[str, str | None], chat_template: Any = None
    ) -> None:
        """Take over `backend`; `roles` holds `eos_token` and maybe `bos_token`, `pad_token`, all in it."""
        self._roles = {name: roles.get(name) for name in ROLES}
        self._roles["pad_token"] = self._roles["pad_token"] or self._roles["eos_token"]
        self._chat_template = chat_template
        # A tokenizer.json may carry the cut-off and padding of some earlier use.
        backend.no_truncation()
        backend.no_padding()
        # A role must be a special token, or decoding would print it and text could spell it. The id stays.
        names = [name for name in self._roles.values() if name is not None]
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        backend.encode_special_tokens = True
        self._backend = backend

        ids = {
            role: None if name is None else backend.token_to_id(name) for role, name in self._roles.items()
        }
        self.bos_token_id, self.eos_token_id, self.pad_token_id = (ids[role] for role in ROLES)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        rules = json.loads(backend.to_str())
        canonical = json.dumps([rules, self._roles], sort_keys=True, separators=(",", ":"))
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
        self._byte_level = "ByteLevel" in _types(rules.get("decoder"))
        self._special_ids = frozenset(
            id for id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self._dropped = self._ids_text_can_spell(rules)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # The switch is no part of a pickled backend.
        self._backend.encode_special_tokens = True

    def _ids_text_can_spell(self, rules: dict[str, Any]) -> frozenset[int]:
        """Return the special ids to strike from encoded text; the unknown token stays unless it has a role.

        Byte-level BPE cannot reach a special token from text. Unigram and word vocabularies can, as their
        special tokens are pieces like any other.
        """
        names = [
            token.content for token in self._backend.get_added_tokens_decoder().values() if token.special
        ]
        probes = self._backend.encode_batch(
            [prefix + name for name in names for prefix in ("", "a")], add_special_tokens=False
        )
        reachable = any(not self._special_ids.isdisjoint(probe.ids) for probe in probes)
        if self._byte_level and not reachable:
            return frozenset()
        unknown = rules["model"].get("unk_token")
        if rules["model"].get("unk_id") is not None:
            unknown = rules["model"]["vocab"][rules["model"]["unk_id"]][0]
        kept = set() if unknown in self._roles.values() else {self._backend.token_to_id(unknown or "")}
        return self._special_ids - kept

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
            whole = [
                text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") for text in texts
            ]
            encodings = self._backend.encode_batch_fast(whole, add_special_tokens=False)
        if self._dropped:
            return [[id for id in encoding.ids if id not in self._dropped] for encoding in encodings]
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
        added = self._backend.get_added_tokens_decoder()
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        anchor = next((id for token, id in vocabulary.items() if id not in added and token.isalpha()), None)
        before = [] if anchor is None else [anchor]
        offset = len(self.decode(before).encode())
        for token, id in vocabulary.items():
            if id in self._special_ids:
                continue
            if id in added:
                sizes[id] = len(token.encode())
            elif self._byte_level:
                sizes[id] = len(token) if _BYTE_SYMBOLS.issuperset(token) else len(token.encode())
            elif _BYTE_FALLBACK.fullmatch(token):
                sizes[id] = 1
            else:
                sizes[id] = max(len(self.decode([*before, id]).encode()) - offset, 0)
        return sizes

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and the two files beside it that transformers' AutoTokenizer reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self._roles,
            "clean_up_tokenization_spaces": False,
        }
        if self._chat_template is not None:
            config["chat_template"] = self._chat_template
        named = {role: name for role, name in self._roles.items() if name is not None}
        _write(folder / "tokenizer.json", self._backend.to_str(pretty=True))
        _write(folder / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2))
        _write(folder / "special_tokens_map.json", json.dumps(named, ensure_ascii=False, indent=2))


def load_tokenizer(path: str | Path | None = None) -> Tokenizer:
    """Load a tokenizer.

    Args:
        path: a `tokenizer.json` or a folder that holds one; None takes the one in the package. A file
            `NAME.json` finds its roles in `NAME_config.json` beside it, else by the names in common use.

    Raises:
        ConfigError: when there is no tokenizer at the path or nothing in it can end a document.
    """
    file = SHIPPED if path is None else Path(path)
    if file.is_dir():
        file /= "tokenizer.json"
    try:
        text = file.read_text(encoding="utf-8")
        rules = json.loads(text)
        if not isinstance(rules, dict) or "model" not in rules:
            raise ConfigError(
                f"--tokenizer {file} is not a tokenizer: it has no 'model'. Give the tokenizer.json of a "
                "tokenizers or transformers tokenizer, or leave the option out."
            )
        backend = tokenizers.Tokenizer.from_str(text)
    except OSError as error:
        raise ConfigError(
            f"--tokenizer {path}: cannot read {file} ({error.strerror}). Give a tokenizer.json or the folder "
            "that holds one; a model on a hub must be downloaded first."
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"--tokenizer {file} is not JSON ({error}). Give a tokenizer.json; transformers writes one for any "
            "model with AutoTokenizer.from_pretrained(...).save_pretrained(folder)."
        ) from error
    except ConfigError:
        raise
    except Exception as error:  # the Rust side raises plain Exception
        raise ConfigError(
            f"--tokenizer {file} is not a tokenizer that tokenizers {tokenizers.__version__} can read "
            f"({error}). Write it again with save_pretrained, or update tokenizers."
        ) from error
    config = _read_config(file.with_name(f"{file.stem}_config.json"))
    return Tokenizer(backend, _find_roles(backend, config, file), config.get("chat_template"))


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"--tokenizer: {file} is not JSON ({error}); mend or remove it.") from error
    if not isinstance(config, dict):
        raise ConfigError(f"--tokenizer: {file} does not hold a JSON object; mend or remove it.")
    return config


def _find_roles(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], file: Path
) -> dict[str, str | None]:
    """Return the token of each role: as the config says, else the first known name in the vocabulary."""
    roles: dict[str, str | None] = {}
    for role in ROLES:
        said = config.get(role)
        name = said["content"] if isinstance(said, dict) else said
        if name is not None and backend.token_to_id(name) is None:
            raise ConfigError(
                f"--tokenizer {file}: its config names {name!r} as {role}, which is not in the vocabulary. "
                f"Correct {role} in {file.stem}_config.json."
            )
        # A config that says null means it, except that documents must end.
        if name is None and (role not in config or role == "eos_token"):
            name = next(
                (known for known in _KNOWN_NAMES[role] if backend.token_to_id(known) is not None), None
            )
        roles[role] = name
    if roles["eos_token"] is None:
        raise ConfigError(
            f"--tokenizer {file} has no token that ends a document. Name one of its tokens in a file "
            f'{file.stem}_config.json beside it: {{"eos_token": "..."}}.'
        )
    return roles


def check_vocab(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Refuse a tokenizer with more entries than the model has embedding rows.

    Raises:
        ConfigError: naming the size that would do.
    """
    if tokenizer.vocab_size > model_vocab_size:
        raise ConfigError(
            f"--vocab-size {model_vocab_size} is too small: the tokenizer has {tokenizer.vocab_size} entries. "
            f"Leave the option out, set it to {tokenizer.vocab_size} or more, or choose another --tokenizer."
        )


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    max_bytes: int = 100_000_000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tokenizer:
    """Train a byte-level BPE on a sample of some text.

    Memory is bounded: of any amount of text at most `max_bytes` are kept, a sample in which every piece of
    65,536 characters has the same chance. The same texts in the same order give the same tokenizer.

    Args:
        texts: documents, read once.
        vocab_size: entries, of which 256 are the bytes and 16 are special.
        max_bytes: UTF-8 bytes to train on.
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
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(_BYTE_SYMBOLS),
        max_token_length=_TOKEN_CHARACTERS,
        show_progress=False,
    )
    backend.train_from_iterator(_sample(texts, max_bytes, seed, progress), trainer)
    entries = backend.get_vocab_size(with_added_tokens=True)
    if entries < vocab_size:
        raise DataError(
            f"the text gave only {entries} of the {vocab_size} entries asked for; "
            f"give more text, or --vocab-size {entries}."
        )
    pad, bos, eos = SPECIAL_TOKENS[:3]
    return Tokenizer(backend, {"bos_token": bos, "eos_token": eos, "pad_token": pad})


def _sample(
    texts: Iterable[str], max_bytes: int, seed: int, progress: Callable[[int, int], None] | None
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
            if (number := draw.random()) >= threshold:
                continue
            heapq.heappush(kept, (-number, size, piece))
            kept_bytes += size
            while kept_bytes > max_bytes:
                # Once a number was too large it stays too large, so the sample is as if all had been kept.
                largest, size, _ = heapq.heappop(kept)
                threshold = -largest
                kept_bytes -= size
        if progress is not None:
            progress(documents, bytes_read)
    yield from (piece.encode("utf-8", "replace").decode() for _, _, piece in kept)


def _types(component: Any) -> set[str]:
    """Return the types of a component of tokenizer.json and of the parts of a sequence."""
    if not isinstance(component, dict):
        return set()
    parts = [part for value in component.values() if isinstance(value, list) for part in value]
    return {component["type"]}.union(*(_types(part) for part in parts))


def _write(file: Path, text: str) -> None:
    """Write a file that is either whole or not there."""
    draft = file.with_name(f"{file.name}.tmp")
    draft.write_text(text + "\n", encoding="utf-8")
    os.replace(draft, file)
