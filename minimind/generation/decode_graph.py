"""Decoding steps without input from the host, on CUDA GPUs captured as a CUDA graph.

Shapes: B batch, V vocabulary.
"""

from __future__ import annotations

import gc
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..modeling.kv_cache import KVCache
from .sampling import Sampling, choose

# Steps between two copies of tokens to the host, by the type of the device. One block is computed while the
# host reads the one before, so on a GPU up to two blocks are computed beyond the last token.
_BLOCK = {"cuda": 8}

# Appends (B,) tokens at a slot, (1,) int64, of a cache with (B,) int64 padding slots before each sequence;
# returns (B, V) float32 logits.
FixedStep = Callable[[Tensor, Tensor, Tensor, KVCache], Tensor]


class DecodeGraph:
    """Decodes one batch at a time: each step samples the next token and appends it.

    Slot, tokens, random numbers and the tokens so far are in device memory, so the host enqueues steps ahead
    and reads the tokens in blocks: the device does not wait for the host.

    Attributes:
        cache: filled by the caller with the prompts, before `run`.
    """

    def __init__(self, step: FixedStep, cache: KVCache, sampling: Sampling, vocab_size: int) -> None:
        """Allocate, and on CUDA capture the step; where that fails, steps run eagerly, with a warning."""
        keys = cache.layers[0].keys
        self.cache, self._sampling = cache, sampling
        self._step, self._device = step, keys.device
        batch_size, device = len(keys), keys.device
        shape = cache.capacity, batch_size
        self._slot = torch.zeros(1, dtype=torch.int64, device=device)
        self._number = torch.zeros(1, dtype=torch.int64, device=device)
        self._padding = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._uniform = torch.zeros(shape, device=device)
        self._history = torch.zeros(shape, dtype=torch.int64, device=device)
        self._on_host = torch.zeros(shape, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros(batch_size, vocab_size, dtype=torch.bool, device=device)
        self._graph = self._capture() if device.type == "cuda" else None

    @property
    def captured(self) -> bool:
        """Whether steps run as a CUDA graph."""
        return self._graph is not None

    def fits(self, batch_size: int, capacity: int, sampling: Sampling) -> bool:
        """Whether this graph is for such batches."""
        return (self.cache.capacity, len(self._tokens), self._sampling) == (capacity, batch_size, sampling)

    def run(
        self, logits: Tensor, length: int, padding: Sequence[int], uniform: Tensor, seen: Tensor | None
    ) -> Iterator[list[int]]:
        """Yield the next token of each sequence, as many times as there are random numbers.

        Args:
            logits: (B, V) float32, of the first token.
            length: slots of the cache that the prompts use.
            padding: number of padding slots of each prompt.
            uniform: (steps, B) uniform random numbers, on any device.
            seen: (B, V) bool, tokens of the prompts; for a repetition penalty.
        """
        count = len(uniform)
        self._slot.fill_(length)
        self._number.zero_()
        self._padding.copy_(torch.tensor(padding))
        self._uniform[:count].copy_(uniform)
        if self._seen is not None and seen is not None:
            self._seen.copy_(seen)
        self._sample(logits)
        size = _BLOCK.get(self._device.type, 1)
        ahead = 2 if size > 1 else 1
        blocks = deque([self._copy(0, 1)])
        enqueued = 1
        while blocks or enqueued < count:
            while enqueued < count and len(blocks) < ahead:
                start, enqueued = enqueued, min(enqueued + size, count)
                for _ in range(start, enqueued):
                    self._advance()
                blocks.append(self._copy(start, enqueued))
            start, end, done = blocks.popleft()
            if done is not None:
                done.synchronize()
            yield from self._on_host[start:end].tolist()

    def _sample(self, logits: Tensor) -> None:
        """Choose the next tokens and record them."""
        uniform = self._uniform.index_select(0, self._number)[0]
        chosen = choose(logits, self._sampling, self._seen, uniform)
        self._tokens.copy_(chosen)
        self._history.index_copy_(0, self._number, chosen[None])
        if self._seen is not None:
            self._seen.scatter_(1, chosen[:, None], True)
        self._number.add_(1)

    def _append_and_sample(self) -> None:
        logits = self._step(self._tokens, self._slot, self._padding, self.cache)
        self._slot.add_(1)
        self._sample(logits)

    def _advance(self) -> None:
        if self._graph is None:
            self._append_and_sample()
        else:
            self._graph.replay()

    def _copy(self, start: int, end: int) -> tuple[int, int, torch.cuda.Event | None]:
        """Start to copy the tokens of some steps to the host."""
        self._on_host[start:end].copy_(self._history[start:end], non_blocking=True)
        if self._device.type != "cuda":
            return start, end, None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return start, end, event

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self._device)
        before = torch.cuda.current_stream(self._device)
        with torch.cuda.device(self._device):
            stream.wait_stream(before)
            # Compiles kernels and initializes libraries, which a capture must not.
            with torch.cuda.stream(stream):
                self._append_and_sample()
            before.wait_stream(stream)
            gc.collect()
            try:
                # Other threads may use the device meanwhile.
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    self._append_and_sample()
            except RuntimeError as error:
                torch.cuda.synchronize()
                warnings.warn(f"decoding steps are not a CUDA graph, thus slower: {error}", stacklevel=2)
                return None
            finally:
                # After a failure the stream of the capture would remain the current one.
                torch.cuda.set_stream(before)
        return graph
