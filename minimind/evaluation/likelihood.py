"""Log-likelihood of continuations, on which cloze and multiple-choice scores rest.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# Logits of one batch, B x T x V: 256 MB in float32.
_LOGITS_PER_BATCH = 1 << 26


@torch.inference_mode()
def log_likelihoods(
    model: nn.Module,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    max_length: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[float, bool]]:
    """Return the log-likelihood of each continuation in nats, and whether it is the greedy one.

    Args:
        model: in evaluation mode; called with (B, T) `input_ids`, returns an output with `logits`.
        pairs: context and continuation as token ids; the context has at least one.
        max_length: positions of the model. The beginning of a longer context is cut off, then that of the
            continuation, whose lost tokens are not counted.
        progress: called with the sequences done and all sequences.
    """
    device = next(model.parameters()).device
    sequences = []
    for context, continuation in pairs:
        tokens = [*context, *continuation][-(max_length + 1) :]
        sequences.append((tokens, min(len(continuation), len(tokens) - 1)))
    order = sorted(range(len(sequences)), key=lambda number: -len(sequences[number][0]))
    found: list[tuple[float, bool]] = [(0.0, True)] * len(sequences)
    vocab_size = 0
    first = 0
    while first < len(order):
        length = len(sequences[order[first]][0]) - 1
        # The first batch has one sequence, which tells V.
        batch_size = max(1, _LOGITS_PER_BATCH // (max(length, 1) * vocab_size)) if vocab_size else 1
        chosen = order[first : first + batch_size]
        first += len(chosen)
        if length > 0:
            inputs = [sequences[number][0][:-1] for number in chosen]
            # (B, T); the padding on the right is behind everything that counts.
            padded = [ids + [0] * (length - len(ids)) for ids in inputs]
            logits = model(input_ids=torch.tensor(padded, dtype=torch.long, device=device)).logits
            vocab_size = logits.shape[-1]
            for number, scored in zip(chosen, logits, strict=True):
                found[number] = _score(scored, *sequences[number])
        progress(first, len(order))
    return found


def _score(logits: Tensor, tokens: list[int], num_targets: int) -> tuple[float, bool]:
    """Score the last `num_targets` tokens of a sequence by (T, V) logits."""
    if num_targets == 0:
        return 0.0, True
    stop = len(tokens) - 1
    used = logits[stop - num_targets : stop].float()
    targets = torch.tensor(tokens[-num_targets:], device=logits.device)
    chosen = used.gather(1, targets[:, None])[:, 0]
    total = (chosen - used.logsumexp(-1)).double().sum()
    return float(total), bool((used.argmax(-1) == targets).all())
