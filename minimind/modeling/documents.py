"""Where the documents that share a row begin and end.

Shapes: B rows, T tokens of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """Which keys each token sees, where every document is one run of tokens in a row.

    Attributes:
        starts: (B, T) int32, the first token of each token's document.
        ends: (B, T) int32, one past its last token.
    """

    starts: Tensor
    ends: Tensor


def documents(document_ids: Tensor | None, rows: int, length: int, device: torch.device) -> Documents:
    """Return where each document begins and ends.

    Args:
        document_ids: (B, T), a new number for each new document; None where a row is one document.
        rows: B.
        length: T.
        device: where to.
    """
    at = torch.arange(length, dtype=torch.int32, device=device).expand(rows, length).contiguous()
    if document_ids is None:
        return Documents(torch.zeros_like(at), torch.full_like(at, length))
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = torch.where(begins, at, 0).cummax(1).values
    # As many tokens begin at or before this one as lie in documents up to its own.
    ends = torch.searchsorted(starts, at, right=True, out_int32=True)
    return Documents(starts, ends)
