"""What is in the training text: sizes, lengths, duplicates, what was left out, what a row length costs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
_SOURCES_SHOWN = 8


@dataclass(frozen=True)
class Amount:
    """How much text there is.

    Attributes:
        documents: documents that are not empty.
        text_bytes: bytes of their text in UTF-8.
        tokens: tokens, with those that begin and end documents.
    """

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token, 0 where there is no token."""
        return self.text_bytes / self.tokens if self.tokens else 0.0

    def __str__(self) -> str:
        return (
            f"{self.documents:,} documents, {_bytes(self.text_bytes)}, {self.tokens:,} tokens "
            f"({self.bytes_per_token:.2f} bytes per token)"
        )


@dataclass(frozen=True)
class SourceReport:
    """One file, or the embedded text.

    Attributes:
        name: path of the file.
        train: what of it is trained on.
        validation: what of it is held out.
        empty: documents of white space only, dropped.
        bad_lines: lines skipped, by reason.
    """

    name: str
    train: Amount
    validation: Amount
    empty: int = 0
    bad_lines: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SplitReport:
    """The training or the validation text as a whole.

    Attributes:
        amount: how much.
        lengths: quantiles of the tokens in a document: p10, p50, p90, p99 and max.
        duplicates: documents equal to an earlier one of the split, by a 64-bit hash.
    """

    amount: Amount
    lengths: dict[str, int]
    duplicates: int


@dataclass(frozen=True)
class SequenceCost:
    """What rows of one length cost in one of the two ways to fill them.

    Attributes:
        truncated: share of the tokens that are never trained on because a row ended.
        padding: share of the computation spent on padding.
    """

    truncated: float
    padding: float


@dataclass(frozen=True)
class MixtureReport:
    """What one entry of --data with a weight gives.

    Attributes:
        name: the entry, without its weight.
        weight: its share of the training tokens, of 1.
        tokens: the training tokens it holds.
        passes: how many times an epoch reads all of them; below 1 where an epoch reads a part.
    """

    name: str
    weight: float
    tokens: int
    passes: float

    def __str__(self) -> str:
        return f"{self.name}: {self.weight:.1%} of the tokens; an epoch is {self.passes:.3g} epochs of it"


@dataclass(frozen=True)
class DataReport:
    """Everything known about the text of a run.

    Attributes:
        sources: one entry for each file, in order.
        train: the training text.
        validation: the held-out text, None without any.
        validation_in_train: validation documents that are also trained on.
        vocab_size: entries of the vocabulary.
        unused_vocabulary: entries that never occur in the training text.
        seq_len: the row length that the costs below are for.
        packed: cost of packed rows.
        padded: cost of one document a row.
        notes: what the user should know besides, in sentences.
        mixture: one entry for each --data where they have weights, in order.
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

    def to_dict(self) -> dict[str, Any]:
        """Return the report as values that JSON holds."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataReport:
        """Return the report that `to_dict` wrote, also after a passage through JSON."""
        sources = tuple(
            SourceReport(
                **{**source, "train": Amount(**source["train"]), "validation": Amount(**source["validation"])}
            )
            for source in values["sources"]
        )
        validation = values["validation"]
        return cls(
            **{
                **values,
                "sources": sources,
                "train": _split(values["train"]),
                "validation": None if validation is None else _split(validation),
                "packed": SequenceCost(**values["packed"]),
                "padded": SequenceCost(**values["padded"]),
                "notes": tuple(values["notes"]),
                "mixture": tuple(MixtureReport(**entry) for entry in values["mixture"]),
            }
        )

    def lines(self) -> list[str]:
        """Return the report as lines for people."""
        lines = [f"training    {self.train.amount}"]
        if self.validation is not None:
            lines.append(f"validation  {self.validation.amount}")
        lines += [f"mixture     {entry}" for entry in self.mixture]
        lines.append(f"lengths     {_quantile_text(self.train.lengths)} tokens a document")
        lines.append(
            f"rows        of {self.seq_len}: packed {self.packed.truncated:.1%} of the text lost, "
            f"{self.packed.padding:.1%} padding; one document a row {self.padded.truncated:.1%} lost, "
            f"{self.padded.padding:.1%} padding"
        )
        lines.append(f"vocabulary  {self.unused_vocabulary:,} of {self.vocab_size:,} entries never occur")
        if duplicates := self.train.duplicates:
            lines.append(f"duplicates  {duplicates:,} training documents repeat an earlier one")
        if self.validation_in_train:
            lines.append(
                f"overlap     {self.validation_in_train:,} validation documents are also in the training text"
            )
        if empty := sum(source.empty for source in self.sources):
            lines.append(f"empty       {empty:,} documents dropped")
        bad: Counter[str] = Counter()
        for source in self.sources:
            bad.update(source.bad_lines)
        lines += [f"skipped     {count:,} lines: {reason}" for reason, count in bad.most_common()]
        lines += [f"source      {s.name}: {_source_text(s)}" for s in self.sources[:_SOURCES_SHOWN]]
        if (more := len(self.sources) - _SOURCES_SHOWN) > 0:
            lines.append(f"source      and {more:,} more")
        return [*lines, *(f"note        {note}" for note in self.notes)]


def length_quantiles(length_counts: NDArray[np.int64]) -> dict[str, int]:
    """Return exact quantiles: the smallest length that at least that share of the documents does not exceed.

    Args:
        length_counts: (2, L) lengths ascending and how often each occurs.
    """
    lengths, counts = length_counts
    reached = np.cumsum(counts)
    # Ceil in integers: 0.9 * 10 must be the ninth document, whatever binary fractions make of it.
    ranks = {name: -(-int(reached[-1]) * round(share * 100) // 100) for name, share in QUANTILES.items()}
    return {name: int(lengths[np.searchsorted(reached, rank)]) for name, rank in ranks.items()}


def row_costs(length_counts: NDArray[np.int64], seq_len: int) -> tuple[SequenceCost, SequenceCost]:
    """Return the cost of packed rows and of one document a row, exact from the lengths alone."""
    lengths, counts = length_counts
    tokens, documents = int(lengths @ counts), int(counts.sum())
    # The last token of a document or of the stream is only ever a target.
    packed_rows = max(-(-(tokens - 1) // seq_len), 1)
    packed = SequenceCost(truncated=0.0, padding=1 - (tokens - 1) / (packed_rows * seq_len))
    lost = int(np.maximum(lengths - seq_len - 1, 0) @ counts)
    inputs = int(np.minimum(lengths - 1, seq_len) @ counts)
    padded = SequenceCost(truncated=lost / tokens, padding=1 - inputs / (documents * seq_len))
    return packed, padded


def _split(values: Mapping[str, Any]) -> SplitReport:
    return SplitReport(Amount(**values["amount"]), dict(values["lengths"]), values["duplicates"])


def _source_text(source: SourceReport) -> str:
    parts = [
        f"{amount.documents:,} documents, {amount.tokens:,} tokens {use}"
        for amount, use in ((source.train, "trained on"), (source.validation, "held out"))
        if amount.documents
    ]
    return "; ".join(parts) or "nothing that can be used"


def _quantile_text(lengths: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in lengths.items())


def _bytes(count: int) -> str:
    for power, unit in ((3, "GB"), (2, "MB"), (1, "kB")):
        if count >= 1000**power:
            return f"{count / 1000**power:.1f} {unit}"
    return f"{count} bytes"
