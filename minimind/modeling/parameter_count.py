"""What the parameters of a model are for: counted by part, from their names and shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

# In the order of a forward pass.
PARTS = ("embedding", "attention", "MLP", "norms", "head")
# What a Hugging Face name has in it; the first that fits decides, so the norms inside attention are norms.
_WORDS = (
    ("norm.", "norms"),
    ("embed_tokens.", "embedding"),
    ("self_attn.", "attention"),
    ("mlp.", "MLP"),
    ("lm_head.", "head"),
)
OTHER = "other"


def part_of(name: str) -> str:
    """Return the part that a parameter belongs to, `other` for a name that is not of this model."""
    return next((part for word, part in _WORDS if word in name), OTHER)


def count_parts(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return the number of parameters by part; every part is named, and a tied head has 0.

    Args:
        shapes: by parameter name, a tied matrix once, under the name of the embedding.
    """
    counts = dict.fromkeys(PARTS, 0)
    for name, shape in shapes.items():
        part = part_of(name)
        counts[part] = counts.get(part, 0) + math.prod(shape)
    return counts
