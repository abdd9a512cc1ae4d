"""A sample of the training text for `--budget`: its size, its difficulty, and tokenizers trained on it."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers as tokenizers_library

from ..config.options import PretrainConfig
from ..data.builtin_corpus import builtin_documents
from ..data.files import find_files
from ..data.hub import is_hub
from ..data.prepare import cache_folder
from ..data.readers import Reading, TextFile
from ..data.sources import DataSource, read_sources
from ..data.tokenization import hash_text, is_held_out
from ..errors import DataError
from ..evaluation.scaling_law import TYPICAL, Difficulty, bigram_bits
from ..io.lock import LockedError, hold_lock
from ..io.reading import parse_json
from ..tokenizer import SPECIAL_TOKENS, Tokenizer, load_tokenizer, train_tokenizer
from .candidates import TextSize, TokenizerChoice, chosen_val_fraction

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
# Bytes of the text that the bigram model counts, in pieces of so many characters, and predicts at most.
_BIGRAM_BYTES, _PIECE = 1_000_000, 2000
# Of fewer documents than this, pieces are predicted in their place, unless some are validation data.
_FEW_DOCUMENTS = 16
# Predict the validation documents of a run where the sample has so many bytes of them.
_LEAST_VALIDATION = 20_000
# Every so many documents one is kept from training the tokenizer, to count its tokens.
_HELD_OUT = 8
_LOCK_SECONDS = 600.0


@dataclass(frozen=True)
class TextSample:
    """Documents of a run's training text.

    Attributes:
        documents: the sample.
        num_bytes: UTF-8 bytes of the whole text, about.
        validation: documents of --val-data.
    """

    documents: tuple[str, ...]
    num_bytes: float
    validation: tuple[str, ...] = ()

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
    """Read a sample of the training text, and of --val-data.

    Raises:
        DataError: for data that is missing or unreadable.
    """
    # Data sets of the Hub are not read for this.
    local = [pattern for pattern in config.val_data if not is_hub(pattern)]
    held = find_files(local, "--val-data", text_key=config.text_key) if local else []
    sizes = {path: max(path.stat().st_size, 1) for path in held}
    validation = _read(sizes, "--val-data", config, _BIGRAM_BYTES)[0] if held else []
    if not config.data:
        documents = tuple(builtin_documents())
        return TextSample(documents, _bytes(documents), tuple(validation))
    shares = _shares(read_sources(config.data, text_key=config.text_key))
    read, num_bytes = _read(shares, "--data", config, SAMPLE_BYTES)
    if not read:
        raise DataError("--data has no documents; name files with text.")
    return TextSample(tuple(read), num_bytes, tuple(validation))


def _read(
    shares: Mapping[Path, float], option: str, config: PretrainConfig, num_bytes: float
) -> tuple[list[str], float]:
    """Return documents of files spread evenly over all files, and the bytes of the whole text, about.

    Args:
        shares: of each file in the documents to read, above 0, in any unit; of at least one file.
        option: that names the files.
        config: `text_key` and `bad_lines`.
        num_bytes: of the documents to read, about.
    """
    files = list(shares)
    chosen = files[:: -(-len(files) // SAMPLE_FILES)]
    each = num_bytes / sum(shares[path] for path in chosen)
    documents: list[str] = []
    text_bytes = file_bytes = 0.0
    for path in chosen:
        quota = each * shares[path]
        if path.suffix == ".jsonl" and path.stat().st_size > 2 * quota:
            kept, done = _spread(path, config.text_key, quota)
            read = _bytes(kept)
        else:
            kept, read, done = _beginning(TextFile(path, option, config.text_key, config.bad_lines), quota)
        documents += kept
        text_bytes, file_bytes = text_bytes + read, file_bytes + max(done, 1)
    total = sum(path.stat().st_size for path in files)
    return documents, max(text_bytes / file_bytes * total, text_bytes)


def _shares(sources: Sequence[DataSource]) -> dict[Path, float]:
    """Return the share of each file in the training tokens, in any unit."""
    shares: dict[Path, float] = {}
    for source in sources:
        sizes = {path: max(path.stat().st_size, 1) for path in source.paths}
        unit = 1.0 if source.weight is None else source.weight / sum(sizes.values())
        shares |= {path: size * unit for path, size in sizes.items()}
    return shares


def text_size(
    config: PretrainConfig,
    sample: TextSample,
    *,
    choose_tokenizer: bool,
    val_fraction: float | None = None,
) -> TextSize:
    """Return the size and difficulty of the text of a run, and its tokens with each tokenizer to choose from.

    Args:
        config: of the run.
        sample: of its text.
        choose_tokenizer: include vocabularies trained on the sample.
        val_fraction: that of the run; None for what `--budget` chooses.
    """
    if val_fraction is None:
        val_fraction = chosen_val_fraction(sample.num_bytes)
    if config.val_data:
        val_fraction = 0.0
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
    training_bytes = (1 - val_fraction) * sample.num_bytes
    return TextSize(training_bytes, _difficulty(sample, val_fraction), tuple(found))


def _difficulty(sample: TextSample, val_fraction: float) -> Difficulty:
    """Return what a bigram model of the training text reaches on other documents.

    These are the validation documents of the run, as far as the sample has them.
    """
    held_out = list(sample.validation)
    training = list(sample.documents)
    if not held_out:
        hashes = np.array([hash_text(text)[0] for text in training], np.uint64)
        validates = is_held_out(hashes, val_fraction)
        held_out = list(itertools.compress(training, validates))
        training = [text for text, chosen in zip(training, validates, strict=True) if not chosen]
    # Documents that are neighbours in a file are alike.
    shuffle = random.Random(0).shuffle
    if _bytes(held_out) < _LEAST_VALIDATION or not training:
        documents = list(sample.documents)
        if len(documents) < _FEW_DOCUMENTS:
            documents = _pieces(documents) or documents
        shuffle(documents)
        split = _prefix(documents, min(_BIGRAM_BYTES, 0.75 * _bytes(documents)))
        training, held_out = documents[:split], documents[split:] or documents
    else:
        shuffle(held_out)
    held_out = held_out[: _prefix(held_out, _BIGRAM_BYTES)]
    # A few long documents must not be all that is counted.
    pieces = _pieces(training) or training
    shuffle(pieces)
    most = min(_BIGRAM_BYTES, _bytes(pieces))
    half, full = _prefix(pieces, most / 2), _prefix(pieces, most)
    tokenizer = load_tokenizer()
    counted, ids = tokenizer.encode_batch(pieces[:full]), tokenizer.encode_batch(held_out)
    bits, earlier = (bigram_bits(counted[:n], ids, _bytes(held_out)) for n in (full, half))
    slope = TYPICAL.slope
    if bits > 0 and half < full:
        slope = math.log(earlier / bits) / math.log(_bytes(pieces[:full]) / _bytes(pieces[:half]))
    bits *= (max(most, 1.0) / _BIGRAM_BYTES) ** TYPICAL.slope
    sizes = [_bytes([text]) for text in held_out]
    effective = sum(sizes) ** 2 / max(sum(size * size for size in sizes), 1)
    return Difficulty(bits, slope, max(effective, 1.0))


def _prefix(texts: Sequence[str], num_bytes: float) -> int:
    """Return how many of the first texts have so many bytes together, at most all."""
    ends = list(itertools.accumulate(_bytes([text]) for text in texts))
    return min(bisect.bisect_left(ends, num_bytes) + 1, len(texts))


def _pieces(texts: Sequence[str]) -> list[str]:
    return [text[k : k + _PIECE] for text in texts for k in range(0, len(text), _PIECE)]


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
