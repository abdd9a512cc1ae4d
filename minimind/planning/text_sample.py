"""A sample of the training text for `--budget`: its size, its difficulty, and tokenizers trained on it."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import math
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers as tokenizers_library

from ..config.options import PretrainConfig
from ..data.builtin_corpus import builtin_documents
from ..data.prepare import cache_folder
from ..data.readers import Reading, TextFile
from ..data.sources import DataSource, read_sources
from ..errors import DataError
from ..evaluation.scaling_law import TYPICAL, Difficulty, bigram_bits
from ..io.lock import LockedError, hold_lock
from ..io.reading import parse_json
from ..tokenizer import SPECIAL_TOKENS, Tokenizer, load_tokenizer, train_tokenizer
from .candidates import TextSize, TokenizerChoice

# Text that is read, from files spread over all, and of it the text that a tokenizer is trained on.
SAMPLE_BYTES = 8_000_000
SAMPLE_FILES = 64
# Read so much of a file to know how much text it holds.
_AHEAD_BYTES = 2_000_000
# Places in a large JSONL file to read from.
_PLACES = 32
# Vocabularies to choose from. One needs about 400 bytes of sample per entry for its entries to be common.
VOCABULARIES = (1024, 2048, 4096, 8192, 16384)
BYTES_PER_ENTRY = 400
# Bytes of the documents that the bigram model counts.
_BIGRAM_BYTES = 1_000_000
# Of fewer documents than this, pieces of so many characters are counted and predicted in their place.
_FEW_DOCUMENTS, _PIECE = 16, 2000
# Every so many documents one is kept from training the tokenizer, to count its tokens.
_HELD_OUT = 8
_LOCK_SECONDS = 600.0


@dataclass(frozen=True)
class TextSample:
    """Documents of a run's training text.

    Attributes:
        documents: the sample.
        num_bytes: UTF-8 bytes of the whole text, about.
    """

    documents: tuple[str, ...]
    num_bytes: float

    @property
    def training(self) -> list[str]:
        """The documents to train a tokenizer on."""
        return [text for number, text in enumerate(self.documents) if number % _HELD_OUT]

    @property
    def held_out(self) -> list[str]:
        """The documents to count tokens in."""
        return list(self.documents[::_HELD_OUT])

    def document_lengths(self, bytes_per_token: float) -> list[int]:
        """Return the lengths of the documents in tokens, about."""
        return [max(round(_bytes([text]) / bytes_per_token), 1) + 1 for text in self.documents]

    def vocabularies(self) -> tuple[int, ...]:
        """Return the sizes of vocabulary that the sample is enough for."""
        size = sum(len(text.encode("utf-8", "replace")) for text in self.training)
        return tuple(size_ for size_ in VOCABULARIES if size_ * BYTES_PER_ENTRY <= size)


def read_sample(config: PretrainConfig) -> TextSample:
    """Read a sample of the training text: documents of files spread evenly over all of them.

    A file has the share of the sample that it has of the run: by its size, or the weight of its source.

    Raises:
        DataError: for data that is missing or unreadable.
    """
    if not config.data:
        documents = tuple(builtin_documents())
        return TextSample(documents, _bytes(documents))
    sources = read_sources(config.data, text_key=config.text_key)
    files = [path for source in sources for path in source.paths]
    chosen = files[:: -(-len(files) // SAMPLE_FILES)]
    shares = _shares(sources)
    each = SAMPLE_BYTES / sum(shares[path] for path in chosen)
    documents_read: list[str] = []
    text_bytes = file_bytes = 0.0
    for path in chosen:
        quota = each * shares[path]
        if path.suffix == ".jsonl" and path.stat().st_size > 2 * quota:
            kept, done = _spread(path, config.text_key, quota)
            read = _bytes(kept)
        else:
            kept, read, done = _beginning(TextFile(path, "--data", config.text_key, config.bad_lines), quota)
        documents_read += kept
        text_bytes, file_bytes = text_bytes + read, file_bytes + max(done, 1)
    if not documents_read:
        raise DataError("--data has no documents; name files with text.")
    total = sum(path.stat().st_size for path in files)
    return TextSample(tuple(documents_read), max(text_bytes / file_bytes * total, text_bytes))


def _shares(sources: Sequence[DataSource]) -> dict[Path, float]:
    """Return the share of each file in the training tokens, in any unit."""
    shares: dict[Path, float] = {}
    for source in sources:
        sizes = {path: max(path.stat().st_size, 1) for path in source.paths}
        unit = 1.0 if source.weight is None else source.weight / sum(sizes.values())
        shares |= {path: size * unit for path, size in sizes.items()}
    return shares


def text_size(config: PretrainConfig, sample: TextSample, *, choose_tokenizer: bool) -> TextSize:
    """Return the size of the text of a run, and its tokens with each tokenizer to choose from.

    With `choose_tokenizer` these include vocabularies trained on the sample.
    """
    held_out = sample.held_out
    num_bytes = _bytes(held_out)
    # Every document ends with a token of no bytes, and begins with one.
    marks = 2 * len(held_out)
    given = load_tokenizer(config.tokenizer)
    given_tokens = sum(map(len, given.encode_batch(held_out))) + marks
    found = [TokenizerChoice(given.vocab_size, num_bytes / given_tokens)]
    sizes = sample.vocabularies() if choose_tokenizer else ()
    if sizes and (rules := trained_rules(config, sample)) is not None:
        for size in sizes:
            if size > len(rules["model"]["vocab"]):
                break
            tokens = sum(map(len, _of_size(rules, size).encode_batch(held_out))) + marks
            found.append(TokenizerChoice(size, num_bytes / tokens, trained=True))
    share = 1.0 if config.val_data else 1 - config.val_fraction
    return TextSize(share * sample.num_bytes, _difficulty(sample), tuple(found))


def _difficulty(sample: TextSample) -> Difficulty:
    """Return what a bigram model of the sample reaches on other documents of it."""
    documents = list(sample.documents)
    if len(documents) < _FEW_DOCUMENTS:
        pieces = (text[k : k + _PIECE] for text in documents for k in range(0, len(text), _PIECE))
        documents = list(pieces) or documents
    # Documents that are neighbours in a file are alike.
    random.Random(0).shuffle(documents)
    ends = list(itertools.accumulate(_bytes([text]) for text in documents))
    most = min(_BIGRAM_BYTES, 0.75 * ends[-1])
    half, full, last = (bisect.bisect_left(ends, n) + 1 for n in (most / 2, most, most + _BIGRAM_BYTES))
    tokenizer = load_tokenizer()
    training = tokenizer.encode_batch(documents[:full])
    held_out = documents[full:last] or documents
    ids, num_bytes = tokenizer.encode_batch(held_out), _bytes(held_out)
    bits, earlier = (bigram_bits(training[:n], ids, num_bytes) for n in (full, half))
    slope = TYPICAL.slope
    if bits > 0 and ends[half - 1] < ends[full - 1]:
        slope = math.log(earlier / bits) / math.log(ends[full - 1] / ends[half - 1])
    return Difficulty(bits * (max(most, 1.0) / _BIGRAM_BYTES) ** TYPICAL.slope, slope)


def trained_tokenizer(config: PretrainConfig, sample: TextSample, vocab_size: int) -> str:
    """Return the folder of a tokenizer trained on the sample, in the cache."""
    folder = _tokenizer_folder(config, sample) / str(vocab_size)
    if not (folder / "tokenizer.json").is_file():
        rules = trained_rules(config, sample)
        assert rules is not None, "its tokens were counted before"
        _of_size(rules, vocab_size).save(folder)
    return str(folder)


def trained_rules(config: PretrainConfig, sample: TextSample) -> dict[str, Any] | None:
    """Return the rules of the largest tokenizer that the sample fills, trained once and cached.

    A smaller vocabulary of the same text is a prefix of it: BPE learns one merge after another.
    """
    folder = _tokenizer_folder(config, sample) / "largest"
    with suppress(OSError, LockedError), hold_lock(folder.parent / ".lock", _LOCK_SECONDS):
        if not (folder / "tokenizer.json").is_file():
            if (tokenizer := _train(sample)) is None:
                return None
            tokenizer.save(folder)
        return load_tokenizer(folder).rules()
    tokenizer = _train(sample)
    return None if tokenizer is None else tokenizer.rules()


def _train(sample: TextSample) -> Tokenizer | None:
    """Return the largest tokenizer that the sample fills; None for a text that is too uniform."""
    for size in reversed(sample.vocabularies()):
        with suppress(DataError):
            return train_tokenizer(sample.training, size, max_bytes=SAMPLE_BYTES)
    return None


def _of_size(rules: dict[str, Any], vocab_size: int) -> Tokenizer:
    """Return the tokenizer with the first entries of a larger one."""
    model = rules["model"]
    entries = {token: id for token, id in model["vocab"].items() if id < vocab_size}
    merged = len(entries) - sum(1 for token in entries if len(token) == 1 or token in SPECIAL_TOKENS)
    smaller = {**rules, "model": {**model, "vocab": entries, "merges": model["merges"][:merged]}}
    pad, bos, eos = SPECIAL_TOKENS[:3]
    backend = tokenizers_library.Tokenizer.from_str(json.dumps(smaller))
    return Tokenizer(backend, eos_token=eos, bos_token=bos, pad_token=pad)


def _tokenizer_folder(config: PretrainConfig, sample: TextSample) -> Path:
    digest = hashlib.sha256(f"1 {VOCABULARIES} {BYTES_PER_ENTRY}".encode())
    for text in sample.training:
        digest.update(text.encode("utf-8", "replace") + b"\0")
    return cache_folder(config) / "tokenizers" / digest.hexdigest()[:16]


def _spread(path: Path, text_key: str, num_bytes: float) -> tuple[list[str], int]:
    """Return documents from places spread over a JSONL file, and the bytes of their lines."""
    found: list[str] = []
    done = 0
    size = path.stat().st_size
    with path.open("rb") as file:
        for place in range(_PLACES):
            file.seek(size * place // _PLACES)
            if place:
                file.readline()
            end = done + num_bytes / _PLACES
            while done < end and (line := file.readline()):
                done += len(line)
                # The run itself reports invalid lines.
                with suppress(ValueError, KeyError, TypeError):
                    text = str(parse_json(line)[text_key])
                    text.encode()  # a lone surrogate is invalid, too
                    found.append(text)
    return found, done


def _beginning(file: TextFile, num_bytes: float) -> tuple[list[str], int, int]:
    """Return the first documents of a file, the bytes of text read, and those of the file they took."""
    reading = Reading()
    found: list[str] = []
    read = 0
    size = file.path.stat().st_size
    for text in file.documents(reading):
        if read < num_bytes:
            found.append(text)
        read += len(text.encode("utf-8", "replace"))
        # A reader is ahead of the documents it has yielded, by more where the file is compressed.
        if read >= num_bytes and _AHEAD_BYTES <= reading.done_bytes < size:
            return found, read, reading.done_bytes
    return found, read, size


def _bytes(texts: tuple[str, ...] | list[str]) -> int:
    return sum(len(text.encode("utf-8", "replace")) for text in texts)
