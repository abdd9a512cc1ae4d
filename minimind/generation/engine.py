"""The model laid out for writing: packed weights, cached keys and values, logits of the last token only.

Shapes: B batch, T new tokens, S tokens or slots of the cache, C hidden, H heads, K kv heads, D head dim,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modeling.config import MiniMindConfig
from ..modeling.feed_forward import SwiGLU
from ..modeling.kv_cache import KVCache
from ..modeling.rope import Rotary
from ..modeling.transformer import MiniMindBlock, MiniMindForCausalLM
from .packed_linear import concat_weights, pack

# Capacities are multiples of this where code is compiled, which happens once for each.
_COMPILED_SLOTS = 256

# Stores new keys and values, (B, K, T, D) each, and returns those of all tokens, (B, K, S, D).
_Keep = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

FuseLinears = Callable[[Sequence[nn.Linear]], Callable[[Tensor], Tensor]]


@dataclass
class DecodeBatch:
    """A batch of texts on their way, padded on the left so that they all end in the same slot.

    Attributes:
        cache: keys and values.
        length: slots used so far.
        padding: (B,) int64 slots before each text, None where no text has any.
        visible: (B, 1, 1, capacity) bool, False for padding; None where there is none.
    """

    cache: KVCache
    length: int
    padding: Tensor | None
    visible: Tensor | None


class InferenceEngine:
    """Runs a model one token after another; dropout plays no part.

    The weights are those of the model when this was made: on the CPU they are copied (see `projection.pack`),
    elsewhere they are the model's own.

    Args:
        model: on any device, in any precision.
        compiled: compile the step after the prompt, for a GPU: every shape is fixed, so that it runs as one
            CUDA graph. The first tokens take as long as the compilation, and one batch is written at a time.
    """

    def __init__(self, model: MiniMindForCausalLM, *, compiled: bool = False) -> None:
        self.config = model.config
        self.model = model
        self._embedding = model.get_input_embeddings()
        self._eps = torch.tensor(model.config.rms_norm_eps, device=self._embedding.weight.device)
        lay_out = concat_weights if compiled else pack
        layers = cast(Sequence[MiniMindBlock], model.model.layers)
        self._blocks = [_Block(layer, model.config, self._eps, lay_out) for layer in layers]
        self._head = lay_out([model.get_output_embeddings()])
        self._compiled: Callable[..., Tensor] | None = None
        self._compiled_cache: KVCache | None = None
        if compiled:
            self._compiled = torch.compile(
                self._fixed_step, mode="reduce-overhead", fullgraph=True, dynamic=False
            )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._embedding.weight.device

    @torch.inference_mode()
    def begin(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[DecodeBatch, Tensor]:
        """Read prompts, none of them empty.

        Args:
            prompts: token ids.
            capacity: tokens that the longest text may reach, its prompt included.

        Returns:
            The texts, and (B, V) float32 logits of what follows each.
        """
        length = max(map(len, prompts))
        padding = [length - len(prompt) for prompt in prompts]
        rows = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
        cache = self._new_cache(len(prompts), capacity)
        texts = DecodeBatch(cache, 0, None, None)
        if any(padding):
            texts.padding = torch.tensor(padding, device=self.device)
            slots = torch.arange(cache.capacity, device=self.device)
            texts.visible = (slots >= texts.padding[:, None])[:, None, None]
        return texts, self._extend(texts, torch.tensor(rows, device=self.device))

    @torch.inference_mode()
    def step(self, texts: DecodeBatch, tokens: Tensor) -> Tensor:
        """Append one token to each text, (B,) int64, and return (B, V) float32 logits of what follows."""
        if self._compiled is None:
            return self._extend(texts, tokens[:, None])
        slot = torch.tensor([texts.length], device=self.device)
        texts.length += 1
        return self._compiled(tokens[:, None], slot, texts.padding, texts.cache)

    def _new_cache(self, rows: int, capacity: int) -> KVCache:
        weight = self._embedding.weight
        if self._compiled is None:
            return KVCache(self.config, capacity, batch_size=rows, device=weight.device, dtype=weight.dtype)
        capacity = -(-capacity // _COMPILED_SLOTS) * _COMPILED_SLOTS
        cache = self._compiled_cache
        if cache is None or (cache.capacity, len(cache.layers[0].keys)) != (capacity, rows):
            cache = KVCache(self.config, capacity, batch_size=rows, device=weight.device, dtype=weight.dtype)
            for layer in cache.layers:
                # Else a CUDA graph would copy the whole cache into memory of its own at each step.
                torch._dynamo.mark_static_address(layer.keys, guard=False)
                torch._dynamo.mark_static_address(layer.values, guard=False)
            self._compiled_cache = cache
        # What an earlier text left beyond the new one is masked.
        for layer in cache.layers:
            layer.length = 0
        return cache

    def _extend(self, texts: DecodeBatch, tokens: Tensor) -> Tensor:
        """Append (B, T) tokens, the prompts or one token each."""
        start, length = texts.length, tokens.shape[1]
        texts.length += length
        positions = mask = None
        if texts.padding is not None and texts.visible is not None:
            slots = torch.arange(start, texts.length, device=tokens.device)
            positions = self._positions(slots, texts.padding)
            mask = texts.visible[..., : texts.length]
            if length > 1:
                # Padding sees itself, for softmax over nothing is not a number.
                before = slots[:, None] > slots
                mask = (before & mask) | torch.eye(length, dtype=torch.bool, device=tokens.device)
        rotary = self.model.model.rotary(positions, start, length)
        return self._run(tokens, rotary, mask, [layer.append for layer in texts.cache.layers])

    def _fixed_step(self, tokens: Tensor, slot: Tensor, padding: Tensor | None, cache: KVCache) -> Tensor:
        """Append (B, 1) tokens at `slot`, a (1,) int64; no shape and no number of Python changes."""
        slots = torch.arange(cache.capacity, device=tokens.device)
        visible = (slots <= slot)[None]
        positions = slot[None]
        if padding is not None:
            visible = visible & (slots >= padding[:, None])
            positions = self._positions(slot, padding)
        rotary = self.model.model.rotary(positions, 0, 1)

        def keep(number: int) -> _Keep:
            return lambda keys, values: cache.layers[number].put(slot, keys, values)

        return self._run(tokens, rotary, visible[:, None, None], [keep(n) for n in range(len(cache.layers))])

    def _positions(self, slots: Tensor, padding: Tensor) -> Tensor:
        """Return (B, T) positions; padding has any, and so has a text that went on beyond the last one."""
        return (slots - padding[:, None]).clamp(0, self.config.max_position_embeddings - 1)

    def _run(self, tokens: Tensor, rotary: Rotary, mask: Tensor | None, keeps: Sequence[_Keep]) -> Tensor:
        # rotate() of (first, second) halves is x·(cos, cos) + (second, first)·(-sin, sin).
        cos, sin = (
            torch.cat((part * sign, part), dim=-1)
            for part, sign in zip((rotary.cos, rotary.sin), (1, -1), strict=True)
        )
        x = F.embedding(tokens, self._embedding.weight)
        for block, keep in zip(self._blocks, keeps, strict=True):
            x = block(x, (cos, sin), mask, keep)
        return self._head(_norm(x[:, -1], self.model.model.norm.weight, self._eps)).float()


class _Block:
    """One block with its projections packed; computes what `MiniMindBlock` computes without dropout."""

    def __init__(
        self, block: MiniMindBlock, config: MiniMindConfig, eps: Tensor, lay_out: FuseLinears
    ) -> None:
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_dim, self._eps = config.head_dim, eps
        self._attention_norm = block.input_layernorm.weight
        self._mlp_norm = block.post_attention_layernorm.weight
        attention = block.self_attn
        self._qkv = lay_out([attention.q_proj, attention.k_proj, attention.v_proj])
        heads = ((attention.q_norm, self._heads), (attention.k_norm, self._kv_heads))
        # (H+K, D)
        self._qk_norm = torch.cat([norm.weight.detach().expand(n, -1) for norm, n in heads]).float()
        self._out = lay_out([attention.o_proj])
        self._mlp: Callable[[Tensor], Any] = block.mlp
        if isinstance(block.mlp, SwiGLU):
            self._gate_up = lay_out([block.mlp.gate_proj, block.mlp.up_proj])
            self._down = lay_out([block.mlp.down_proj])
            self._mlp = self._swiglu

    def __call__(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, keep: _Keep) -> Tensor:
        """Map the residual stream (B, T, C) to the next."""
        rows, length, _ = x.shape
        kv_width = self._kv_heads * self._head_dim
        cos, sin = rotary
        qkv = self._qkv(_norm(x, self._attention_norm, self._eps))
        # Queries and keys are normed and turned together: (B, T, H+K, D)
        qk = qkv[..., :-kv_width].view(rows, length, -1, self._head_dim).float()
        qk = _norm(qk, self._qk_norm, self._eps)
        qk = torch.addcmul(qk * cos, qk.roll(self._head_dim // 2, -1), sin).to(x.dtype).transpose(1, 2)
        v = qkv[..., -kv_width:].view(rows, length, -1, self._head_dim).transpose(1, 2)
        k, v = keep(qk[:, self._heads :], v)
        x = x + self._out(_attend(qk[:, : self._heads], k, v, mask))
        written = self._mlp(_norm(x, self._mlp_norm, self._eps))
        # Experts also return whom they chose.
        return x + (written[0] if isinstance(written, tuple) else written)

    def _swiglu(self, x: Tensor) -> Tensor:
        gate, up = self._gate_up(x).chunk(2, dim=-1)
        return self._down(F.silu(gate).mul_(up))


def _norm(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """Return what `attention.RMSNorm` does: computed in float32, in the dtype of the weight.

    F.rms_norm would be one call and twice as many kernels, each of which finds a cache full of weights.
    """
    x = x.float()
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = torch.addcmul(eps, length, length, value=1 / x.shape[-1]).rsqrt_()
    return (x * scale).mul_(weight).to(weight.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return what (B, H, T, D) queries gather from (B, K, S, D) keys and values, (B, T, H·D)."""
    rows, heads, length, width = q.shape
    kv_heads = k.shape[1]
    if length == 1:
        # The heads that share a key become queries of one head, and no key is copied.
        q = q.reshape(rows, kv_heads, -1, width)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(rows, 1, -1)
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return out.transpose(1, 2).reshape(rows, length, -1)
