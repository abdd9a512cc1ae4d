"""Decoding steps without input from the host, on CUDA GPUs captured as a CUDA graph.

Shapes: B batch, V vocabulary.
"""

from __future__ import annotations

import gc
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor

from ..modeling.kv_cache import KVCache
from .sampling import Sampling, choose

# Steps between two copies of tokens to the host, by the type of the device. One block is computed while the
# host reads the one before, so on a GPU up to two blocks are computed beyond the last token.
_BLOCK = {"cuda": 8}
# Graphs that are kept for batches of the same shape, one for each sampling.
_MOST_GRAPHS = 8

# Appends (B,) tokens at a slot, (1,) int64, of a cache with (B,) int64 padding slots before each sequence;
# returns (B, V) float32 logits.
FixedStep = Callable[[Tensor, Tensor, Tensor, KVCache], Tensor]
# See `sample`.
Sample = Callable[[Tensor, Sampling, "DecodeState"], None]


class DecodeState:
    """What decoding needs beside the weights, in memory that does not move; S slots.

    Attributes:
        cache: of all layers.
        slot: (1,) int64, where the next token is stored.
        padding: (B,) int64, padding slots of each sequence.
        number: (B,) int64, number of tokens chosen so far, the same for each sequence.
        tokens: (B,) int64, last chosen.
        history: (S, B) int64, chosen tokens.
        uniform: (S, B) float32, uniform random numbers.
        seen: (B, V) bool, tokens that occurred; for a repetition penalty.
    """

    def __init__(self, cache: KVCache, vocab_size: int) -> None:
        batch_size, device = len(cache.layers[0].keys), cache.layers[0].keys.device
        integers = partial(torch.zeros, dtype=torch.int64, device=device)
        self.cache, self.device = cache, device
        self.slot, self.padding, self.number = integers(1), integers(batch_size), integers(batch_size)
        self.tokens, self.history = integers(batch_size), integers(cache.capacity, batch_size)
        self.uniform = torch.zeros(cache.capacity, batch_size, device=device)
        self.seen = torch.zeros(batch_size, vocab_size, dtype=torch.bool, device=device)


def sample(logits: Tensor, sampling: Sampling, state: DecodeState) -> None:
    """Choose the next tokens from (B, V) logits and record them; the next step is at the next slot."""
    number = state.number[:1]
    chosen = choose(logits, sampling, state.seen, state.uniform.index_select(0, number)[0])
    state.tokens.copy_(chosen)
    state.history.index_copy_(0, number, chosen[None])
    if sampling.repetition_penalty != 1:
        state.seen.scatter_(1, chosen[:, None], True)
    state.number.add_(1)
    state.slot.add_(1)


class DecodeGraph:
    """Decodes one batch at a time: each step appends a token to each sequence and samples the next.

    All that a step needs is in device memory, so the host enqueues steps ahead and reads the tokens in
    blocks: the device does not wait for the host.
    """

    def __init__(self, step: FixedStep, state: DecodeState, sample: Sample = sample) -> None:
        """Capture nothing yet.

        Args:
            step: appends tokens.
            state: changed by each step.
            sample: chooses tokens.
        """
        self.state = state
        self._step, self._sample = step, sample
        on_gpu = state.device.type == "cuda"
        self._on_host = torch.zeros(state.history.shape, dtype=torch.int64, pin_memory=on_gpu)
        # None where a step could not be captured.
        self._graphs: dict[Sampling, torch.cuda.CUDAGraph | None] = {}

    @property
    def captured(self) -> bool:
        """Whether steps run as CUDA graphs."""
        return bool(self._graphs) and None not in self._graphs.values()

    def fits(self, batch_size: int, capacity: int, *, larger: bool) -> bool:
        """Whether the state is for such batches; `larger`: or for a larger capacity."""
        slots, sequences = self.state.history.shape
        return sequences == batch_size and (slots == capacity or (larger and slots > capacity))

    def prepare(self, sampling: Sampling) -> None:
        """On CUDA, capture a step with its sampling, once; if that fails, warn and run steps eagerly.

        Changes the state: call it before the cache is filled.
        """
        if self.state.device.type != "cuda" or sampling in self._graphs:
            return
        self._graphs[sampling] = self._capture(sampling)
        if len(self._graphs) > _MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]

    def run(
        self,
        logits: Tensor,
        sampling: Sampling,
        length: int,
        padding: Sequence[int],
        uniform: Tensor,
        seen: Tensor | None,
    ) -> Iterator[list[int]]:
        """Yield the next token of each sequence, as many times as there are random numbers.

        Args:
            logits: (B, V) float32, of the first token.
            sampling: sampling parameters that are prepared.
            length: slots of the cache that the prompts use.
            padding: number of padding slots of each prompt.
            uniform: (steps, B) uniform random numbers, on any device.
            seen: (B, V) bool, tokens of the prompts; for a repetition penalty.
        """
        count, state = len(uniform), self.state
        # Sampling moves it to the next slot.
        state.slot.fill_(length - 1)
        state.number.zero_()
        state.padding.copy_(torch.tensor(padding))
        state.uniform[:count].copy_(uniform)
        if seen is not None:
            state.seen.copy_(seen)
        self._sample(logits, sampling, state)
        size = _BLOCK.get(self.state.device.type, 1)
        ahead = 2 if size > 1 else 1
        blocks = deque([self._copy(0, 1)])
        enqueued = 1
        while blocks or enqueued < count:
            while enqueued < count and len(blocks) < ahead:
                start, enqueued = enqueued, min(enqueued + size, count)
                for _ in range(start, enqueued):
                    self._advance(sampling)
                blocks.append(self._copy(start, enqueued))
            start, end, done = blocks.popleft()
            if done is not None:
                done.synchronize()
            yield from self._on_host[start:end].tolist()

    def _advance(self, sampling: Sampling) -> None:
        graph = self._graphs.get(sampling)
        if graph is None:
            self._append_and_sample(sampling)
        else:
            graph.replay()

    def _append_and_sample(self, sampling: Sampling) -> None:
        state = self.state
        logits = self._step(state.tokens, state.slot, state.padding, state.cache)
        self._sample(logits, sampling, state)

    def _copy(self, start: int, end: int) -> tuple[int, int, torch.cuda.Event | None]:
        """Start to copy the tokens of some steps to the host."""
        self._on_host[start:end].copy_(self.state.history[start:end], non_blocking=True)
        if self.state.device.type != "cuda":
            return start, end, None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.state.device))
        return start, end, event

    def _capture(self, sampling: Sampling) -> torch.cuda.CUDAGraph | None:
        device = self.state.device
        graph, stream, before = torch.cuda.CUDAGraph(), _stream(device), torch.cuda.current_stream(device)
        # Wherever the last batch ended, the warm-up needs a slot within the cache and after the padding.
        for tensor in (self.state.slot, self.state.number, self.state.padding):
            tensor.zero_()
        with torch.cuda.device(device), _without_gc():
            stream.wait_stream(before)
            # Compiles kernels and initializes libraries, which a capture must not.
            with torch.cuda.stream(stream):
                self._append_and_sample(sampling)
            before.wait_stream(stream)
            try:
                # Other threads may use the device meanwhile.
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    self._append_and_sample(sampling)
            except RuntimeError as error:
                torch.cuda.synchronize()
                warnings.warn(f"decoding steps are not a CUDA graph, thus slower: {error}", stacklevel=2)
                return None
            finally:
                # After a failure the stream of the capture would remain the current one.
                torch.cuda.set_stream(before)
        return graph


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of captures, one for all: cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream(device)


@contextmanager
def _without_gc() -> Iterator[None]:
    """Disable the garbage collector, which might free a graph or an event during a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
