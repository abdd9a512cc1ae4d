"""Key-value cache for generation.

Shapes: B batch, T new tokens, S cached tokens, K kv heads, D head dim.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .config import MiniMindConfig


class LayerCache:
    """Keys and values of one layer, (B, K, capacity, D); the first `length` positions are filled."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, D) new keys and values and return all of them, (B, K, S, D)."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def put(self, slot: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, K, 1, D) at `slot`, a (1,) int64, and return all slots, (B, K, capacity, D).

        Shapes are independent of the position, as compiled code needs. Empty slots are zeros, which the
        caller must mask; `length` is not updated.
        """
        self.keys.index_copy_(2, slot, keys)
        self.values.index_copy_(2, slot, values)
        return self.keys, self.values


class KVCache:
    """One preallocated `LayerCache` per layer."""

    def __init__(
        self,
        config: MiniMindConfig,
        capacity: int,
        *,
        batch_size: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = batch_size, config.num_key_value_heads, capacity, config.head_dim
        self.capacity = capacity
        # Zeros, not uninitialized memory: a masked NaN times a weight of 0 is still NaN.
        new = partial(torch.zeros, shape, device=device, dtype=dtype)
        self.layers = [LayerCache(new(), new()) for _ in range(config.num_hidden_layers)]

    @property
    def length(self) -> int:
        """Number of cached tokens, which is the position of the next one."""
        return self.layers[0].length
