"""Statistics of the data: sizes, lengths, duplicates, dropped documents, cost of the sequence length."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..formatting import size
from .files import skipped_lines

QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
_SOURCES_SHOWN = 8
# Lines about data that is lost or questionable, and how many are shown without --verbose.
_PROBLEMS = ("unknown", "duplicates", "overlap", "empty", "skipped", "note")
_PROBLEMS_SHOWN = 5


@dataclass(frozen=True)
class Amount:
    """The size of some documents.

    Attributes:
        documents: non-empty documents.
        text_bytes: UTF-8 bytes of their text.
        tokens: tokens, including start and end tokens.
    """

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token, 0 without tokens."""
        return self.text_bytes / self.tokens if self.tokens else 0.0

    def __str__(self) -> str:
        return (
            f"{self.documents:,} documents, {size(self.text_bytes)}, {self.tokens:,} tokens "
            f"({self.bytes_per_token:.2f} bytes per token)"
        )


@dataclass(frozen=True)
class SourceReport:
    """One file, or the embedded corpus.

    Attributes:
        name: path of the file.
        train: its training documents.
        validation: its held-out documents.
        empty: documents of only white space, dropped.
        bad_lines: skipped lines by reason.
    """

    name: str
    train: Amount
    validation: Amount
    empty: int = 0
    bad_lines: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SplitReport:
    """The training or the validation split.

    Attributes:
        amount: its size.
        lengths: quantiles of tokens per document: p10, p50, p90, p99 and max.
        duplicates: documents equal to an earlier one of the split, by 64-bit hash.
    """

    amount: Amount
    lengths: dict[str, int]
    duplicates: int


@dataclass(frozen=True)
class SequenceCost:
    """The cost of a sequence length, packed or padded.

    Attributes:
        truncated: share of the tokens lost to truncation.
        padding: share of the positions that are padding.
    """

    truncated: float
    padding: float


@dataclass(frozen=True)
class MixtureReport:
    """One source of --data with a weight.

    Attributes:
        name: the source, without its weight.
        weight: its share of the training tokens.
        tokens: its training tokens.
        passes: how often one epoch reads the source; below 1 when it reads a part.
    """

    name: str
    weight: float
    tokens: int
    passes: float

    def __str__(self) -> str:
        return f"{self.name}: {self.weight:.1%} of the tokens; an epoch is {self.passes:.3g} epochs of it"


@dataclass(frozen=True)
class DataReport:
    """Statistics of the data of a run.

    Attributes:
        sources: one per file, in order.
        train: the training split.
        validation: the held-out split, or None.
        validation_in_train: validation documents that are also training documents.
        vocab_size: size of the vocabulary.
        unused_vocabulary: ids that never occur in the training split.
        seq_len: sequence length of the costs below.
        packed: cost with packing.
        padded: cost of one document per sequence.
        notes: further remarks, as sentences.
        mixture: one per source of --data, in order; empty without weights.
        unknown_share: share of the training tokens that are the unknown token.
        skipped_files: files and folders that were not read, by reason.
    """

    sources: tuple[SourceReport, ...]
    train: SplitReport
    validation: SplitReport | None
    validation_in_train: int
    vocab_size: int
    unused_vocabulary: int
    seq_len: int
    packed: SequenceCost
    padded: SequenceCost
    notes: tuple[str, ...] = ()
    mixture: tuple[MixtureReport, ...] = ()
    unknown_share: float = 0.0
    skipped_files: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-serializable values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataReport:
        """Return the report of `to_dict`, also after JSON serialization."""
        sources = (_with_amounts(source, "train", "validation") for source in values["sources"])
        train, validation = values["train"], values["validation"]
        parts = {
            "sources": tuple(SourceReport(**source) for source in sources),
            "train": SplitReport(**_with_amounts(train, "amount")),
            "validation": validation and SplitReport(**_with_amounts(validation, "amount")),
            "packed": SequenceCost(**values["packed"]),
            "padded": SequenceCost(**values["padded"]),
            "notes": tuple(values["notes"]),
            "mixture": tuple(MixtureReport(**entry) for entry in values["mixture"]),
        }
        return cls(**{**values, **parts})

    def problems(self) -> list[str]:
        """Return the lines about data that is lost or questionable, at most a few."""
        lines = [line for line in self.lines() if line.partition(" ")[0] in _PROBLEMS]
        more = len(lines) - _PROBLEMS_SHOWN
        return lines[:_PROBLEMS_SHOWN] + [f"and {more:,} more; --verbose lists them"] * (more > 0)

    def lines(self) -> list[str]:
        """Return the report as printable lines."""
        lines = [f"training    {self.train.amount}"]
        if self.validation is not None:
            lines.append(f"validation  {self.validation.amount}")
        lines += [f"mixture     {entry}" for entry in self.mixture]
        quantiles = ", ".join(f"{name} {value:,}" for name, value in self.train.lengths.items())
        lines.append(f"lengths     {quantiles} tokens per document")
        lines.append(
            f"packing     sequences of {self.seq_len}: {self.packed.padding:.1%} padding, nothing truncated; "
            f"without packing {self.padded.padding:.1%} padding, {self.padded.truncated:.1%} truncated"
        )
        lines.append(f"vocabulary  {self.unused_vocabulary:,} of {self.vocab_size:,} ids never occur")
        if self.unknown_share:
            lines.append(f"unknown     {self.unknown_share:.2%} of the training tokens are the unknown token")
        if duplicates := self.train.duplicates:
            lines.append(f"duplicates  {duplicates:,} training documents repeat an earlier one")
        if self.validation_in_train:
            lines.append(
                f"overlap     {self.validation_in_train:,} validation documents are also training documents"
            )
        if empty := sum(source.empty for source in self.sources):
            lines.append(f"empty       {empty:,} documents dropped")
        bad: Counter[str] = Counter()
        for source in self.sources:
            bad.update(source.bad_lines)
        lines += [f"skipped     {count:,} lines: {reason}" for reason, count in bad.most_common()]
        lines += [f"skipped     {line}" for line in skipped_lines(Counter(self.skipped_files))]
        lines += [f"source      {s.name}: {_source_text(s)}" for s in self.sources[:_SOURCES_SHOWN]]
        if (more := len(self.sources) - _SOURCES_SHOWN) > 0:
            lines.append(f"source      and {more:,} more")
        return [*lines, *(f"note        {note}" for note in self.notes)]


def length_quantiles(length_counts: NDArray[np.int64]) -> dict[str, int]:
    """Return exact quantiles: the smallest length that at least this share of the documents does not exceed.

    Args:
        length_counts: (2, L) lengths, ascending, and their counts.
    """
    lengths, counts = length_counts
    reached = np.cumsum(counts)
    # Integer ceiling, so that 0.9 * 10 is exactly the ninth document.
    ranks = {name: -(-int(reached[-1]) * round(share * 100) // 100) for name, share in QUANTILES.items()}
    return {name: int(lengths[np.searchsorted(reached, rank)]) for name, rank in ranks.items()}


def sequence_costs(length_counts: NDArray[np.int64], seq_len: int) -> tuple[SequenceCost, SequenceCost]:
    """Return the cost with and without packing, computed exactly from the lengths."""
    lengths, counts = length_counts
    tokens, documents = int(lengths @ counts), int(counts.sum())
    # The last token of a document or of the stream is only a target.
    num_packed = max(-(-(tokens - 1) // seq_len), 1)
    packed = SequenceCost(truncated=0.0, padding=1 - (tokens - 1) / (num_packed * seq_len))
    lost = int(np.maximum(lengths - seq_len - 1, 0) @ counts)
    inputs = int(np.minimum(lengths - 1, seq_len) @ counts)
    padded = SequenceCost(truncated=lost / tokens, padding=1 - inputs / (documents * seq_len))
    return packed, padded


def _with_amounts(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {**values, **{name: Amount(**values[name]) for name in names}}


def _source_text(source: SourceReport) -> str:
    parts = [
        f"{amount.documents:,} documents, {amount.tokens:,} tokens {use}"
        for amount, use in ((source.train, "trained on"), (source.validation, "held out"))
        if amount.documents
    ]
    return "; ".join(parts) or "no documents"
