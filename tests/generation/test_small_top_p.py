"""Nucleus sampling where the nucleus is a single token."""

from __future__ import annotations

import pytest
import torch

from minimind.generation.sampling import Sampling, choose, keep_top_p


@pytest.mark.parametrize("p", [1e-9, 1e-6, 0.01])
def test_a_top_p_near_0_keeps_the_most_likely_token_alone(p: float) -> None:
    logits = torch.randn(64, 500, generator=torch.Generator().manual_seed(0))
    kept = keep_top_p(logits, p).isfinite()
    assert kept.sum(-1).tolist() == [1] * 64
    assert torch.equal(kept.float().argmax(-1), logits.argmax(-1))
    uniform = torch.rand(64, generator=torch.Generator().manual_seed(1))
    tokens = choose(logits, Sampling(temperature=1.0, top_k=None, top_p=p), None, uniform)
    assert torch.equal(tokens, logits.argmax(-1))
