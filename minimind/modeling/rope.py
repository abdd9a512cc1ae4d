"""Rotary position embedding, optionally scaled by YaRN.

Shapes: B batch, T queries, D head dim, P positions in the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .config import MiniMindConfig


def rope_frequencies(
    head_dim: int, theta: float, scaling: Mapping[str, Any] | None = None
) -> tuple[Tensor, float]:
    """Return the (D/2,) float32 angular frequencies, and the attention factor that scales cos and sin.

    Su et al. 2021 (arXiv 2104.09864): the frequency of pair i is theta^(-2i/D). With `scaling`, YaRN (Peng et
    al. 2023, arXiv 2309.00071, section 3): frequencies with more than `beta_fast` rotations within the
    original length are kept, those with less than `beta_slow` are divided by `factor`, with a linear ramp
    between; the attention factor is 0.1·ln(factor) + 1 unless `attention_factor` is set.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (theta**exponents)
    if scaling is None:
        return frequencies, 1.0
    factor = float(scaling["factor"])
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        attention_factor = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    length = scaling["original_max_position_embeddings"]

    def pair_with_rotations(count: float) -> float:
        return head_dim * math.log(length / (count * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_with_rotations(scaling.get("beta_fast", 32))
    high = pair_with_rotations(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2).float() - low) / max(high - low, 0.001)
    interpolated = ramp.clamp(0, 1)
    return frequencies / factor * interpolated + frequencies * (1 - interpolated), float(attention_factor)


class Rotary(NamedTuple):
    """Rotation of each token.

    Attributes:
        cos: (B or 1, T, 1, D/2) float32 per token, or the (P, D/2) table of all positions.
        sin: same shape.
        positions: (B, T) indices into the tables, None if `cos` and `sin` are per token.
    """

    cos: Tensor
    sin: Tensor
    positions: Tensor | None = None


class RotaryTable(nn.Module):
    """cos and sin of every position, (P, D/2), always float32 and never in the state dict.

    In bf16 positions 1000 and 1001 would be equal. The table is therefore recomputed after `to`, `half` or
    `to_empty` of the module.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        self._positions = config.max_position_embeddings
        self._frequencies = config.head_dim, config.rope_theta, config.rope_scaling
        self.register_buffer("cos", torch.empty(0), persistent=False)
        self.register_buffer("sin", torch.empty(0), persistent=False)
        self._fill()

    def _fill(self) -> None:
        device = self.cos.device
        # Computed on the CPU, so that all devices have identical values; skipped on `meta`.
        with torch.device("meta" if device.type == "meta" else "cpu"):
            frequencies, factor = rope_frequencies(*self._frequencies)
            angles = torch.outer(torch.arange(self._positions).float(), frequencies)  # (P, D/2)
        self.cos = (angles.cos() * factor).to(device)
        self.sin = (angles.sin() * factor).to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryTable:
        super()._apply(fn, recurse)
        self._fill()
        return self

    def forward(self, position_ids: Tensor | None, start: int, length: int) -> Rotary:
        """Return cos and sin per token.

        Args:
            position_ids: (B, T) positions, or None for `start`, start + 1, ...
            start: first position where `position_ids` is None.
        """
        if position_ids is None:
            positions = slice(start, start + length)
            return Rotary(self.cos[None, positions, None], self.sin[None, positions, None])
        return Rotary(self.cos[position_ids].unsqueeze(2), self.sin[position_ids].unsqueeze(2))

    def tables(self, position_ids: Tensor | None, batch_size: int, length: int) -> Rotary:
        """Return cos and sin of all positions, and the (B, T) positions of the tokens, 0, 1, ... if None."""
        if position_ids is None:
            position_ids = torch.arange(length, device=self.cos.device).expand(batch_size, length)
        return Rotary(self.cos, self.sin, position_ids)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of (B, T, H, D) in float32, in the layout of Llama and Qwen."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
