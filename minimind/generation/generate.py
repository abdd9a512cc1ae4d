"""Text continuation, one token at a time, of one prompt or of several at once.

Shapes: B prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from ..errors import ConfigError
from ..modeling.transformer import MiniMindForCausalLM
from .engine import InferenceEngine
from .sampling import Sampling, choose

# Default of `generate`.
SAMPLING = Sampling()


def generate(
    model: MiniMindForCausalLM | InferenceEngine,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling = SAMPLING,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    seed: int | None = None,
) -> list[list[int]]:
    """Return the token ids that continue each prompt, the end token included where the model wrote it.

    Fewer than `max_new_tokens` come back when an end token is chosen or the model's positions are used up.
    Each continuation is what its prompt alone would get, up to the rounding of float32.

    Args:
        model: dropout plays no part. A `InferenceEngine` made once serves many calls.
        prompts: token ids, at least one each; their lengths may differ.
        sampling: how tokens are chosen.
        max_new_tokens: tokens to write at most, for each prompt.
        stop_ids: tokens that end a text.
        seed: prompt number i draws from `seed + i`, the same on every device; None draws differently each
            time.

    Raises:
        ConfigError: when a prompt is empty or leaves no position to write to.
    """
    written: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(
        model, prompts, sampling, max_new_tokens=max_new_tokens, stop_ids=stop_ids, seed=seed
    ):
        for text, token in zip(written, tokens, strict=True):
            if token is not None:
                text.append(token)
    return written


@torch.inference_mode()
def stream(
    model: MiniMindForCausalLM | InferenceEngine,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling = SAMPLING,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    seed: int | None = None,
) -> Iterator[list[int | None]]:
    """Yield the next token of every prompt as it is chosen, None for one that has ended; see `generate`."""
    decoder = model if isinstance(model, InferenceEngine) else InferenceEngine(model)
    left = _tokens_to_write(prompts, decoder.config.max_position_embeddings, max_new_tokens)
    if not prompts or max_new_tokens < 1:
        return
    uniform = _uniforms(len(prompts), max(left), seed).to(decoder.device)
    capacity = max(map(len, prompts)) + max(left)
    texts, logits = decoder.begin(prompts, capacity)
    seen = _seen(prompts, logits) if sampling.repetition_penalty != 1 else None
    for number in range(max(left)):
        chosen = choose(logits, sampling, seen, uniform[number])
        tokens = chosen.tolist()
        yield [token if count > 0 else None for token, count in zip(tokens, left, strict=True)]
        left = [0 if token in stop_ids else count - 1 for token, count in zip(tokens, left, strict=True)]
        if max(left) <= 0:
            return
        if seen is not None:
            seen.scatter_(1, chosen[:, None], True)
        # A text that has ended goes on unseen, so that the batch keeps its shape.
        logits = decoder.step(texts, chosen)


def _tokens_to_write(prompts: Sequence[Sequence[int]], positions: int, wanted: int) -> list[int]:
    """Return how many tokens may follow each prompt."""
    for prompt in prompts:
        if not prompt:
            raise ConfigError("the prompt is empty; begin with at least the bos token.")
        if len(prompt) >= positions:
            raise ConfigError(
                f"the prompt has {len(prompt)} tokens, but the model has {positions} positions; "
                "shorten the prompt."
            )
    return [min(wanted, positions - len(prompt)) for prompt in prompts]


def _uniforms(rows: int, count: int, seed: int | None) -> Tensor:
    """Return (count, B) numbers in [0, 1): the draws of each row, whatever else is in the batch."""
    if seed is None:
        return torch.rand(count, rows, generator=_generator(None))
    return torch.stack([torch.rand(count, generator=_generator(seed + row)) for row in range(rows)], dim=1)


def _generator(seed: int | None) -> torch.Generator:
    """Return a generator of its own, so that whoever else draws from torch's is not disturbed."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
        return generator
    return generator.manual_seed(seed)


def _seen(prompts: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
    """Return (B, V) bool: which tokens stand in each prompt."""
    seen = torch.zeros(logits.shape, dtype=torch.bool)
    for row, prompt in zip(seen, prompts, strict=True):
        row[list(prompt)] = True
    return seen.to(logits.device)
