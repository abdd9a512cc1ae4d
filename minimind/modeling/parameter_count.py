"""Count the parameters of a model by part, from their names and shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

# In the order of a forward pass.
PARTS = ("embedding", "attention", "MLP", "norms", "head")
# Substrings of Hugging Face names: of Qwen3, Llama and most others, then of GPT-2, OPT, BLOOM and GPT-NeoX.
# The first match decides, so norms inside attention count as norms.
_PATTERNS = (
    *(("norm.", "norms"), ("ln_", "norms")),
    *(
        ("embed_tokens.", "embedding"),
        ("wte.", "embedding"),
        ("wpe.", "embedding"),
        ("embeddings.", "embedding"),
    ),
    *(("embed_positions.", "embedding"), ("embed_in.", "embedding")),
    *(("attn.", "attention"), ("attention.", "attention")),
    *(("mlp.", "MLP"), ("fc1.", "MLP"), ("fc2.", "MLP"), ("experts.", "MLP")),
    *(("lm_head.", "head"), ("embed_out.", "head")),
)
OTHER = "other"


def count_parts(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return the number of parameters of every part; a tied head has 0.

    Args:
        shapes: by parameter name; a tied matrix only under the name of the embedding.
    """
    counts = dict.fromkeys(PARTS, 0)
    for name, shape in shapes.items():
        part = next((part for pattern, part in _PATTERNS if pattern in name), OTHER)
        counts[part] = counts.get(part, 0) + math.prod(shape)
    return counts
