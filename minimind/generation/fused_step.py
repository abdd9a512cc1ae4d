"""One decoding step in Triton kernels, for CUDA GPUs.

Shapes: B batch, C hidden, H heads, K kv heads, D head dim, F inner, V vocabulary, N outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modeling.config import MiniMindConfig
from ..modeling.kv_cache import KVCache, LayerCache
from ..modeling.rope import RotaryTable
from .decode_graph import DecodeState, sample
from .packed_linear import ConcatLinear
from .sampling import Sampling

# Up to this batch size products are computed by `kernels.linear`, which reads the weights once per sequence
# (after the first one from the L2 cache); cuBLAS multiplies larger batches.
SMALL_BATCH = 4
# Numbers of keys that an attention program reads at once.
_TILE = 4096
# Programs over which the keys of a small batch are split, so that they fill a large GPU.
_PROGRAMS = 256
_LARGEST_HEAD = 256
# Logits that a program of `kernels.sample` holds in registers.
_LARGEST_VOCABULARY = 16384


def supported(device: torch.device, head_dim: int) -> bool:
    """Whether the kernels support this device and head dimension D."""
    return device.type == "cuda" and head_dim <= _LARGEST_HEAD and find_spec("triton") is not None


@dataclass(frozen=True)
class LayerWeights:
    """Weights of a layer.

    Attributes:
        attention_norm: (C,).
        mlp_norm: (C,).
        q_norm: (D,).
        k_norm: (D,).
        qkv: ((H + 2K)·D, C).
        out: (C, H·D).
        gate_up: (2F, C), None for a mixture of experts.
        down: (C, F), None for a mixture of experts.
        mlp: maps (B, 1, C) to (B, 1, C), for a mixture of experts to that and its routing.
    """

    attention_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor
    k_norm: Tensor
    qkv: ConcatLinear
    out: ConcatLinear
    gate_up: ConcatLinear | None
    down: ConcatLinear | None
    mlp: Callable[[Tensor], Any]


class FusedStep:
    """Appends one token to each sequence as `InferenceEngine.fixed_step` does.

    A layer takes five kernels, or eight for large batches.
    Results are equal up to the rounding of intermediate values.
    """

    def __init__(
        self,
        config: MiniMindConfig,
        rotary: RotaryTable,
        embedding: Tensor,
        layers: Sequence[LayerWeights],
        norm: Tensor,
        head: Tensor,
    ) -> None:
        """Keep the weights.

        Args:
            embedding: (V, C).
            norm: (C,), of the last norm.
            head: (V, C) output matrix.
        """
        self._config, self._rotary, self._layers = config, rotary, layers
        self._embedding, self._norm, self._head = embedding, norm, head
        self._dense = all(layer.gate_up is not None for layer in layers)

    def __call__(self, tokens: Tensor, slot: Tensor, padding: Tensor, cache: KVCache) -> Tensor:
        """Return (B, V) float32 logits; see `InferenceEngine.fixed_step`."""
        x = F.embedding(tokens, self._embedding)
        if self._dense and len(tokens) <= SMALL_BATCH:
            return self._small(x, slot, padding, cache)
        added: Tensor | None = None
        for layer, cached in zip(self._layers, cache.layers, strict=True):
            x, normed = self._add_norm(x, added, layer.attention_norm)
            attended = self._attend(layer, layer.qkv(normed), slot, padding, cached)
            x, normed = self._add_norm(x, layer.out(attended), layer.mlp_norm)
            if layer.gate_up is None:
                added = layer.mlp(normed[:, None])[0][:, 0]
            else:
                added = self._swiglu(layer, normed)
        _, normed = self._add_norm(x, added, self._norm)
        return F.linear(normed, self._head).float()

    def _small(self, x: Tensor, slot: Tensor, padding: Tensor, cache: KVCache) -> Tensor:
        for layer, cached in zip(self._layers, cache.layers, strict=True):
            assert layer.gate_up is not None
            assert layer.down is not None
            qkv = self._linear(x, layer.qkv.weight, norm=layer.attention_norm)
            attended = self._attend(layer, qkv, slot, padding, cached)
            x = self._linear(attended, layer.out.weight, residual=x)
            inner = self._linear(x, layer.gate_up.weight, norm=layer.mlp_norm, gated=True)
            x = self._linear(inner, layer.down.weight, residual=x)
        return self._linear(x, self._head, norm=self._norm, dtype=torch.float32)

    def _linear(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        norm: Tensor | None = None,
        residual: Tensor | None = None,
        gated: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        from . import kernels

        columns = x.shape[1]
        outputs = len(weight) // 2 if gated else len(weight)
        out = x.new_empty(len(x), outputs, dtype=dtype or x.dtype)
        each = 4
        kernels.linear[(-(-outputs // each), len(x))](
            x, weight, x if norm is None else norm, x if residual is None else residual, out, outputs,
            EPS=self._config.rms_norm_eps, NORM=norm is not None, GATED=gated, ADD=residual is not None,
            COLUMNS=columns, OUTPUTS=each, BLOCK=min(256, _power_of_two(columns)), num_warps=4,
        )  # fmt: skip
        return out

    def _add_norm(self, x: Tensor, added: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return x + added (x if None) and its RMS norm, (B, C) each."""
        from ..modeling.kernels import block as kernels

        columns = x.shape[1]
        total = x if added is None else torch.empty_like(x)
        normed = torch.empty_like(x)
        inverse = torch.empty(len(x), dtype=torch.float32, device=x.device)
        kernels.add_norm_forward[(len(x),)](
            x, x if added is None else added, weight, total, normed, inverse, columns,
            EPS=self._config.rms_norm_eps, ADD=added is not None, BLOCK=_power_of_two(columns), num_warps=4,
        )  # fmt: skip
        return total, normed

    def _swiglu(self, layer: LayerWeights, x: Tensor) -> Tensor:
        from ..modeling.kernels import block as kernels

        assert layer.gate_up is not None
        assert layer.down is not None
        gate_up = layer.gate_up(x)
        columns = gate_up.shape[1] // 2
        inner = x.new_empty(len(x), columns)
        kernels.swiglu_forward[(-(-len(x) // 4), -(-columns // 512))](
            gate_up, inner, len(x), columns, ROWS=4, BLOCK=512, num_warps=4
        )
        return layer.down(inner)

    def _attend(
        self, layer: LayerWeights, qkv: Tensor, slot: Tensor, padding: Tensor, cached: LayerCache
    ) -> Tensor:
        """Append to the cache and return the attention, (B, H·D), of (B, (H + 2K)·D)."""
        from . import kernels

        heads, kv_heads = self._config.num_attention_heads, self._config.num_key_value_heads
        dim, batch_size, capacity = self._config.head_dim, len(qkv), cached.keys.shape[2]
        width = _power_of_two(dim)
        shape: dict[str, Any] = {"HEADS": heads, "DIM": dim, "BLOCK": width}
        splits = _splits(batch_size * heads)
        out = qkv.new_empty(batch_size, heads * dim)
        parts, peaks, sums = out, out, out
        if splits > 1:
            parts = qkv.new_empty(batch_size, splits, heads, dim, dtype=torch.float32)
            peaks, sums = qkv.new_empty(2, batch_size, splits, heads, dtype=torch.float32)
        kernels.attend[(heads, batch_size, splits)](
            qkv, layer.q_norm, layer.k_norm, self._rotary.cos, self._rotary.sin, cached.keys, cached.values,
            slot, padding, parts, peaks, sums, capacity, len(self._rotary.cos),
            SCALE=dim**-0.5 * math.log2(math.e), EPS=self._config.rms_norm_eps, KV_HEADS=kv_heads,
            KEYS=max(_TILE // width, 16), SPLITS=splits, num_warps=4, **shape,
        )  # fmt: skip
        if splits > 1:
            kernels.combine[(heads, batch_size)](parts, peaks, sums, out, SPLITS=splits, num_warps=4, **shape)
        return out

    def sample(self, logits: Tensor, sampling: Sampling, state: DecodeState) -> None:
        """Choose the next tokens and record them, as `decode_graph.sample` does."""
        batch_size, vocab_size = logits.shape
        if sampling.top_p < 1 or vocab_size > _LARGEST_VOCABULARY:
            sample(logits, sampling, state)
            return
        from . import kernels

        block = _power_of_two(vocab_size)
        kernels.sample[(batch_size,)](
            logits, state.seen.view(torch.uint8), state.uniform, state.number, state.slot, state.tokens,
            state.history,
            float(sampling.temperature), float(sampling.repetition_penalty), float(sampling.min_p),
            GREEDY=sampling.greedy, PENALIZE=sampling.repetition_penalty != 1, VOCABULARY=vocab_size,
            TOP_K=0 if sampling.top_k is None else min(sampling.top_k, vocab_size), BLOCK=block,
            num_warps=min(max(block // 512, 4), 32),
        )  # fmt: skip


def _splits(programs: int) -> int:
    """Return over how many programs the keys of a head are split, a power of two.

    It is independent of the capacity, on which the rounding must not depend.
    """
    return 1 << (max(_PROGRAMS // programs, 1).bit_length() - 1)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
