"""SwiGLU feed-forward layer.

Shapes: B batch, T tokens, C hidden, F inner.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import float8
from .config import MiniMindConfig
from .kernels import dispatch as fused


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        c, f = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(c, f, bias=False)
        self.up_proj = nn.Linear(c, f, bias=False)
        self.down_proj = nn.Linear(f, c, bias=False)
        # Compute the products in FP8 in training, where the kernels are used.
        self.float8 = False

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        if fused.supported(x, self.gate_proj.weight):
            weight = torch.cat((self.gate_proj.weight, self.up_proj.weight))
            if self.float8 and self.training:
                inner = fused.swiglu(float8.linear(x, weight).flatten(0, -2))
                return float8.linear(inner, self.down_proj.weight).view(x.shape)
            gate_up = F.linear(x, weight)
            return fused.swiglu_down(gate_up, self.down_proj.weight)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
