"""Tokenize documents into token shards on all cores, and count what the report needs."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..tokenizer import Tokenizer
from .chat import ChatText
from .long_documents import PIECE_CHARACTERS, cut_pattern, pieces
from .readers import Reading
from .shards import ShardWriter, SplitIndex, token_dtype

SPLITS = ("train", "validation")
# Large enough for all threads of the tokenizer, small enough to keep few megabytes in flight.
_BATCH_BYTES = 1 << 19
_BATCH_DOCUMENTS = 4096
# Documents above this are encoded in pieces, a few at a time.
_LONG_CHARACTERS = 1 << 19
_PIECES_AT_ONCE = 4
# Text of batches that wait to be written.
_PENDING_BYTES = 1 << 25


class DocumentSource(Protocol):
    """Anything that yields documents, such as `readers.TextFile`."""

    def documents(self, reading: Reading) -> Iterator[str]:
        """Yield documents and count dropped ones in `reading`."""


@dataclass(frozen=True)
class Assignment:
    """Assigns the documents of a file to a split.

    Attributes:
        split: `train` or `validation`.
        held_out: share of the documents, chosen by content hash, that goes to validation.
        part: index of the source of --data; must not decrease.
    """

    source: DocumentSource
    split: str
    held_out: float = 0.0
    part: int = 0


@dataclass
class Encoded:
    """The result of encoding.

    Attributes:
        splits: describes the files of each split, also of an empty one.
        counts: (sources, splits, 3) int64: documents, bytes of text, tokens.
        readings: counts of dropped documents per source.
        token_counts: (splits, V) int64, count of each id.
        duplicates: documents equal to an earlier one of the same split, per split.
        shared: validation documents that are also training documents.
        fingerprints: of each split's documents and their order, independent of paths.
    """

    splits: dict[str, SplitIndex]
    counts: NDArray[np.int64]
    readings: list[Reading]
    token_counts: NDArray[np.int64]
    duplicates: dict[str, int] = field(default_factory=dict)
    shared: int = 0
    fingerprints: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Batch:
    """Documents of one batch; arrays have one element per document."""

    texts: list[str]
    source: NDArray[np.int32]
    hashes: NDArray[np.uint64]
    text_bytes: NDArray[np.int64]
    done_bytes: int
    part: int


# The tokens of documents end to end, and the number of each.
_Ids = tuple[NDArray[Any], NDArray[np.int64]]


def is_held_out(hashes: NDArray[np.uint64], share: float | NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which documents belong to the share for validation, by the hashes of their content."""
    return hashes / 2.0**64 < share


def hash_text(text: str) -> tuple[int, int]:
    """Return a 64-bit hash of a document, equal in all versions and on all machines, and its UTF-8 bytes."""
    digest, size = hashlib.blake2b(digest_size=8, key=b"minimind document"), 0
    # In slices, so that a long document is not copied as a whole.
    for start in range(0, len(text), _LONG_CHARACTERS):
        part = text[start : start + _LONG_CHARACTERS].encode()
        digest.update(part)
        size += len(part)
    return int.from_bytes(digest.digest(), "little"), size


def encode(
    assignments: Sequence[Assignment],
    tokenizer: Tokenizer,
    folder: Path,
    progress: Callable[[int], None] | None = None,
) -> Encoded:
    """Tokenize all sources into `folder`, each document as [bos] ids [eos].

    Reading, tokenizing and writing overlap: one thread converts lists to arrays while the tokenizer's own
    threads encode the next batch. Documents keep the order of the sources.

    Args:
        tokenizer: its `encode_batch` should release the GIL.
        progress: called with the bytes read so far.

    Raises:
        DataError: for an unreadable source.
        OSError: when `folder` cannot be written.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    readings = [Reading() for _ in assignments]
    encoded = Encoded(
        splits={},
        counts=np.zeros((len(assignments), len(SPLITS), 3), np.int64),
        readings=readings,
        token_counts=np.zeros((len(SPLITS), tokenizer.vocab_size), np.int64),
    )
    held_out = np.array([assignment.held_out for assignment in assignments])
    all_validation = np.array([assignment.split == "validation" for assignment in assignments])
    with ExitStack() as stack:
        writers = {split: ShardWriter(folder, split, dtype) for split in SPLITS}
        for writer in writers.values():
            stack.callback(writer.abandon)
        hashes = {split: stack.enter_context(tempfile.TemporaryFile(dir=folder)) for split in SPLITS}
        contents = {split: hashlib.blake2b(digest_size=16) for split in SPLITS}
        for batch, (tokens, lengths) in _tokenized(_batches(assignments, readings), tokenizer, dtype):
            validation = all_validation[batch.source] | is_held_out(batch.hashes, held_out[batch.source])
            sizes = np.stack((np.ones_like(lengths), batch.text_bytes, lengths), axis=1)
            np.add.at(encoded.counts, (batch.source, validation.astype(np.int64)), sizes)
            for split, chosen in zip(SPLITS, (~validation, validation), strict=True):
                kept = tokens if chosen.all() else tokens[np.repeat(chosen, lengths)]
                writers[split].append(kept, lengths[chosen], batch.part)
                hashes[split].write(batch.hashes[chosen].data)
                contents[split].update(batch.hashes[chosen].data)
                if len(kept) and (largest := int(kept.max())) >= tokenizer.vocab_size:
                    raise DataError(
                        f"--tokenizer returned the id {largest}, outside its vocabulary of "
                        f"{tokenizer.vocab_size} entries; save or download the tokenizer again."
                    )
                encoded.token_counts[SPLITS.index(split)] += np.bincount(kept, minlength=tokenizer.vocab_size)
            if progress is not None:
                progress(batch.done_bytes)
        encoded.splits = {
            split: dataclasses.replace(writer.close(), **_unknown(encoded, number, tokenizer))
            for number, (split, writer) in enumerate(writers.items())
        }
        encoded.fingerprints = {split: content.hexdigest() for split, content in contents.items()}
        _count_duplicates(encoded, hashes)
    if progress is not None:
        progress(sum(reading.done_bytes for reading in readings))
    return encoded


def _batches(assignments: Sequence[Assignment], readings: list[Reading]) -> Iterator[_Batch]:
    """Yield the documents of all sources in batches of about half a megabyte, each of one part."""
    items: list[tuple[str, int, int, int]] = []
    part = size = 0

    def batch() -> _Batch:
        texts, *columns = zip(*items, strict=True)
        source, hashes, text_bytes = map(np.array, columns, (np.int32, np.uint64, np.int64))
        done = sum(reading.done_bytes for reading in readings)
        return _Batch(list(texts), source, hashes, text_bytes, done, part)

    for number, assignment in enumerate(assignments):
        if items and assignment.part != part:
            yield batch()
            items, size = [], 0
        part = assignment.part
        for text in assignment.source.documents(readings[number]):
            hashed, text_bytes = hash_text(text)
            items.append((text, number, hashed, text_bytes))
            size += text_bytes
            del text  # the batch has it, and may be done before the next document is read
            if size >= _BATCH_BYTES or len(items) >= _BATCH_DOCUMENTS:
                yield batch()
                items, size = [], 0
    if items:
        yield batch()


def _tokenized(
    batches: Iterator[_Batch], tokenizer: Tokenizer, dtype: np.dtype[Any]
) -> Iterator[tuple[_Batch, _Ids]]:
    """Yield each batch with its ids, in order, while the next ones are tokenized."""
    workers = max(2, min(8, os.cpu_count() or 2))
    cut = cut_pattern(tokenizer.rules())
    pending: deque[tuple[_Batch, Future[_Ids]]] = deque()

    def full() -> bool:
        waiting = sum(int(batch.text_bytes.sum()) for batch, _ in pending)
        return len(pending) > workers + 2 or waiting > _PENDING_BYTES

    with ThreadPoolExecutor(workers, "tokenize") as pool:
        try:
            for batch in batches:
                pending.append((batch, pool.submit(_encode_batch, tokenizer, batch.texts, dtype, cut)))
                del batch
                while pending and full():
                    done, future = pending.popleft()
                    yield done, future.result()
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
        finally:
            for _, future in pending:
                future.cancel()


def _encode_batch(
    tokenizer: Tokenizer, texts: list[str], dtype: np.dtype[Any], cut: re.Pattern[str] | None
) -> _Ids:
    chats = any(isinstance(text, ChatText) for text in texts)
    if cut is not None and not chats and any(len(text) > _LONG_CHARACTERS for text in texts):
        return _encode_long(tokenizer, texts, dtype, cut)
    ids = _encode_chats(tokenizer, texts) if chats else tokenizer.encode_batch(texts)
    bos = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    eos = (tokenizer.eos_token_id,)
    lengths = np.fromiter(map(len, ids), np.int64, len(ids)) + len(bos) + 1
    parts = chain.from_iterable(chain.from_iterable((bos, document, eos) for document in ids))
    return np.fromiter(parts, dtype, int(lengths.sum())), lengths


def _encode_chats(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Return the ids of conversations, whose special tokens have the ids of the template."""
    parts = [text.parts if isinstance(text, ChatText) else (text,) for text in texts]
    encoded = iter(tokenizer.encode_batch([part for one in parts for part in one if isinstance(part, str)]))
    return [
        [*chain.from_iterable(next(encoded) if isinstance(part, str) else (part,) for part in one)]
        for one in parts
    ]


def _encode_long(tokenizer: Tokenizer, texts: list[str], dtype: np.dtype[Any], cut: re.Pattern[str]) -> _Ids:
    """Encode documents in pieces: bounded memory, the same ids."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    parts: list[NDArray[Any]] = []
    lengths = []
    for text in texts:
        first = len(parts)
        parts.append(np.array(bos, dtype))
        remaining = pieces(text, cut, PIECE_CHARACTERS)
        while some := list(islice(remaining, _PIECES_AT_ONCE)):
            parts += [np.array(ids, dtype) for ids in tokenizer.encode_batch(some)]
        parts.append(np.array([tokenizer.eos_token_id], dtype))
        lengths.append(sum(map(len, parts[first:])))
    return np.concatenate(parts), np.array(lengths, np.int64)


def _unknown(encoded: Encoded, split: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the count of the unknown token in a split, and the mean bytes of text that one stands for."""
    unknown = tokenizer.unknown_token_id
    counts = encoded.token_counts[split].copy()
    if unknown is None or not counts[unknown]:
        return {}
    number, counts[unknown] = int(counts[unknown]), 0
    known = float(counts @ tokenizer.bytes_per_token())
    text_bytes = int(encoded.counts[:, split, 1].sum())
    return {"unknown_tokens": number, "unknown_bytes": max(text_bytes - known, 0.0) / number}


def _count_duplicates(encoded: Encoded, files: Mapping[str, IO[bytes]]) -> None:
    """Count equal documents by their hashes, with 9 bytes of memory per document."""
    hashes = {}
    for split, file in files.items():
        file.seek(0)
        hashes[split] = np.fromfile(file, np.uint64)
        hashes[split].sort()
        encoded.duplicates[split] = int(np.count_nonzero(hashes[split][1:] == hashes[split][:-1]))
    train, validation = hashes["train"], hashes["validation"]
    if len(train) and len(validation):
        at = np.minimum(np.searchsorted(train, validation), len(train) - 1)
        encoded.shared = int(np.count_nonzero(train[at] == validation))
