"""The decoding step that is compiled on a GPU, run as it is: its logits are those of the other step."""

from __future__ import annotations

import pytest
import torch
from test_engine import build, some_ids

from minimind.generation.engine import InferenceEngine


@pytest.mark.parametrize("lengths", [(5, 5), (5, 2, 7)])
def test_the_step_of_fixed_shapes_gives_the_logits_of_the_other(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...]
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = build()
    prompts = [some_ids(length, seed) for seed, length in enumerate(lengths)]
    fixed, plain = InferenceEngine(model, compiled=True), InferenceEngine(model)
    # Twice, for the cache is used again.
    for _ in range(2):
        (ours, logits), (theirs, expected) = (one.begin(prompts, 20) for one in (fixed, plain))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        for seed in range(6):
            tokens = torch.tensor(some_ids(len(prompts), 10 + seed))
            logits, expected = fixed.step(ours, tokens), plain.step(theirs, tokens)
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
            assert ours.length == theirs.length
