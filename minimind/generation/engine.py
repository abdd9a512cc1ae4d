"""Inference engine with fused weights and a KV cache; computes logits of the last position only.

Shapes: B batch, T new tokens, S tokens or slots of the cache, C hidden, H heads, K kv heads, D head dim,
V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modeling.config import MiniMindConfig
from ..modeling.feed_forward import SwiGLU
from ..modeling.kv_cache import KVCache
from ..modeling.rope import Rotary
from ..modeling.transformer import MiniMindBlock, MiniMindForCausalLM
from .decode_graph import DecodeGraph, DecodeState, FixedStep, sample
from .fused_step import FusedStep, LayerWeights, supported
from .packed_linear import ConcatLinear, pack_weights
from .sampling import Sampling

# A step of fixed shapes is captured or compiled for one capacity, so it is rounded up to a multiple of this.
_FIXED_SLOTS = 256

# Appends new keys and values, (B, K, T, D) each, and returns those of all tokens, (B, K, S, D).
_UpdateCache = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

FuseLinears = Callable[[Sequence[nn.Linear]], Callable[[Tensor], Tensor]]


@dataclass
class DecodeBatch:
    """A batch of sequences during decoding, padded on the left to one length.

    Attributes:
        length: slots used so far.
        padding: (B,) int64, padding slots of each sequence, None without padding.
        visible: (B, 1, 1, capacity) bool, False for padding; None without padding.
    """

    cache: KVCache
    length: int
    padding: Tensor | None
    visible: Tensor | None


class Decoder(Protocol):
    """What generation needs of a model: an `InferenceEngine`, or a model of transformers."""

    @property
    def config(self) -> MiniMindConfig:
        """Configuration of the model."""

    @property
    def device(self) -> torch.device:
        """Device of the weights."""

    def begin(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[Any, Tensor]:
        """Return a batch, and (B, V) logits of the next tokens; see `InferenceEngine.begin`."""

    def step(self, batch: Any, tokens: Tensor) -> Tensor:
        """Append a token to each sequence of the batch; see `InferenceEngine.step`."""


class InferenceEngine:
    """Decodes one token at a time, without dropout.

    On CUDA the decoding step and the sampling are captured as a CUDA graph, which takes some tenths of a
    second. It is kept for later batches of the same size and sampling, up to a capacity of the same multiple
    of 256 tokens. Where Triton is installed the step consists of fused kernels (see `fused_step`).

    On the CPU the weights are copied at construction (see `packed_linear.pack_weights`). With a CUDA graph or
    compiled code those of queries, keys and values, and of gate and up, are copied too, so that each is one
    product: about half of the model. Elsewhere they are shared with the model.

    Args:
        model: on any device, in any precision.
        compiled: compile the decoding step with torch.compile instead of using the fused kernels. The first
            tokens wait for the compilation.
        capture: use a CUDA graph; False for few tokens.
    """

    def __init__(self, model: MiniMindForCausalLM, *, compiled: bool = False, capture: bool = True) -> None:
        self.config = model.config
        self.model = model
        self._embedding = model.get_input_embeddings()
        self._eps = torch.tensor(model.config.rms_norm_eps, device=self._embedding.weight.device)
        fixed = compiled or (capture and self.device.type == "cuda")
        fuse: FuseLinears = ConcatLinear if fixed else pack_weights
        layers = cast(Sequence[MiniMindBlock], model.model.layers)
        self._blocks = [_Block(layer, model.config, self._eps, fuse) for layer in layers]
        self._head = fuse([model.get_output_embeddings()])
        # None where shapes depend on the number of tokens.
        self._fixed_step: FixedStep | None = None
        if compiled:
            self._fixed_step = torch.compile(self.fixed_step, fullgraph=True, dynamic=False)
        elif fixed:
            fused = supported(self.device, self.config.head_dim)
            self._fixed_step = self.fused_step() if fused else self.fixed_step
        # Of the last batch, for the next one.
        self._idle: DecodeGraph | None = None

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self._embedding.weight.device

    @torch.inference_mode()
    def begin(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[DecodeBatch, Tensor]:
        """Prefill the cache with prompts.

        Args:
            prompts: token ids, at least one each.
            capacity: maximum length in tokens of prompt and continuation.

        Returns:
            The batch, and (B, V) float32 logits of the next tokens.
        """
        return self._prefill(prompts, self._new_cache(len(prompts), capacity))

    @torch.inference_mode()
    def step(self, batch: DecodeBatch, tokens: Tensor) -> Tensor:
        """Append one token to each sequence, (B,) int64; return (B, V) float32 logits of the next tokens."""
        return self._extend(batch, tokens[:, None])

    @property
    def has_fixed_step(self) -> bool:
        """Whether `decode` is faster than `begin` and `step`: on CUDA, or compiled."""
        return self._fixed_step is not None

    @torch.inference_mode()
    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        capacity: int,
        sampling: Sampling,
        uniform: Tensor,
        seen: Tensor | None,
    ) -> Iterator[list[int]]:
        """Yield the next token of each sequence with a step of fixed shapes; see `DecodeGraph`.

        On CUDA some tokens are decoded ahead of those that are yielded.

        Args:
            prompts: token ids, at least one each.
            capacity: maximum length in tokens of prompt and continuation.
            sampling: sampling parameters.
            uniform: (steps, B) uniform random numbers.
            seen: (B, V) bool, tokens of the prompts; for a repetition penalty.
        """
        graph = self._decode_graph(len(prompts), capacity, sampling)
        try:
            batch, logits = self._prefill(prompts, graph.state.cache)
            padding = [batch.length - len(prompt) for prompt in prompts]
            yield from graph.run(logits, sampling, batch.length, padding, uniform, seen)
        finally:
            # Until here another batch gets another graph.
            self._idle = graph

    def _decode_graph(self, batch_size: int, capacity: int, sampling: Sampling) -> DecodeGraph:
        """Return a graph that no other batch uses."""
        capacity = -(-capacity // _FIXED_SLOTS) * _FIXED_SLOTS
        graph, self._idle = self._idle, None
        # Masked slots cost time, and may change the rounding; the fused kernels read used slots only.
        larger = isinstance(self._fixed_step, FusedStep)
        if graph is None or not graph.fits(batch_size, capacity, larger=larger):
            # Free its memory first.
            graph = None
            state = DecodeState(self._new_cache(batch_size, capacity), self.config.vocab_size)
            graph = self._new_graph(state)
        try:
            graph.prepare(sampling)
        except Exception as error:
            # Triton needs a C compiler, for one. Its errors have no common type.
            if not isinstance(self._fixed_step, FusedStep):
                raise
            warnings.warn(f"generation is slower without fused kernels: {error}", stacklevel=2)
            self._fixed_step = self.fixed_step
            graph = self._new_graph(graph.state)
            graph.prepare(sampling)
        return graph

    def _new_graph(self, state: DecodeState) -> DecodeGraph:
        step = self._fixed_step
        assert step is not None
        return DecodeGraph(step, state, step.sample if isinstance(step, FusedStep) else sample)

    def _new_cache(self, batch_size: int, capacity: int) -> KVCache:
        weight = self._embedding.weight
        return KVCache(self.config, capacity, batch_size=batch_size, device=weight.device, dtype=weight.dtype)

    def _prefill(self, prompts: Sequence[Sequence[int]], cache: KVCache) -> tuple[DecodeBatch, Tensor]:
        # Entries of an earlier batch beyond the new length are masked.
        for layer in cache.layers:
            layer.length = 0
        length = max(map(len, prompts))
        padding = [length - len(prompt) for prompt in prompts]
        padded = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
        batch = DecodeBatch(cache, 0, None, None)
        if any(padding):
            batch.padding = torch.tensor(padding, device=self.device)
            slots = torch.arange(cache.capacity, device=self.device)
            batch.visible = (slots >= batch.padding[:, None])[:, None, None]
        return batch, self._extend(batch, torch.tensor(padded, device=self.device))

    def _extend(self, batch: DecodeBatch, tokens: Tensor) -> Tensor:
        """Append (B, T) tokens, the prompts or one token each."""
        start, length = batch.length, tokens.shape[1]
        batch.length += length
        positions = mask = None
        if batch.padding is not None and batch.visible is not None:
            slots = torch.arange(start, batch.length, device=tokens.device)
            positions = self._positions(slots, batch.padding)
            mask = batch.visible[..., : batch.length]
            if length > 1:
                # Padding attends to itself: softmax over an empty set is NaN.
                before = slots[:, None] > slots
                mask = (before & mask) | torch.eye(length, dtype=torch.bool, device=tokens.device)
        rotary = self.model.model.rotary(positions, start, length)
        return self._run(tokens, rotary, mask, [layer.append for layer in batch.cache.layers])

    def fixed_step(self, tokens: Tensor, slot: Tensor, padding: Tensor, cache: KVCache) -> Tensor:
        """Append one token to each sequence, with shapes that are independent of the number of tokens.

        Args:
            tokens: (B,) int64.
            slot: (1,) int64, where they are stored.
            padding: (B,) int64, padding slots of each sequence.
            cache: all of its slots are attended, those that are empty masked.

        Returns:
            (B, V) float32 logits of the next tokens.
        """
        slots = torch.arange(cache.capacity, device=tokens.device)
        visible = (slots <= slot) & (slots >= padding[:, None])
        rotary = self.model.model.rotary(self._positions(slot, padding), 0, 1)
        updates = [partial(layer.put, slot) for layer in cache.layers]
        return self._run(tokens[:, None], rotary, visible[:, None, None], updates)

    def fused_step(self) -> FusedStep:
        """Return `fixed_step` in fused kernels."""
        layers, norm = [block.weights() for block in self._blocks], self.model.model.norm.weight
        head = self.model.get_output_embeddings().weight
        return FusedStep(self.config, self.model.model.rotary, self._embedding.weight, layers, norm, head)

    def _positions(self, slots: Tensor, padding: Tensor) -> Tensor:
        """Return (B, T) positions; those of padding, and beyond the last position, are arbitrary."""
        return (slots - padding[:, None]).clamp(0, self.config.max_position_embeddings - 1)

    def _run(
        self, tokens: Tensor, rotary: Rotary, mask: Tensor | None, updates: Sequence[_UpdateCache]
    ) -> Tensor:
        # rotate() of (first, second) halves is x·(cos, cos) + (second, first)·(-sin, sin).
        cos, sin = (
            torch.cat((part * sign, part), dim=-1)
            for part, sign in zip((rotary.cos, rotary.sin), (1, -1), strict=True)
        )
        x = F.embedding(tokens, self._embedding.weight)
        for block, update in zip(self._blocks, updates, strict=True):
            x = block(x, (cos, sin), mask, update)
        return self._head(_norm(x[:, -1], self.model.model.norm.weight, self._eps)).float()


class _Block:
    """`MiniMindBlock` with fused projections and without dropout."""

    def __init__(self, block: MiniMindBlock, config: MiniMindConfig, eps: Tensor, fuse: FuseLinears) -> None:
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_dim, self._eps = config.head_dim, eps
        self._attention_norm = block.input_layernorm.weight
        self._mlp_norm = block.post_attention_layernorm.weight
        attention = block.self_attn
        self._qkv = fuse([attention.q_proj, attention.k_proj, attention.v_proj])
        heads = ((attention.q_norm, self._heads), (attention.k_norm, self._kv_heads))
        # (H+K, D)
        self._qk_norm = torch.cat([norm.weight.detach().expand(n, -1) for norm, n in heads]).float()
        self._out = fuse([attention.o_proj])
        self._norms = attention.q_norm.weight, attention.k_norm.weight
        self._mlp: Callable[[Tensor], Any] = block.mlp
        self._gate_up = self._down = None
        if isinstance(block.mlp, SwiGLU):
            self._gate_up = fuse([block.mlp.gate_proj, block.mlp.up_proj])
            self._down = fuse([block.mlp.down_proj])
            self._mlp = self._swiglu

    def __call__(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, update: _UpdateCache
    ) -> Tensor:
        """Map the residual stream (B, T, C) to the next."""
        batch_size, length, _ = x.shape
        kv_width = self._kv_heads * self._head_dim
        cos, sin = rotary
        qkv = self._qkv(_norm(x, self._attention_norm, self._eps))
        # Norm and RoPE of queries and keys together: (B, T, H+K, D)
        qk = qkv[..., :-kv_width].view(batch_size, length, -1, self._head_dim).float()
        qk = _norm(qk, self._qk_norm, self._eps)
        qk = torch.addcmul(qk * cos, qk.roll(self._head_dim // 2, -1), sin).to(x.dtype).transpose(1, 2)
        v = qkv[..., -kv_width:].view(batch_size, length, -1, self._head_dim).transpose(1, 2)
        k, v = update(qk[:, self._heads :], v)
        x = x + self._out(_attend(qk[:, : self._heads], k, v, mask))
        out = self._mlp(_norm(x, self._mlp_norm, self._eps))
        # A mixture of experts also returns its routing.
        return x + (out[0] if isinstance(out, tuple) else out)

    def weights(self) -> LayerWeights:
        """Return what the fused kernels need, after fusing with `ConcatLinear`."""
        linears = (self._qkv, self._out, self._gate_up, self._down)
        qkv, out, gate_up, down = (cast(ConcatLinear | None, linear) for linear in linears)
        assert qkv is not None
        assert out is not None
        norms = self._attention_norm, self._mlp_norm, *self._norms
        return LayerWeights(*norms, qkv, out, gate_up, down, self._mlp)

    def _swiglu(self, x: Tensor) -> Tensor:
        assert self._gate_up is not None
        assert self._down is not None
        gate, up = self._gate_up(x).chunk(2, dim=-1)
        return self._down(F.silu(gate).mul_(up))


def _norm(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """Return `attention.RMSNorm`: computed in float32, in the dtype of the weight.

    F.rms_norm launches twice as many kernels, and each starts with a cold CPU cache.
    """
    x = x.float()
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = torch.addcmul(eps, length, length, value=1 / x.shape[-1]).rsqrt_()
    return (x * scale).mul_(weight).to(weight.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return attention of (B, H, T, D) queries over (B, K, S, D) keys and values, (B, T, H·D)."""
    batch_size, heads, length, head_dim = q.shape
    kv_heads = k.shape[1]
    if length == 1:
        # Treat heads that share a key as queries of one head, so that no key is copied.
        q = q.reshape(batch_size, kv_heads, -1, head_dim)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(batch_size, 1, -1)
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return out.transpose(1, 2).reshape(batch_size, length, -1)
