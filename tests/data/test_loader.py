"""The loader yields steps as tensors, prefetches them, and stops when closed."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from minimind.data.batch_plan import BatchPlan
from minimind.data.batching import StepBuilder
from minimind.data.loader import Loader, evaluation_batches, prefetch


@pytest.fixture(scope="module")
def shards(make_shards):
    return make_shards(np.random.default_rng(0).integers(2, 60, 200).tolist())


def loader_for(shards, plan=None, process=0, device="cpu", packing=True):
    return Loader(
        shards,
        seq_len=16,
        packing=packing,
        plan=plan or BatchPlan(4, 2, 3),
        seed=5,
        process_index=process,
        device=device,
        pad_token_id=0,
    )


@pytest.mark.parametrize("packing", [True, False])
def test_sizes_of_an_epoch_are_what_its_steps_add_up_to(shards, packing):
    loader = loader_for(shards, packing=packing)
    for epoch in range(2):
        steps = list(loader.steps(epoch, 0))
        assert len(steps) == loader.steps_per_epoch
        assert sum(step.num_sequences for step in steps) == loader.sequences_per_epoch
        assert sum(step.num_tokens for step in steps) == loader.tokens_per_epoch
        assert [step.step_in_epoch for step in steps] == list(range(len(steps)))
    if packing:
        assert sum(step.num_targets for step in steps) == shards.num_tokens - shards.num_documents


def test_every_step_has_the_same_shapes_also_the_short_last_one(shards):
    steps = list(loader_for(shards, process=2).steps(0))
    assert steps[-1].num_sequences < 24
    for step in steps:
        assert len(step.micro_batches) == 2
        for batch in step.micro_batches:
            for tensor, dtype in (
                (batch.input_ids, torch.int64),
                (batch.shift_labels, torch.int64),
                (batch.document_ids, torch.int32),
                (batch.position_ids, torch.int32),
            ):
                assert tensor.shape == (4, 16)
                assert tensor.dtype == dtype


def test_padded_sequences_need_no_documents_or_positions(shards):
    batch = next(loader_for(shards, packing=False).steps(0)).micro_batches[0]
    assert batch.document_ids is None
    assert batch.position_ids is None


@pytest.mark.parametrize("width", [8, 3])
def test_trimmed_sequences_lose_only_columns_without_a_target(shards, width, monkeypatch):
    monkeypatch.setattr("minimind.data.loader._TRIM_TO", width)

    def steps(*, trim):
        plan = BatchPlan(2, 2, 3)
        options = {"seq_len": 56, "packing": False, "plan": plan, "seed": 5, "process_index": 1}
        return Loader(shards, device="cpu", trim=trim, **options).steps(0)

    widths = set()
    for whole, trimmed in zip(steps(trim=False), steps(trim=True), strict=True):
        wanted, found = (torch.cat([b.shift_labels for b in step.micro_batches]) for step in (whole, trimmed))
        kept = found.shape[1]
        assert torch.equal(found, wanted[:, :kept])
        assert (wanted[:, kept:] == -100).all()
        inputs = [torch.cat([batch.input_ids for batch in step.micro_batches]) for step in (whole, trimmed)]
        assert torch.equal(inputs[0][:, :kept], inputs[1])
        assert trimmed.num_targets == whole.num_targets
        assert kept == 56 or kept % width == 0
        if kept > width and (found != -100).any():
            assert (found[:, (kept - 1) // width * width :] != -100).any()
        widths.add(kept)
    assert len(widths) > 1


def test_packed_sequences_are_not_trimmed(shards):
    options = {"seq_len": 48, "packing": True, "plan": BatchPlan(2, 2, 3), "seed": 5, "process_index": 2}
    steps = Loader(shards, device="cpu", trim=True, **options).steps(0)
    assert {batch.input_ids.shape for step in steps for batch in step.micro_batches} == {(2, 48)}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("max_sequences", [None, 36, 31])
def test_evaluation_has_equally_many_batches_and_the_same_sequences_on_any_processes(
    shards, packing, max_sequences
):
    def targets(num_processes, batch_size):
        parts = [
            list(
                evaluation_batches(
                    shards,
                    seq_len=16,
                    packing=packing,
                    batch_size=batch_size,
                    process_index=r,
                    num_processes=num_processes,
                    device="cpu",
                    max_sequences=max_sequences,
                )
            )
            for r in range(num_processes)
        ]
        assert len({len(part) for part in parts}) == 1
        labels = torch.cat([batch.shift_labels for step in zip(*parts, strict=True) for batch in step])
        return labels[labels != -100].tolist()

    one = targets(1, 12)
    assert one == targets(3, 4) == targets(2, 6) == targets(2, 5) == targets(1, 1)
    if max_sequences is None:
        assert one == sorted(one)
    if max_sequences is None and packing:
        assert len(one) == shards.num_tokens - shards.num_documents


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("max_batches", [1, 3, 5])
def test_fewer_evaluation_batches_are_a_sample_of_the_whole_split(shards, packing, max_batches):
    """Sequence i of n is the middle one of the i-th n-th of the split, with the tokens of the whole split."""

    def evaluated(limit):
        options = {"seq_len": 16, "packing": packing, "batch_size": 12, "device": "cpu"}
        batches = list(
            evaluation_batches(shards, process_index=0, num_processes=1, max_sequences=limit, **options)
        )
        assert limit is None or 12 * len(batches) == limit
        parts = [[batch.input_ids, batch.shift_labels] for batch in batches]
        if packing:
            parts = [
                [*part, batch.document_ids, batch.position_ids]
                for part, batch in zip(parts, batches, strict=True)
            ]
        return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]

    count = 12 * max_batches
    total = loader_for(shards, packing=packing).sequences_per_epoch
    assert count < total
    middles = [int((i + 0.5) * total / count) for i in range(count)]
    for sampled, whole in zip(evaluated(count), evaluated(None), strict=True):
        assert torch.equal(sampled, whole[middles])


def test_a_sample_crosses_blocks(make_shards):
    """Sequences of a sample are read block by block, and found in each."""
    shards = make_shards([40] * 60, block_tokens=200)
    assert len(shards.blocks) > 5
    options = {"seq_len": 16, "packing": True, "process_index": 0, "num_processes": 1, "device": "cpu"}
    (batch,) = evaluation_batches(shards, batch_size=7, max_sequences=7, **options)
    whole = torch.cat([b.shift_labels for b in evaluation_batches(shards, batch_size=7, **options)])
    assert torch.equal(batch.shift_labels, whole[[(2 * i + 1) * 150 // 14 for i in range(7)]])


def _prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def _window_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("windows")]


def test_an_error_in_the_thread_reaches_the_consumer():
    def items():
        yield 1
        raise ValueError("from the thread")

    ahead = prefetch(items(), 2)
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="from the thread"):
        next(ahead)
    assert not _prefetch_threads()


def test_closing_stops_the_thread_and_it_runs_only_so_far_ahead(shards):
    made = []
    ahead = prefetch((made.append(i) or i for i in range(1000)), 3)
    assert next(ahead) == 0
    time.sleep(0.3)
    assert len(made) <= 3 + 2
    ahead.close()
    steps = loader_for(shards, BatchPlan(1, 1, 1)).steps(0)
    next(steps)
    assert _prefetch_threads()
    steps.close()
    assert not _prefetch_threads()
    assert not _window_threads()


@pytest.mark.parametrize("packing", [True, False])
def test_the_next_window_and_no_further_one_is_cut_meanwhile(make_shards, monkeypatch, packing):
    blocks = make_shards([40] * 400, block_tokens=1000)
    cut, cut_now = [], StepBuilder._cut

    def record(builder, window):
        cut.append((window.first_sequence, threading.current_thread().name))
        return cut_now(builder, window)

    monkeypatch.setattr(StepBuilder, "_cut", record)
    loader = Loader(
        blocks, seq_len=16, packing=packing, plan=BatchPlan(1, 1, 1), seed=0, process_index=0,
        device="cpu", window_blocks=2,
    )  # fmt: skip
    steps = loader._builder.steps(0)
    first = next(steps)
    deadline = time.monotonic() + 5
    while len(cut) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert first.step_in_epoch == 0
    assert len(cut) == 2
    assert all(name.startswith("windows") for _, name in cut)
    assert len(list(steps)) == loader.steps_per_epoch - 1
    assert [position for position, _ in cut] == sorted(position for position, _ in cut)
    assert not _window_threads()


@pytest.mark.parametrize("packing", [True, False])
def test_the_first_window_of_the_next_epoch_is_cut_during_the_last_steps_of_an_epoch(
    shards, monkeypatch, packing
):
    loader = loader_for(shards, packing=packing)
    each = [(step.epoch, step.digest) for epoch in (3, 4, 5) for step in loader.steps(epoch)]
    windows = len(list(loader._builder.order.windows(3)))
    cut, cut_now = [], StepBuilder._cut

    def record(builder, window):
        cut.append(threading.current_thread().name)
        return cut_now(builder, window)

    monkeypatch.setattr(StepBuilder, "_cut", record)
    steps = loader._builder.steps(3, 24, epochs=None)
    seen = []
    for step in steps:
        seen.append((step.epoch, step.digest))
        if step.step_in_epoch == loader.steps_per_epoch - 1:
            deadline = time.monotonic() + 5
            while len(cut) <= windows * (step.epoch - 2) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert len(cut) == windows * (step.epoch - 2) + 1
        if len(seen) == len(each) - 1:
            steps.close()
    assert seen == each[1:]
    assert all(name.startswith("windows") for name in cut)
    assert not _window_threads()
    assert [(step.epoch, step.digest) for step in loader.steps(3, 24, epochs=3)] == seen


def test_an_error_while_a_window_is_cut_reaches_the_consumer(shards, monkeypatch):
    def fails(builder, window):
        raise OSError("a shard is gone")

    monkeypatch.setattr(StepBuilder, "_cut", fails)
    with pytest.raises(OSError, match="a shard is gone"):
        next(loader_for(shards).steps(0))
    assert not _window_threads()


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("process", [0, 2])
def test_the_pieces_of_a_step_spell_its_sequences(shards, packing, process):
    loader = loader_for(shards, process=process, packing=packing)
    pieces_seen = rows_of_padding = 0
    for step in loader.steps(1):
        sequences = [(batch, i) for batch in step.micro_batches for i in range(4)]
        for (number, pieces), (batch, i) in zip(
            loader.pieces(1, 24 * step.step_in_epoch), sequences, strict=True
        ):
            assert 24 * step.step_in_epoch <= number < 24 * (step.step_in_epoch + 1)
            spelled = [token for piece in pieces for token in loader.tokens(piece)[: piece.length]]
            assert batch.input_ids[i, : len(spelled)].tolist() == spelled
            # The stream's last token is no input, though it stands there: nothing is to be predicted from it.
            assert (batch.shift_labels[i, len(spelled) :] == -100).all()
            if packing:
                ids = [k for k, piece in enumerate(pieces) for _ in range(piece.length)]
                assert batch.document_ids[i, : len(ids)].tolist() == ids
            for piece in pieces:
                document = shards.document(piece.document)[piece.start :]
                assert loader.tokens(piece) == document[: piece.length + 1].tolist()
            pieces_seen += len(pieces)
            rows_of_padding += not pieces
    assert pieces_seen > 50
    assert rows_of_padding > 0 or process == 0


def test_the_pieces_of_all_processes_are_every_input_of_an_epoch_once(shards):
    seen = []
    for process in range(3):
        loader = loader_for(shards, process=process)
        for first_sequence in range(0, loader.sequences_per_epoch, 24):
            for _, pieces in loader.pieces(0, first_sequence):
                seen += [(p.document, p.start + k) for p in pieces for k in range(p.length)]
    assert len(seen) == len(set(seen)) == shards.num_tokens - 1
