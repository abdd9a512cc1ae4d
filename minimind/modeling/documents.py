"""Document boundaries in packed sequences.

Shapes: B sequences, T tokens per sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """Boundaries of the document of each token; a document is contiguous within a sequence.

    Attributes:
        starts: (B, T) int32, position of the first token of the document.
        ends: (B, T) int32, one past its last token.
    """

    starts: Tensor
    ends: Tensor


def documents(document_ids: Tensor | None, batch_size: int, length: int, device: torch.device) -> Documents:
    """Return the document boundaries of each token.

    Args:
        document_ids: (B, T), which changes from one document to the next; None for one document per sequence.
        device: of the result.
    """
    positions = torch.arange(length, dtype=torch.int32, device=device).expand(batch_size, length).contiguous()
    if document_ids is None:
        return Documents(torch.zeros_like(positions), torch.full_like(positions, length))
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = torch.where(begins, positions, 0).cummax(1).values
    # The number of tokens whose document starts at or before this token is the end of its document.
    ends = torch.searchsorted(starts, positions, right=True, out_int32=True)
    return Documents(starts, ends)
