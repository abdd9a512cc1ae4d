"""Windows of an evaluation: every target once, with the context that it is promised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.data.eval_windows import document_windows, packed_windows, window_batch
from minimind.data.loader import evaluation_batches
from minimind.data.packing import IGNORED
from support.made_text import write_shards


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    length=st.integers(2, 17),
    stride=st.integers(1, 17),
    packing=st.booleans(),
    processes=st.integers(1, 3),
)
def test_every_token_that_follows_another_is_a_target_once(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    length: int,
    stride: int,
    packing: bool,
    processes: int,
) -> None:
    stride = min(stride, length)
    shards = write_shards(tmp_path_factory.mktemp("shards"), lengths, shard_tokens=50)
    whole = packed_windows(shards, length) if packing else document_windows(shards, length, stride)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    met = []
    for process in range(processes):
        windows = whole.share(process, processes)
        for first in range(0, len(windows), 3):
            cut = window_batch(shards, windows, slice(first, first + 3), pad_token_id=60_000)
            assert cut.input_ids.shape[1] <= length
            for sequence, place in zip(*np.nonzero(cut.labels != IGNORED), strict=True):
                token, before = int(cut.labels[sequence, place]), int(cut.input_ids[sequence, place])
                assert token == before + 1
                document = int(np.searchsorted(ends, token, side="right"))
                assert cut.documents[sequence, place] == document
                context = int(cut.position_ids[sequence, place]) + 1
                assert token - context >= starts[document]
                if not packing:
                    assert context >= min(token - starts[document], length - stride)
                # What it may attend to is of its document and reaches back to position 0.
                same = np.arange(cut.input_ids.shape[1]) <= place
                if cut.document_ids is not None:
                    same &= cut.document_ids[sequence] == cut.document_ids[sequence, place]
                assert cut.input_ids[sequence, same].tolist() == list(range(token - context, token))
                met.append(token)
    assert sorted(met) == [t for s, e in zip(starts, ends, strict=True) for t in range(s + 1, e)]


def test_packed_windows_are_the_sequences_of_a_validation(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [30, 5, 1, 44, 2, 18, 60, 7])
    cut = window_batch(shards, packed_windows(shards, 16), slice(None), pad_token_id=0)
    batches = evaluation_batches(
        shards, seq_len=16, packing=True, batch_size=20, process_index=0, num_processes=1, device="cpu"
    )
    (batch,) = batches
    count = len(cut.labels)
    assert torch.equal(torch.from_numpy(cut.labels), batch.shift_labels[:count])
    assert (batch.shift_labels[count:] == IGNORED).all()
    real = torch.from_numpy(cut.labels) != IGNORED
    for ours, theirs in (
        (cut.input_ids, batch.input_ids),
        (cut.document_ids, batch.document_ids),
        (cut.position_ids, batch.position_ids),
    ):
        assert torch.equal(torch.from_numpy(ours)[real], theirs[:count][real])


def test_padding_of_a_packed_sequence_is_a_document_beside_the_real_ones(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [10, 3, 5, 4])
    batch = window_batch(shards, packed_windows(shards, 16), slice(None), pad_token_id=0)
    assert batch.document_ids is not None
    # The second sequence has 21 - 16 inputs: two of the third document, three of the fourth.
    assert batch.document_ids[1].tolist() == [0, 0, 1, 1, 1] + [2] * 11


def test_windows_of_equal_length_keep_their_order(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [11, 6] * 200)
    windows = document_windows(shards, 10, 10).share(0, 1)
    lengths = windows.stop - windows.start
    assert lengths.tolist() == [10] * 200 + [5] * 200
    assert (np.diff(windows.start)[np.diff(lengths) == 0] > 0).all()
