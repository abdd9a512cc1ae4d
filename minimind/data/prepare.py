"""Open the token shards of a configuration, tokenizing its data once into the cache."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..config.options import PretrainConfig
from ..errors import DataError
from ..io.atomic import refusal
from ..tokenizer import Tokenizer
from .cache import find, open_or_build
from .chat import CHAT_KEYS, ChatRenderer
from .document_index import read_length_counts
from .documents import BuiltinCorpus, CustomDocuments, Documents
from .files import identify, skipped_lines
from .hub import HubReader, HubShard
from .mixture import source_epochs
from .readers import TextFile
from .report import (
    Amount,
    DataReport,
    MixtureReport,
    SourceReport,
    SplitReport,
    length_quantiles,
    sequence_costs,
)
from .shards import SplitIndex, TokenShards
from .sources import DataSource, find_sources, read_sources
from .tokenization import SPLITS, Assignment, DocumentSource, Encoded, encode

# Part of every cache key: increase when the files of a build change.
_FORMAT = 3
# Warn above this share of unknown tokens.
_UNKNOWN_SHARE = 0.001


@dataclass(frozen=True)
class PreparedData:
    """Tokenized data, ready for training.

    Attributes:
        train: the training split.
        validation: the held-out split, or None.
        report: statistics of both.
        fingerprint: identifies the documents, their order and the tokenizer. Independent of paths and
            modification times, so a run can resume after its files were moved.
        built: whether this call tokenized the data rather than finding it in the cache.
        weights: share of the training tokens of each source of --data, summing to 1; empty when an epoch
            reads every document once.
    """

    train: TokenShards
    validation: TokenShards | None
    report: DataReport
    fingerprint: str
    built: bool
    weights: tuple[float, ...] = ()

    @property
    def mixture(self) -> str:
        """The weights and the documents of each, such as `70% of 120 documents`, or `none`.

        With `fingerprint` it identifies the order of the sequences.
        """
        shares = zip(self.weights, self.train.parts, strict=False)
        texts = (f"{weight * 100:.10g}% of {part.num_documents} documents" for weight, part in shares)
        return ", ".join(texts) or "none"


def prepare_data(
    config: PretrainConfig,
    tokenizer: Tokenizer,
    progress: Callable[[int, int], None] | None = None,
    documents: Documents | None = None,
) -> PreparedData:
    """Open the tokenized data of a run; tokenize it first if the cache does not have it.

    Call it before the process group is initialized: one process per machine builds under a file lock, the
    others wait for the lock and open the result.

    Args:
        config: the data options.
        tokenizer: its fingerprint is part of the cache key.
        progress: called during a build with bytes read and total bytes (0 if unknown).
        documents: training documents of the caller, in place of --data.

    Raises:
        DataError: for data that is missing, unreadable or too small, and for a cache folder that cannot be
            written.
    """
    skipped: Counter[str] = Counter()
    cache_dir, chat = cache_folder(config), _chat(config, tokenizer)
    sources = read_sources(config.data, skipped=skipped, text_key=config.text_key, cache_dir=cache_dir)
    tick = (lambda: None) if progress is None else (lambda: progress(0, 0))
    named, identities = _sources(config, sources, skipped, documents, chat, tick)
    option = "data=" if documents is not None else _data_option(config)
    settings = _cache_settings(config, identities, tokenizer, chat)
    shards = [item.source.shard for _, item in named if isinstance(item.source, HubReader)]
    # The size of a shard of the Hub is unknown.
    total = 0 if shards else sum(identity.get("size", 0) for identity in identities)

    def build(folder: Path) -> dict[str, Any]:
        report = None if progress is None else lambda done: progress(done if total else 0, total)
        names, assignments = zip(*named, strict=True)
        encoded = encode(assignments, tokenizer, folder, report)
        _refuse_unusable(config, encoded, option)
        return {
            "settings": settings,
            "fingerprints": {
                split: _hash([content, tokenizer.fingerprint, *([chat.fingerprint] if chat else [])])
                for split, content in encoded.fingerprints.items()
            },
            "splits": {split: dataclasses.asdict(index) for split, index in encoded.splits.items()},
            "report": _report(config, folder, encoded, names, tokenizer, chat).to_dict(),
        }

    try:
        opened = open_or_build(cache_dir, _hash(settings), build)
    except OSError as error:
        raise _unwritable(cache_dir, error) from error
    for folder in {shard.dataset.folder(cache_dir, config.text_key) for shard in shards}:
        if opened.built:
            shutil.rmtree(folder, ignore_errors=True)
    manifest = opened.manifest
    train, validation = (_open(opened.folder, split, manifest) for split in SPLITS)
    assert train is not None
    if train.num_tokens <= config.max_seq_len:
        raise DataError(
            f"{option} has {train.num_tokens} training tokens, fewer than one sequence of "
            f"--max-seq-len {config.max_seq_len}; add data or lower --max-seq-len."
        )
    weights = tuple(source.weight for source in sources if source.weight is not None)
    packed, padded = sequence_costs(train.length_counts, config.max_seq_len)
    report = DataReport.from_dict(manifest["report"])
    _warn_of_data(train, len(named), skipped)
    if opened.corrupt is not None:
        corrupt = f"the token cache was damaged and was built again: {opened.corrupt}."
        warnings.warn(corrupt, stacklevel=2)
        report = dataclasses.replace(report, notes=(*report.notes, corrupt))
    report = dataclasses.replace(
        report,
        skipped_files=dict(skipped),
        unknown_share=train.unknown_share,
        seq_len=config.max_seq_len,
        packed=packed,
        padded=padded,
        mixture=_mixture(config, sources, train) if weights else (),
    )
    return PreparedData(train, validation, report, _hash(manifest["fingerprints"]), opened.built, weights)


def _data_option(config: PretrainConfig) -> str:
    return "--data " + " ".join(config.data) if config.data else "the embedded corpus"


def _warn_of_data(train: TokenShards, num_files: int, skipped: Counter[str]) -> None:
    """Warn if most files were skipped, or many tokens are unknown."""
    if (count := skipped.total()) > num_files:
        warnings.warn(
            f"--data: {count} files or folders were skipped and only {num_files} files are read: "
            f"{'; '.join(skipped_lines(skipped))}.",
            stacklevel=3,
        )
    if train.unknown_share > _UNKNOWN_SHARE:
        warnings.warn(
            f"{train.unknown_share:.1%} of the training tokens are the unknown token: the vocabulary of "
            "--tokenizer lacks text of this data; choose a tokenizer that was trained on such text.",
            stacklevel=3,
        )


def fingerprint_in_cache(config: PretrainConfig, tokenizer: Tokenizer) -> str | None:
    """Return the fingerprint of the data of a run, or None if it is not in the cache.

    Raises:
        DataError: for data that is missing.
    """
    cache_dir, chat = cache_folder(config), _chat(config, tokenizer)
    sources = read_sources(config.data, text_key=config.text_key, cache_dir=cache_dir)
    _, identities = _sources(config, sources, Counter(), chat=chat)
    manifest = find(cache_dir, _hash(_cache_settings(config, identities, tokenizer, chat)))
    return None if manifest is None else _hash(manifest["fingerprints"])


def _cache_settings(
    config: PretrainConfig, identities: list[dict[str, Any]], tokenizer: Tokenizer, chat: ChatRenderer | None
) -> dict[str, Any]:
    """Return everything that a build depends on."""
    template = {} if chat is None else {"chat_template": chat.fingerprint}
    return {
        "format": _FORMAT,
        "sources": identities,
        "tokenizer": tokenizer.fingerprint,
        "text_key": config.text_key,
        "bad_lines": config.bad_lines,
        "val_fraction": 0.0 if config.val_data else config.val_fraction,
        **template,
    }


def _chat(config: PretrainConfig, tokenizer: Tokenizer) -> ChatRenderer | None:
    """Return what renders conversations, where --text-key names some."""
    return ChatRenderer(tokenizer) if config.data and config.text_key in CHAT_KEYS else None


def _mixture(
    config: PretrainConfig, sources: Sequence[DataSource], train: TokenShards
) -> tuple[MixtureReport, ...]:
    """Return the effect of the weights."""
    for source, part in zip_longest(sources, train.parts):
        if part is None or not part.num_documents:
            raise DataError(
                f"--data {source.pattern} has a weight but no training documents; remove it, add data or "
                "lower --val-fraction."
            )
    weights = [source.weight or 0.0 for source in sources]
    epochs = source_epochs(train.parts, weights, seq_len=config.max_seq_len, packing=config.packing)
    return tuple(
        MixtureReport(source.pattern, weight, part.num_tokens, number)
        for source, weight, part, number in zip(sources, weights, train.parts, epochs, strict=True)
    )


def cache_folder(config: PretrainConfig) -> Path:
    """Return the folder of --cache-dir."""
    return default_cache_dir() if config.cache_dir is None else Path(config.cache_dir).expanduser()


def default_cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/minimind`, or `~/.cache/minimind` without that variable."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "minimind"


def _sources(
    config: PretrainConfig,
    sources: Sequence[DataSource],
    skipped: Counter[str],
    documents: Documents | None = None,
    chat: ChatRenderer | None = None,
    tick: Callable[[], object] = lambda: None,
) -> tuple[list[tuple[str, Assignment]], list[dict[str, Any]]]:
    """Return the named files of a run, and the identity of each, which changes with its content."""
    if documents is not None or not config.data:
        custom = CustomDocuments(BuiltinCorpus() if documents is None else documents)
        name, kind = type(documents).__name__, "documents"
        if documents is None:
            name, kind = "embedded text", "embedded"
        assignment = Assignment(custom, "train", config.val_fraction)
        return [(name, assignment)], [{kind: custom.fingerprint}]
    cache_dir, held_out = cache_folder(config), 0.0 if config.val_data else config.val_fraction
    named, identities = [], []
    wanted = [
        (path, "--data", "train", held_out, part)
        for part, source in enumerate(sources)
        for path in source.files
    ]
    held = find_sources(config.val_data, "--val-data", skipped, config.text_key, cache_dir)
    wanted += [(path, "--val-data", "validation", 0.0, 0) for path in held]
    for path, option, split, share, part in wanted:
        file = path.file(cache_dir, config.text_key) if isinstance(path, HubShard) else path
        reader = TextFile(file, option, config.text_key, config.bad_lines, chat)
        source: DocumentSource = reader
        if isinstance(path, HubShard):
            source, identity = HubReader(path, reader, tick), path.identity
        else:
            identity = identify(path, option)
        named.append((str(path), Assignment(source, split, share, part)))
        # The cache key contains the source of each document, but not the weights.
        identities.append({"split": split, "entry": part, **identity})
    return named, identities


def _refuse_unusable(config: PretrainConfig, encoded: Encoded, option: str) -> None:
    """Raise DataError when a requested split has no documents."""
    train, validation = encoded.counts[:, :, 0].sum(0).tolist()
    dropped = sum(r.empty + r.bad_lines.total() for r in encoded.readings)
    if not train and validation and not config.val_data:
        raise DataError(
            f"--val-fraction {config.val_fraction:g} holds out all {validation} documents of "
            f"{option}; lower it, or add data."
        )
    if not train or (config.val_data and not validation):
        name = "--val-data " + " ".join(config.val_data) if train else option
        raise DataError(
            f"{name} has no text ({dropped} documents were empty or invalid); name a file with text."
        )


def _report(
    config: PretrainConfig,
    folder: Path,
    encoded: Encoded,
    names: Sequence[str],
    tokenizer: Tokenizer,
    chat: ChatRenderer | None,
) -> DataReport:

    def split_report(split: str, amount: Amount) -> SplitReport | None:
        if not amount.documents:
            return None
        lengths = length_quantiles(read_length_counts(folder, split))
        return SplitReport(amount, lengths, encoded.duplicates[split])

    amounts = (Amount(*total) for total in encoded.counts.sum(0).tolist())
    train, validation = map(split_report, SPLITS, amounts)
    assert train is not None
    notes = []
    if validation is None and config.val_fraction > 0:
        notes.append(
            f"--val-fraction {config.val_fraction:g} selected none of {train.amount.documents} documents, "
            "so there is no validation; raise it or pass --val-data."
        )
    if chat is not None:
        rendered = sum(reading.conversations for reading in encoded.readings)
        notes.append(f"{rendered:,} conversations were rendered by {chat.description}.")
    packed, padded = sequence_costs(read_length_counts(folder, "train"), config.max_seq_len)
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
        unused_vocabulary=int((encoded.token_counts[0] == 0).sum()),
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


def _unwritable(cache_dir: Path, error: OSError) -> DataError:
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
        return DataError(
            f"the disk of the token cache {cache_dir} is full; free some space, or set --cache-dir to "
            "another disk."
        )
    return DataError(
        f"the token cache {cache_dir} cannot be written ({refusal(cache_dir, error)}); "
        "set --cache-dir to a writable folder."
    )
