"""One process's share of each optimizer step, as numpy arrays, with what all processes must agree on.

A accumulation steps, B rows of a micro-batch, W processes; G = A*B*W rows of a step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .batch_plan import BatchPlan
from .mixture import MixedOrder
from .packing import PackedSequences, PaddedSequences, Piece, Rows, WindowSequences
from .sampler import SequenceOrder, Window
from .shards import TokenShards


@dataclass(frozen=True)
class StepSequences:
    """The rows of one process in one step.

    Attributes:
        rows: A*B rows, micro-batch after micro-batch; the missing ones of a short step are padding.
        num_targets: targets in the whole step, over all processes.
        num_tokens: real input tokens in the whole step.
        num_sequences: sequences in the whole step.
        epoch: the pass.
        step_in_epoch: the step within the pass.
        digest: tells the rows of the step and their order from any other.
    """

    rows: Rows
    num_targets: int
    num_tokens: int
    num_sequences: int
    epoch: int
    step_in_epoch: int
    digest: str


@dataclass(frozen=True)
class _OpenWindow:
    window: Window
    rows: WindowSequences


def step_rows(
    shards: TokenShards,
    order: SequenceOrder | MixedOrder,
    *,
    seq_len: int,
    packing: bool,
    plan: BatchPlan,
    process_index: int,
    pad_token_id: int,
    epoch: int,
    row: int,
) -> Iterator[StepSequences]:
    """Yield this process's part of every step from `row` to the end of the pass.

    A step is G rows that follow one another in the order, and micro-batch k of process r is rows
    k*B*W + r*B to k*B*W + (r+1)*B of it, so that the rows of a step depend neither on the number of processes
    nor on the size of a micro-batch. What all processes must agree on is counted from the lengths of
    documents; tokens are read for this process's rows alone where a row is one document.
    """
    kind = PackedSequences if packing else PaddedSequences
    windows = order.windows(epoch, row)
    opened: list[_OpenWindow] = []
    size = plan.global_batch_size
    own = _own_places(plan, process_index)
    for start in range(row, order.num_sequences, size):
        stop = min(start + size, order.num_sequences)
        while not opened or opened[-1].window.end_row < stop:
            window = next(windows)
            opened.append(_OpenWindow(window, kind(shards, window, seq_len, pad_token_id)))
        opened = [one for one in opened if one.window.end_row > start]
        rows = Rows.blank(len(own), seq_len, packing=packing, pad_token_id=pad_token_id)
        num_targets = num_tokens = 0
        digest = hashlib.blake2b(np.array([epoch, start], np.int64).tobytes(), digest_size=16)
        for one in opened:
            first, end = one.window.first_row, one.window.end_row
            cut = one.window.order[max(start - first, 0) : stop - first]
            num_targets += int(one.rows.targets[cut].sum())
            num_tokens += int(one.rows.inputs[cut].sum())
            digest.update(one.rows.identities[cut].tobytes())
            places = start + own
            here = (places >= first) & (places < min(end, stop))
            if here.any():
                one.rows.fill(rows, here, one.window.order[places[here] - first])
        yield StepSequences(
            rows, num_targets, num_tokens, stop - start, epoch, start // size, digest.hexdigest()
        )


def step_pieces(
    shards: TokenShards,
    order: SequenceOrder | MixedOrder,
    *,
    seq_len: int,
    packing: bool,
    plan: BatchPlan,
    process_index: int,
    epoch: int,
    row: int,
) -> list[tuple[int, list[Piece]]]:
    """Return what each of this process's rows of the step at `row` is made of, as `step_rows` lays them.

    Returns:
        A*B pairs of the row's number in the pass and its pieces, none for a row of padding.
    """
    kind = PackedSequences if packing else PaddedSequences
    places = row + _own_places(plan, process_index)
    found: dict[int, list[Piece]] = {}
    for window in order.windows(epoch, row):
        if window.first_row >= row + plan.global_batch_size:
            break
        rows = kind(shards, window, seq_len, 0)
        for place in places[(places >= window.first_row) & (places < window.end_row)].tolist():
            found[place] = rows.pieces(int(window.order[place - window.first_row]))
    return [(place, found.get(place, [])) for place in places.tolist()]


def _own_places(plan: BatchPlan, process_index: int) -> NDArray[np.int64]:
    """Return (A*B,) which rows of a step this process takes."""
    shape = (plan.accumulation_steps, plan.num_processes, plan.micro_batch_size)
    return np.arange(plan.global_batch_size).reshape(shape)[:, process_index].reshape(-1)
