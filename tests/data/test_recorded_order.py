"""The weighted order is recorded: a change of it would give resumed runs other sequences without a word."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest

from minimind.data.batch_plan import BatchPlan
from minimind.data.batching import StepBuilder
from minimind.data.document_index import Part
from minimind.data.mixture import MixedOrder, source_epochs

# Where a recorded value is to change on purpose, `data_mixture` in the settings of a run must change with it,
# so that runs begun before are refused and not continued in another order.
LENGTHS = [[2 + 7 * i % 31 for i in range(90)], [3 + 11 * i % 53 for i in range(40)], [40, 5, 9]]
WEIGHTS = (0.5, 0.3, 0.2)


@pytest.mark.parametrize(
    ("packing", "num_sequences", "digest"),
    [
        (True, 169, "38b3e461e053434e5e4d1798a48c204f"),
        (False, 141, "25e905f3cbc5cb2eaf222549df982b4f"),
    ],
)
def test_the_steps_of_four_epochs_are_those_recorded(make_shards, packing, num_sequences, digest):
    parts = [part for part, lengths in enumerate(LENGTHS) for _ in lengths]
    shards = make_shards([n for lengths in LENGTHS for n in lengths], parts=parts)
    order = MixedOrder(shards, WEIGHTS, seq_len=16, packing=packing, seed=42, window_tokens=300)
    assert order.num_sequences == num_sequences
    builder = StepBuilder(shards, order, 16, packing, BatchPlan(8, 1, 1), process_index=0)
    found = hashlib.blake2b(digest_size=16)
    for epoch in range(4):
        for step in builder.steps(epoch):
            found.update(step.arrays.wide.astype("<i8").tobytes())
    assert found.hexdigest() == digest


def test_the_windows_of_a_corpus_of_40_million_tokens_are_those_recorded():
    """Without tokens: the order needs none. The window has the size that runs have."""
    lengths = [400_000 + 1000 * (i % 7) for i in range(100)]
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    documents = np.arange(0, 101, 2)
    parts = [
        Part(low, high, np.array(np.unique(lengths[low:high], return_counts=True)))
        for low, high in ((0, 70), (70, 100))
    ]
    blocks = np.stack((documents, offsets[documents]), axis=1)
    shards = SimpleNamespace(offsets=offsets, blocks=blocks, parts=parts, num_tokens=int(offsets[-1]))
    order = MixedOrder(shards, (0.4, 0.6), seq_len=512, packing=True, seed=7)
    found = hashlib.blake2b(digest_size=16)
    windows = [window for epoch in range(3) for window in order.windows(epoch)]
    for window in windows:
        for array in (np.array([window.first_sequence, window.skip]), window.order, window.documents):
            found.update(array.astype("<i8").tobytes())
    assert [len(window.order) for window in windows] == [
        26776,
        26740,
        25186,
        793,
        26752,
        25988,
        25169,
        1540,
        26004,
        25974,
        25184,
    ]
    assert found.hexdigest() == "bf03a3048f37b4ca175449f50e650984"


def test_an_epoch_reads_each_entry_as_often_as_its_weight_says():
    lengths = [[10, 20, 30], [5, 5, 5, 5]]
    parts = [
        Part(first, first + len(n), np.array(np.unique(n, return_counts=True)))
        for n, first in zip(lengths, (0, 3), strict=True)
    ]
    # 80 tokens, 79 of them with a successor: 16 sequences of 5.
    packed = source_epochs(parts, (0.75, 0.25), seq_len=5, packing=True)
    assert packed == (0.75 * 16 * 5 / 60, 0.25 * 16 * 5 / 20)
    # Inputs of at most 8 tokens: 3 * 8 of the first entry, 4 * 4 of the second; 40 in all.
    documents = np.array([0.5 * 40 * 3 / 24, 0.5 * 40 * 4 / 16])
    scaled = documents * round(documents.sum()) / documents.sum()
    padded = source_epochs(parts, (0.5, 0.5), seq_len=8, packing=False)
    assert padded == pytest.approx((scaled[0] / 3, scaled[1] / 4))


@pytest.mark.parametrize(("window_tokens", "windows"), [(300, 4), (299, 5), (1200, 1), (5000, 1)])
def test_the_last_sequence_and_the_last_window_of_an_epoch_are_no_larger_than_needed(
    make_shards, window_tokens, windows
):
    shards = make_shards([10] * 60 + [5] * 120, parts=[0] * 60 + [1] * 120)
    order = MixedOrder(shards, (0.5, 0.5), seq_len=11, packing=True, seed=1, window_tokens=window_tokens)
    # The last token has no successor: 1,199 targets fill 109 sequences.
    assert order.num_sequences == 109
    assert len(list(order.windows(0))) == windows
