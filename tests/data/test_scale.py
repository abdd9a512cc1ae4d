"""What is read at the start of a run, and at any position, does not grow with the corpus."""

from __future__ import annotations

import hashlib
import mmap
import time
import tracemalloc
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minimind.data.batch_plan import BatchPlan
from minimind.data.batching import StepBuilder
from minimind.data.document_index import BLOCK_TOKENS, IndexWriter, Part, read_blocks, read_parts
from minimind.data.loader import Loader
from minimind.data.mixture import MixedOrder
from minimind.data.sampler import SequenceOrder
from minimind.data.shards import OPEN_SHARDS

LENGTH = 1000  # tokens of every document of the large corpus
DOCUMENTS = 100_000_000


@settings(max_examples=100)
@given(
    st.lists(st.lists(st.integers(1, 200), min_size=1, max_size=20), max_size=5),
    st.sampled_from([1, 7, 32, 500]),
)
@example([[8]], 7)  # the last token alone is in the second block
def test_the_blocks_written_are_those_found_from_all_offsets(tmp_path_factory, batches, block_tokens):
    folder = tmp_path_factory.mktemp("index")
    writer = IndexWriter(folder, "train", block_tokens)
    for part, lengths in enumerate(batches):
        writer.append(np.array(lengths, np.int64), part)
    writer.close()
    offsets = np.fromfile(folder / "train.offsets", np.int64)
    assert offsets.tolist() == np.cumsum([0, *chain.from_iterable(batches)]).tolist()
    marks = np.arange(0, offsets[-1], block_tokens)
    bounds = np.append(np.unique(np.searchsorted(offsets[:-1], marks)), len(offsets) - 1)
    assert read_blocks(folder, "train").tolist() == [[i, offsets[i]] for i in bounds.tolist()]
    parts = read_parts(folder, "train")
    assert [(part.num_documents, part.num_tokens) for part in parts] == [(len(n), sum(n)) for n in batches]


@pytest.mark.parametrize(
    ("packing", "digest"),
    [(True, "a8a13b76117c8d4a229e2f58378da4b5"), (False, "58d85a516649600dc852b9118f2f31ee")],
)
def test_the_order_without_weights_is_fixed_for_ever(make_shards, packing, digest):
    """A run that was begun with an earlier version goes on with the sequences it has not seen."""
    shards = make_shards([i * 37 % 90 + 2 for i in range(400)] + [700], block_tokens=32)
    shards.content = ""  # the digests of the positions alone, as earlier versions recorded them
    order = SequenceOrder(shards, seq_len=16, packing=packing, seed=5, window_blocks=4)
    digests = hashlib.sha256()
    for step in StepBuilder(
        shards,
        order,
        seq_len=16,
        packing=packing,
        plan=BatchPlan(8, 1, 1),
        process_index=0,
        pad_token_id=0,
    ).steps(3, 0):
        digests.update(step.digest.encode())
    assert digests.hexdigest()[:32] == digest


class Offsets:
    """The offsets of documents that are all equally long, never written down; counts what is asked of it."""

    def __init__(self) -> None:
        self.read = 0

    def __getitem__(self, where):
        self.read += np.size(where)
        return where * LENGTH


class LargeShards:
    """100 billion tokens in 100 million documents and three entries, of which only the index is real."""

    def __init__(self) -> None:
        self.num_documents, self.num_tokens = DOCUMENTS, DOCUMENTS * LENGTH
        self.offsets = Offsets()
        self.content = ""
        first = -(-np.arange(0, self.num_tokens, BLOCK_TOKENS) // LENGTH)
        self.blocks = np.stack((first, first * LENGTH), axis=1)
        self.blocks = np.append(self.blocks, [[DOCUMENTS, self.num_tokens]], axis=0)
        ends = (0, DOCUMENTS // 2, DOCUMENTS // 2 + 5_000_003, DOCUMENTS)
        self.parts = tuple(Part(a, b, np.array([[LENGTH], [b - a]])) for a, b in pairwise(ends))
        self.length_counts = np.array([[LENGTH], [DOCUMENTS]])

    def gather(self, starts, lengths):
        return np.zeros(int(lengths.sum()), np.uint16)

    def release_pages(self) -> None:
        pass


@pytest.mark.parametrize("weights", [(), (0.2, 0.5, 0.3)])
@pytest.mark.parametrize("packing", [True, False])
def test_any_sequence_of_100_billion_tokens_is_found_at_once_and_in_little_memory(weights, packing):
    shards = LargeShards()
    plan = BatchPlan(8, 1, 1)
    seconds = []
    for epoch, share in ((0, 0.0), (2, 0.9)):
        tracemalloc.start()
        start = time.process_time()
        loader = Loader(
            shards,
            seq_len=2048,
            packing=packing,
            plan=plan,
            seed=1,
            process_index=0,
            device="cpu",
            weights=weights,
        )
        first_sequence = int(loader.sequences_per_epoch * share) // 8 * 8
        steps = loader.steps(epoch, first_sequence)
        step = next(steps)
        steps.close()
        seconds.append(time.process_time() - start)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (step.epoch, step.step_in_epoch, step.num_sequences) == (epoch, first_sequence // 8, 8)
        # One window, and the next one while it is cut.
        assert peak < 300e6
    # About 0.3 s; a machine that is busy with other work takes longer.
    assert min(seconds) < 3
    # Two windows of 64 blocks are some 34,000 documents; each is asked for a few times.
    assert shards.offsets.read < 1_000_000


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="counts open files")
def test_only_files_that_are_read_are_open_and_never_more_than_a_process_may_have(make_shards):
    def open_files() -> int:
        return len(list(Path("/dev/fd").iterdir()))

    documents = 2 * OPEN_SHARDS
    before = open_files()
    shards = make_shards([5] * documents, shard_tokens=5)
    assert open_files() <= before + 1  # that of the offsets
    views = [shards.document(i) for i in range(3)]
    assert open_files() == before + 4
    everything = np.arange(documents)
    assert shards.gather(everything * 5, np.full(documents, 5)).tolist() == list(range(5 * documents))
    # The views keep theirs.
    assert open_files() <= before + 1 + OPEN_SHARDS + len(views)
    shards.release_pages()
    assert [view.tolist() for view in views] == [list(range(i * 5, i * 5 + 5)) for i in range(3)]


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="needs madvise")
def test_pages_that_were_read_are_given_back(make_shards):
    shards, advice = make_shards([50]), []
    shards._maps = [SimpleNamespace(madvise=advice.append)]
    shards.release_pages()
    assert advice == [mmap.MADV_DONTNEED]


def test_weighted_shares_are_exact_at_scale():
    shards = LargeShards()
    weights = (0.2, 0.5, 0.3)
    order = MixedOrder(shards, weights, seq_len=2048, packing=True, seed=1)
    for epoch, share in ((0, 0.5), (30, 0.99)):
        window = next(order.windows(epoch, int(order.num_sequences * share)))
        edges = [part.first_document for part in shards.parts[1:]]
        given = np.bincount(np.searchsorted(edges, window.documents, side="right"), minlength=3)
        assert given / given.sum() == pytest.approx(weights, abs=1e-3)
