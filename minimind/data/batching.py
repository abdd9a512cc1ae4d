"""Build one process's share of each optimizer step as numpy arrays, with counts over all processes.

Shapes: A accumulation steps, B sequences of a micro-batch, W processes, G = A*B*W sequences of a step.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .batch_plan import BatchPlan
from .mixture import MixedOrder
from .packing import PackedSequences, PaddedSequences, Piece, SequenceArrays, WindowSequences
from .sampler import SequenceOrder, Window
from .shards import TokenShards

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class StepCounts:
    """Counts of one optimizer step, over all processes.

    Attributes:
        num_targets: labels other than -100.
        num_tokens: input tokens without padding.
        num_sequences: sequences; fewer than a global batch at the end of an epoch.
        digest: identifies the tokens of the step and their order.
    """

    num_targets: int
    num_tokens: int
    num_sequences: int
    epoch: int
    step_in_epoch: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class StepSequences(StepCounts):
    """One process's A*B sequences of a step, micro-batch after micro-batch; a short step ends in padding."""

    arrays: SequenceArrays


@dataclass(frozen=True)
class StepBuilder:
    """Builds the steps of one process.

    A step is G consecutive sequences of the order. Micro-batch k of process r takes its sequences k*B*W + r*B
    to k*B*W + (r+1)*B, so a step depends neither on the world size nor on the micro-batch size.

    Attributes:
        seq_len: input tokens of a sequence.
        packing: documents end to end in full sequences; otherwise one document per sequence.
    """

    shards: TokenShards
    order: SequenceOrder | MixedOrder
    seq_len: int
    packing: bool
    plan: BatchPlan
    process_index: int
    pad_token_id: int = 0

    def steps(
        self, epoch: int, first_sequence: int = 0, *, epochs: int | None = 1
    ) -> Iterator[StepSequences]:
        """Yield this process's part of each step from `first_sequence` of an epoch on.

        Counts over all processes come from document lengths. Without packing, only the tokens of this
        process's sequences are read. A thread cuts the next window meanwhile, which takes tenths of a second,
        also that of the next epoch.

        Args:
            epochs: epochs to yield, the first one included; None for no end.
        """
        numbers = range(epoch, sys.maxsize if epochs is None else epoch + epochs)
        starts = {epoch: first_sequence}
        windows = (
            (window, self._cut(window).load())
            for number in numbers
            for window in self.order.windows(number, starts.get(number, 0))
        )
        with ThreadPoolExecutor(1, "windows") as executor:
            ahead = _one_ahead(windows, executor)
            for number in numbers:
                yield from self._steps(number, starts.get(number, 0), ahead)

    def _steps(
        self, epoch: int, first_sequence: int, windows: Iterator[tuple[Window, WindowSequences]]
    ) -> Iterator[StepSequences]:
        opened: list[tuple[Window, WindowSequences]] = []
        own = self._own_positions()
        content = self.shards.content
        for start in range(first_sequence, self.order.num_sequences, self.plan.global_batch_size):
            stop = min(start + self.plan.global_batch_size, self.order.num_sequences)
            while not opened or opened[-1][0].end_sequence < stop:
                opened.append(next(windows))
            opened = [pair for pair in opened if pair[0].end_sequence > start]
            arrays = self._blank(len(own))
            num_targets = num_tokens = 0
            # Positions identify the tokens only together with the content of the split.
            digest = hashlib.blake2b(
                np.array([epoch, start], np.int64).tobytes(), digest_size=16, key=bytes.fromhex(content)
            )
            positions = start + own
            for window, sequences in opened:
                first, end = window.first_sequence, window.end_sequence
                in_step = window.order[max(start - first, 0) : stop - first]
                num_targets += int(sequences.targets[in_step].sum())
                num_tokens += int(sequences.inputs[in_step].sum())
                digest.update(sequences.identities[in_step].tobytes())
                here = (positions >= first) & (positions < min(end, stop))
                if here.any():
                    sequences.fill(arrays, here, window.order[positions[here] - first])
            yield StepSequences(
                arrays=arrays,
                num_targets=num_targets,
                num_tokens=num_tokens,
                num_sequences=stop - start,
                epoch=epoch,
                step_in_epoch=start // self.plan.global_batch_size,
                digest=digest.hexdigest(),
            )

    def sample(self, count: int) -> Iterator[SequenceArrays]:
        """Yield this process's part of steps over `count` sequences, spread evenly over epoch 0.

        The sequences depend on `count` alone. Only the windows that hold some of them are read.
        """
        total = self.order.num_sequences
        chosen = (2 * np.arange(count) + 1) * total // (2 * count)
        own = self._own_positions()
        window, sequences = None, None
        for start in range(0, count, self.plan.global_batch_size):
            in_step = chosen[start : start + self.plan.global_batch_size]
            arrays = self._blank(len(own))
            positions = np.full(len(own), -1, np.int64)
            positions[own < len(in_step)] = in_step[own[own < len(in_step)]]
            while (positions >= 0).any():
                next_position = int(positions[positions >= 0].min())
                if window is None or not window.first_sequence <= next_position < window.end_sequence:
                    window = next(self.order.windows(0, next_position))
                    sequences = self._cut(window)
                assert sequences is not None
                here = (positions >= window.first_sequence) & (positions < window.end_sequence)
                sequences.fill(arrays, here, window.order[positions[here] - window.first_sequence])
                positions[here] = -1
            yield arrays

    def pieces(self, epoch: int, first_sequence: int) -> list[tuple[int, list[Piece]]]:
        """Return the documents in each of this process's sequences of the step at `first_sequence`.

        Returns:
            A*B pairs of the sequence's position in the epoch and its pieces; padding has no pieces.
        """
        positions = first_sequence + self._own_positions()
        found: dict[int, list[Piece]] = {}
        for window in self.order.windows(epoch, first_sequence):
            first, end = window.first_sequence, window.end_sequence
            if first >= first_sequence + self.plan.global_batch_size:
                break
            sequences = self._cut(window)
            for position in positions[(positions >= first) & (positions < end)].tolist():
                found[position] = sequences.pieces(int(window.order[position - first]))
        return [(position, found.get(position, [])) for position in positions.tolist()]

    def _blank(self, count: int) -> SequenceArrays:
        return SequenceArrays.blank(count, self.seq_len, packing=self.packing, pad_token_id=self.pad_token_id)

    def _cut(self, window: Window) -> WindowSequences:
        kind = PackedSequences if self.packing else PaddedSequences
        return kind(self.shards, window, self.seq_len, self.pad_token_id)

    def _own_positions(self) -> NDArray[np.int64]:
        """Return (A*B,) the positions in a step that this process takes."""
        plan = self.plan
        shape = (plan.accumulation_steps, plan.num_processes, plan.micro_batch_size)
        return np.arange(plan.global_batch_size).reshape(shape)[:, self.process_index].ravel()


def _one_ahead(items: Iterator[Item], executor: Executor) -> Iterator[Item]:
    """Yield the items of an iterator, each made in the executor while the one before is used."""
    future = executor.submit(next, items, None)
    while (item := future.result()) is not None:
        future = executor.submit(next, items, None)
        yield item
