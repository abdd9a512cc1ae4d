"""Entries with weights: shares are met, nothing repeats within an epoch, any position is found."""

from __future__ import annotations

from collections import Counter
from itertools import groupby, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.data.batch_plan import BatchPlan
from minimind.data.batching import StepBuilder
from minimind.data.loader import Loader
from minimind.data.mixture import MixedOrder, source_epochs

PAD = 999_999
ONE_PROCESS = BatchPlan(4, 1, 1)
quick = settings(max_examples=50)
# The documents of each entry, by their lengths.
entries = st.lists(
    st.lists(st.integers(2, 40), min_size=1, max_size=25).filter(lambda n: sum(n) > 3), min_size=1, max_size=3
)
packings = st.booleans()


def make(make_shards, lengths, **values):
    parts = [part for part, documents in enumerate(lengths) for _ in documents]
    return make_shards([n for documents in lengths for n in documents], parts=parts, **values)


def weights_for(lengths, seed):
    weights = np.random.default_rng(seed).uniform(0.05, 1, len(lengths))
    return tuple((weights / weights.sum()).tolist())


def order_of(shards, weights, *, seq_len, packing, seed=7):
    return MixedOrder(shards, weights, seq_len=seq_len, packing=packing, seed=seed, window_tokens=100)


def steps_of(shards, weights, *, seq_len, packing, plan, process=0, epoch=0, sequence=0, seed=7):
    return list(
        StepBuilder(
            shards,
            order_of(shards, weights, seq_len=seq_len, packing=packing, seed=seed),
            seq_len=seq_len,
            packing=packing,
            plan=plan,
            process_index=process,
            pad_token_id=PAD,
        ).steps(epoch, sequence)
    )


def sequences_of(shards, weights, *, plan=ONE_PROCESS, **where):
    """The sequences of an epoch in order, put together from all processes: (inputs, labels) each."""
    sequences = []
    parts = [steps_of(shards, weights, plan=plan, process=r, **where) for r in range(plan.num_processes)]
    for step in zip(*parts, strict=True):
        assert len({(p.digest, p.num_targets, p.num_tokens, p.num_sequences) for p in step}) == 1
        b = plan.micro_batch_size
        together = [
            sequence
            for k in range(plan.accumulation_steps)
            for part in step
            for sequence in zip(*(a[k * b : (k + 1) * b].tolist() for a in part.arrays.wide), strict=True)
        ]
        sequences += together[: step[0].num_sequences]
    return sequences


@quick
@given(entries, st.integers(2, 20), packings, st.integers(0, 99))
def test_no_document_comes_again_before_its_entry_was_read_whole(
    make_shards, lengths, seq_len, packing, seed
):
    """Over several epochs, each document of an entry is met as often as any other, give or take a few."""
    epochs = 4
    shards = make(make_shards, lengths)
    weights = weights_for(lengths, seed)
    where = {"seq_len": seq_len, "packing": packing}
    met = Counter(
        token
        for epoch in range(epochs)
        for inputs, _ in sequences_of(shards, weights, epoch=epoch, **where)
        for token in inputs
        if token != PAD
    )
    for part in shards.parts:
        firsts = shards.offsets[part.first_document : part.end_document]
        counts = [met[first] for first in firsts.tolist()]
        # One for the epoch under way, one where the sequences of the last epoch end within a window, whose
        # documents are permuted; and the last token of each epoch, maybe always the same, is a target only.
        apart = 2 + epochs
        assert max(counts) - min(counts) <= apart
        if packing:
            # So it is for the tokens within the documents.
            last = shards.offsets[part.end_document]
            own = {met[token] for token in range(int(firsts[0]), int(last))}
            assert max(own) - min(own) <= apart


@quick
@given(entries, packings, st.integers(0, 99), st.integers(0, 40))
def test_a_stream_reads_each_epoch_whole_and_once(make_shards, lengths, packing, seed, cuts):
    shards = make(make_shards, lengths)
    order = order_of(shards, weights_for(lengths, seed), seq_len=8, packing=packing, seed=seed)
    for part, stream in zip(shards.parts, order._streams, strict=True):
        own = list(range(part.first_document, part.end_document))
        places = np.linspace(0, 3 * stream.size, cuts + 2).astype(int).tolist()
        pieces = [stream.documents(a, b).tolist() for a, b in pairwise(places)]
        read = [document for piece in pieces for document in piece]
        assert [sorted(read[i : i + len(own)]) for i in range(0, len(read), len(own))] == [own] * 3
        for piece, (a, b) in zip(pieces, pairwise(places), strict=True):
            size = int(shards.lengths[np.array(piece, int)].sum())
            assert stream.cut(b) - stream.cut(a) == (size if packing else len(piece))


@quick
@given(entries, st.integers(2, 20), st.integers(0, 99))
def test_shares_are_met_in_every_epoch_to_within_a_few_documents(make_shards, lengths, seq_len, seed):
    shards = make(make_shards, lengths)
    weights = weights_for(lengths, seed)
    owner = np.repeat(np.arange(len(lengths)), [sum(n) for n in lengths])
    # A window may begin a document late in each entry, and sequences are permuted at both ends of the epoch.
    slack = 2 * sum(max(n) for n in lengths) + 2 * seq_len + 100
    sequences = 0
    tokens = np.zeros(len(lengths))
    for epoch in range(3):
        inputs = [
            sequence[0]
            for sequence in sequences_of(shards, weights, seq_len=seq_len, packing=True, epoch=epoch)
        ]
        sequences += len(inputs)
        assert sequences == (epoch + 1) * -(-(shards.num_tokens - 1) // seq_len)
        tokens += np.bincount(owner[np.concatenate(inputs)], minlength=len(lengths))
        assert tokens.sum() == sequences * seq_len
        assert np.abs(tokens - np.array(weights) * sequences * seq_len).max() <= slack


def test_shares_are_met_within_each_window_of_a_larger_corpus(make_shards):
    rng = np.random.default_rng(0)
    lengths = [rng.integers(2, 200, 3000).tolist(), rng.integers(20, 100, 400).tolist()]
    shards = make(make_shards, lengths)
    order = MixedOrder(shards, (0.25, 0.75), seq_len=32, packing=True, seed=1, window_tokens=20_000)
    split = shards.parts[1].first_document
    met = np.zeros(2, int)
    windows = list(order.windows(0))
    assert len(windows) >= 16
    for window in windows[:-1]:
        sizes = shards.offsets[window.documents + 1] - shards.offsets[window.documents]
        second = window.documents >= split
        met += (int(sizes[~second].sum()), int(sizes[second].sum()))
        # At its ends a window has documents in part: the next one has them too.
        assert sizes[second].sum() / sizes.sum() == pytest.approx(0.75, abs=0.03)
    passes = source_epochs(shards.parts, (0.25, 0.75), seq_len=32, packing=True)
    assert passes[1] == pytest.approx(0.75 * shards.num_tokens / shards.parts[1].num_tokens, rel=1e-3)
    assert passes[1] > 5


def test_padded_sequences_meet_the_shares_by_the_mean_of_an_entry(make_shards):
    rng = np.random.default_rng(0)
    lengths = [rng.integers(2, 60, 2000).tolist(), rng.integers(20, 30, 1000).tolist()]
    shards = make(make_shards, lengths)
    steps = Loader(
        shards,
        seq_len=32,
        packing=False,
        plan=BatchPlan(16, 1, 1),
        seed=3,
        process_index=0,
        device="cpu",
        pad_token_id=PAD,
        weights=(0.6, 0.4),
    )
    tokens = np.zeros(2)
    for step in steps.steps(0):
        inputs = step.micro_batches[0].input_ids.numpy()
        real = inputs[inputs != PAD]
        tokens += np.bincount((real >= shards.offsets[2000]).astype(int), minlength=2)
    assert tokens.sum() == pytest.approx(steps.tokens_per_epoch, rel=0.02)
    assert tokens[0] / tokens.sum() == pytest.approx(0.6, abs=0.01)


@quick
@given(
    entries,
    st.integers(2, 20),
    packings,
    st.sampled_from([(6, 1, 1), (2, 3, 1), (1, 2, 3), (3, 1, 2)]),
    st.integers(0, 3),
)
def test_steps_do_not_depend_on_processes_or_micro_batches(
    make_shards, lengths, seq_len, packing, shape, epoch
):
    shards = make(make_shards, lengths)
    weights = weights_for(lengths, epoch)
    where = {"seq_len": seq_len, "packing": packing, "epoch": epoch}
    one = sequences_of(shards, weights, plan=BatchPlan(1, 6, 1), **where)
    assert sequences_of(shards, weights, plan=BatchPlan(*shape), **where) == one


@quick
@given(entries, st.integers(2, 20), packings, st.integers(0, 5), st.data())
def test_starting_at_any_sequence_gives_the_tail_of_the_epoch(
    make_shards, lengths, seq_len, packing, epoch, data
):
    shards = make(make_shards, lengths)
    weights = weights_for(lengths, epoch)
    where = {"seq_len": seq_len, "packing": packing, "epoch": epoch}
    whole = sequences_of(shards, weights, **where)
    sequence = data.draw(st.integers(0, len(whole) - 1))
    assert sequences_of(shards, weights, sequence=sequence, **where) == whole[sequence:]
    digests = [step.digest for step in steps_of(shards, weights, plan=BatchPlan(2, 1, 1), **where)]
    later = steps_of(shards, weights, plan=BatchPlan(2, 1, 1), sequence=len(whole) // 2 // 2 * 2, **where)
    assert [step.digest for step in later] == digests[len(whole) // 2 // 2 :]


@quick
@given(entries, st.integers(2, 20), st.integers(0, 99))
def test_packed_sequences_are_full_and_labels_follow_their_inputs(make_shards, lengths, seq_len, seed):
    shards = make(make_shards, lengths)
    firsts = set(shards.offsets[:-1].tolist())
    for inputs, labels in sequences_of(
        shards, weights_for(lengths, seed), seq_len=seq_len, packing=True, epoch=seed % 4
    ):
        assert PAD not in inputs
        for token, label, following in zip(inputs, labels, [*inputs[1:], None], strict=True):
            assert label in (-100, token + 1)
            if following is not None:
                assert (label == -100) == (following in firsts)
                assert label in (-100, following)


@pytest.mark.parametrize("packing", [True, False])
def test_epochs_and_seeds_have_different_orders(make_shards, packing):
    lengths = [np.random.default_rng(i).integers(2, 60, 200).tolist() for i in range(2)]
    shards = make(make_shards, lengths)
    orders = [
        sequences_of(shards, (0.5, 0.5), seq_len=16, packing=packing, epoch=epoch, seed=seed)
        for epoch, seed in ((0, 7), (1, 7), (0, 8))
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    # Whether an entry is many blocks, or one.
    for block_tokens in (32, 1 << 18):
        blocks = make(make_shards, lengths, block_tokens=block_tokens)
        stream = order_of(blocks, (0.5, 0.5), seq_len=16, packing=packing)._streams[0]
        passes = [stream.documents(i * stream.size, (i + 1) * stream.size).tolist() for i in range(2)]
        assert passes[0] != passes[1] != sorted(passes[1])
    # Documents of both entries share sequences: they are mixed within a window, not laid one after the other.
    if packing:
        owner = [int(np.array(sequence[0][:1])[0] >= shards.parts[0].num_tokens) for sequence in orders[0]]
        assert max(len(list(run)) for _, run in groupby(owner)) < 40
