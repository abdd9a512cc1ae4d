"""From a configuration to token shards: found in the cache, or built once."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.options import PretrainConfig
from ..errors import DataError
from .cache import find, open_or_build
from .document_index import read_length_counts
from .mixture import passes_per_epoch
from .readers import Reading, TextFile, find_files, identify
from .report import Amount, DataReport, MixtureReport, SourceReport, SplitReport, length_quantiles, row_costs
from .shards import SplitIndex, TokenShards
from .sources import Entry, read_entries
from .tokenization import SPLITS, Assignment, DocumentTokenizer, Encoded, encode

# Part of every fingerprint: a change of what encoding writes makes older caches unused.
_FORMAT = 2


@dataclass(frozen=True)
class PreparedData:
    """Tokenized text, ready to train on.

    Attributes:
        train: the training text.
        validation: the held-out text, None without any.
        report: what is in them.
        fingerprint: tells these documents, their order and the tokenizer from any others; the same wherever
            the text lies and whenever it was written, so that a run can go on after its files were moved.
        built: the text was tokenized just now rather than found in the cache.
        weights: share of the training tokens that each entry of --data gives, 1 in all; empty where every
            document is read once in a pass.
    """

    train: TokenShards
    validation: TokenShards | None
    report: DataReport
    fingerprint: str
    built: bool
    weights: tuple[float, ...] = ()

    @property
    def mixture(self) -> str:
        """The weights and the documents that they apply to, as one text; `none` without weights.

        Together with `fingerprint` it tells the order of the rows from any other.
        """
        return mixture_text(self.weights, [part.num_documents for part in self.train.parts])


@dataclass(frozen=True)
class EmbeddedText:
    """The text in the package and in the Python installation, used when --data names none."""

    def documents(self, reading: Reading) -> Iterator[str]:
        """Yield its documents; see `sources.TextFile.documents`."""
        from .builtin_corpus import embedded_documents

        for text in embedded_documents():
            if text and not text.isspace():
                yield text
            else:
                reading.empty += 1


def prepare_data(
    config: PretrainConfig,
    tokenizer: DocumentTokenizer,
    progress: Callable[[int, int], None] | None = None,
) -> PreparedData:
    """Open the tokenized text of a run, tokenizing it first where the cache has none.

    Call it before processes are joined: one process of a machine builds under a file lock, the others wait
    for the lock and then open what it built.

    Args:
        config: the data options.
        tokenizer: its fingerprint is part of the cache's.
        progress: called during a build with bytes read and bytes in all (0 where unknown).

    Raises:
        DataError: for text that is missing, cannot be read or is too little, and for a cache folder that
            cannot be written.
    """
    entries = read_entries(config.data)
    named, identities = _sources(config, entries)
    settings = _cache_settings(config, identities, tokenizer)
    key = _hash(settings)
    total = sum(identity.get("size", 0) for identity in identities)

    def build(folder: Path) -> dict[str, Any]:
        report = None if progress is None else lambda done: progress(done, total)
        encoded = encode([assignment for _, assignment in named], tokenizer, folder, report)
        _refuse_unusable(config, encoded)
        return {
            "settings": settings,
            "fingerprints": {
                split: _hash([content, tokenizer.fingerprint])
                for split, content in encoded.fingerprints.items()
            },
            "splits": {split: dataclasses.asdict(index) for split, index in encoded.splits.items()},
            "report": _report(config, folder, encoded, [name for name, _ in named], tokenizer).to_dict(),
        }

    cache_dir = cache_folder(config)
    try:
        folder, manifest, built = open_or_build(cache_dir, key, build)
    except OSError as error:
        raise _unwritable(cache_dir, error) from error
    train, validation = (_open(folder, split, manifest) for split in SPLITS)
    assert train is not None
    if train.num_tokens <= config.max_seq_len:
        raise DataError(
            f"{_wanted(config)} holds {train.num_tokens} tokens for training, not enough for one row of "
            f"--max-seq-len {config.max_seq_len}; add text or lower --max-seq-len."
        )
    weights = tuple(entry.weight for entry in entries if entry.weight is not None)
    packed, padded = row_costs(train.length_counts, config.max_seq_len)
    report = dataclasses.replace(
        DataReport.from_dict(manifest["report"]),
        seq_len=config.max_seq_len,
        packed=packed,
        padded=padded,
        mixture=_mixture(config, entries, train) if weights else (),
    )
    return PreparedData(train, validation, report, _hash(manifest["fingerprints"]), built, weights)


def fingerprint_in_cache(config: PretrainConfig, tokenizer: DocumentTokenizer) -> str | None:
    """Return the fingerprint of the text of a run, None where it would have to be tokenized first.

    Raises:
        DataError: for text that is missing.
    """
    _, identities = _sources(config, read_entries(config.data))
    manifest = find(cache_folder(config), _hash(_cache_settings(config, identities, tokenizer)))
    return None if manifest is None else _hash(manifest["fingerprints"])


def _cache_settings(
    config: PretrainConfig, identities: list[dict[str, Any]], tokenizer: DocumentTokenizer
) -> dict[str, Any]:
    """Return everything that tells a build from any other."""
    return {
        "format": _FORMAT,
        "sources": identities,
        "tokenizer": tokenizer.fingerprint,
        "text_key": config.text_key,
        "bad_lines": config.bad_lines,
        "val_fraction": 0.0 if config.val_data else config.val_fraction,
    }


def mixture_text(weights: Sequence[float], documents: Sequence[int]) -> str:
    """Return weights and the number of documents that each applies to, such as `70% of 120 documents`."""
    parts = (
        f"{weight * 100:.10g}% of {number} documents"
        for weight, number in zip(weights, documents, strict=False)
    )
    return ", ".join(parts) or "none"


def _mixture(
    config: PretrainConfig, entries: Sequence[Entry], train: TokenShards
) -> tuple[MixtureReport, ...]:
    """Return what the weights mean.

    Raises:
        DataError: where an entry with a weight has no training text.
    """
    mixed = []
    for number, entry in enumerate(entries):
        part = train.parts[number] if number < len(train.parts) else None
        if part is None or not part.num_documents:
            raise DataError(
                f"--data {entry.pattern} has a weight but holds no text for training; leave it out, add text "
                "or lower --val-fraction."
            )
        mixed.append(part)
    assert len(mixed) == len(train.parts)
    weights = [entry.weight or 0.0 for entry in entries]
    passes = passes_per_epoch(mixed, weights, seq_len=config.max_seq_len, packing=config.packing)
    return tuple(
        MixtureReport(entry.pattern, weight, part.num_tokens, number)
        for entry, weight, part, number in zip(entries, weights, mixed, passes, strict=True)
    )


def cache_folder(config: PretrainConfig) -> Path:
    """Return the folder of --cache-dir."""
    return default_cache_dir() if config.cache_dir is None else Path(config.cache_dir).expanduser()


def default_cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/minimind`, or `~/.cache/minimind` without that variable."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "minimind"


def _sources(
    config: PretrainConfig, entries: Sequence[Entry]
) -> tuple[list[tuple[str, Assignment]], list[dict[str, Any]]]:
    """Return the named sources of a run, and what tells whether one of them has changed."""
    if not config.data:
        from .builtin_corpus import embedded_fingerprint

        assignment = Assignment(EmbeddedText(), "train", config.val_fraction)
        return [("embedded text", assignment)], [{"embedded": embedded_fingerprint()}]
    held_out = 0.0 if config.val_data else config.val_fraction
    named, identities = [], []
    wanted = [
        (path, "--data", "train", held_out, part)
        for part, entry in enumerate(entries)
        for path in entry.files
    ]
    wanted += [
        (path, "--val-data", "validation", 0.0, 0) for path in find_files(config.val_data, "--val-data")
    ]
    for path, option, split, share, part in wanted:
        source = TextFile(path, option, config.text_key, config.bad_lines)
        named.append((str(path), Assignment(source, split, share, part)))
        # The cache tells which documents came from which entry, but not the entries' weights.
        identities.append({"split": split, "entry": part, **identify(path, option)})
    return named, identities


def _refuse_unusable(config: PretrainConfig, encoded: Encoded) -> None:
    """Raise DataError where a split that was asked for has no text."""
    train, validation = encoded.counts[:, :, 0].sum(0).tolist()
    left_out = sum(r.empty + r.bad_lines.total() for r in encoded.readings)
    if not train and validation and not config.val_data:
        raise DataError(
            f"--val-fraction {config.val_fraction:g} holds out all {validation} documents of "
            f"{_wanted(config)}; lower it, or add text."
        )
    if not train or (config.val_data and not validation):
        name = "--val-data " + " ".join(config.val_data) if train else _wanted(config)
        raise DataError(
            f"{name} holds no text ({left_out} documents were empty or could not be read); "
            "name a file with text in it."
        )


def _report(
    config: PretrainConfig, folder: Path, encoded: Encoded, names: list[str], tokenizer: DocumentTokenizer
) -> DataReport:
    splits: dict[str, SplitReport | None] = {}
    totals = encoded.counts.sum(0).tolist()
    for split, total in zip(SPLITS, totals, strict=True):
        amount = Amount(*total)
        splits[split] = (
            SplitReport(
                amount, length_quantiles(read_length_counts(folder, split)), encoded.duplicates[split]
            )
            if amount.documents
            else None
        )
    train, validation = splits["train"], splits["validation"]
    assert train is not None
    notes = []
    if validation is None and config.val_fraction > 0:
        notes.append(
            f"--val-fraction {config.val_fraction:g} chose none of {train.amount.documents} documents, "
            "so there is no validation; raise it or give --val-data."
        )
    packed, padded = row_costs(read_length_counts(folder, "train"), config.max_seq_len)
    sources = tuple(
        SourceReport(name, Amount(*counts[0]), Amount(*counts[1]), reading.empty, dict(reading.bad_lines))
        for name, counts, reading in zip(names, encoded.counts.tolist(), encoded.readings, strict=True)
    )
    return DataReport(
        sources=sources,
        train=train,
        validation=validation,
        validation_in_train=encoded.shared,
        vocab_size=tokenizer.vocab_size,
        unused_vocabulary=int((encoded.token_counts == 0).sum()),
        seq_len=config.max_seq_len,
        packed=packed,
        padded=padded,
        notes=tuple(notes),
    )


def _open(folder: Path, split: str, manifest: dict[str, Any]) -> TokenShards | None:
    values = manifest["splits"][split]
    index = SplitIndex(**{**values, "shard_tokens": tuple(values["shard_tokens"])})
    if not index.num_documents:
        return None
    return TokenShards(folder, split, index, manifest["fingerprints"][split])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _wanted(config: PretrainConfig) -> str:
    return "--data " + " ".join(config.data) if config.data else "the embedded text"


def _unwritable(cache_dir: Path, error: OSError) -> DataError:
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
        return DataError(
            f"the disk of the token cache {cache_dir} is full; free some space, or name another disk with "
            "--cache-dir."
        )
    return DataError(
        f"the token cache {cache_dir} cannot be written ({error.strerror or error}); "
        "name a folder that can with --cache-dir."
    )
