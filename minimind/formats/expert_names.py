"""Names of experts in files: each matrix of each expert by itself, where a model holds them stacked.

So the original minimind and transformers write them; transformers 5 stacks them in memory, as is done here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

# As `modeling.moe.Experts` names its parameters inside a block.
_STACK = re.compile(r"(.*\.mlp\.experts)\.((?:gate|up|down)_proj)")


def to_checkpoint_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a model by their names in files; all but stacked experts stay as they are.

    `model.layers.0.mlp.experts.up_proj`, (E, F, C), becomes `model.layers.0.mlp.experts.0.up_proj.weight` and
    so on, (F, C) each. These are views into the stack: what is copied into them is in the model.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if (stack := _STACK.fullmatch(name)) is None:
            named[name] = tensor
        else:
            experts, projection = stack.groups()
            named |= {f"{experts}.{e}.{projection}.weight": matrix for e, matrix in enumerate(tensor)}
    return named
