"""Generate token ids for one prompt or a batch of prompts.

Shapes: B prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from ..errors import ConfigError
from ..modeling.transformer import MiniMindForCausalLM
from .engine import Decoder, InferenceEngine
from .sampling import Sampling, choose

# Default of `generate`.
SAMPLING = Sampling()


def generate(
    model: MiniMindForCausalLM | Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling = SAMPLING,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    seed: int | None = None,
) -> list[list[int]]:
    """Return the token ids that continue each prompt, including a final stop token.

    A continuation is shorter than `max_new_tokens` after a stop token or at the model's last position. It is
    independent of the other prompts, up to float32 rounding.

    Args:
        model: used without dropout. Make an `InferenceEngine` for several calls, or long outputs on a GPU.
        prompts: token ids, at least one each; their lengths may differ.
        sampling: sampling parameters.
        max_new_tokens: maximum length of each continuation.
        stop_ids: tokens that end a continuation.
        seed: prompt i is sampled with `seed + i`, equally on every device; None uses a random seed.

    Raises:
        ConfigError: when a prompt is empty or as long as the model's positions.
    """
    steps = [*stream(model, prompts, sampling, max_new_tokens=max_new_tokens, stop_ids=stop_ids, seed=seed)]
    columns = ([tokens[number] for tokens in steps] for number in range(len(prompts)))
    return [[token for token in column if token is not None] for column in columns]


@torch.inference_mode()
def stream(
    model: MiniMindForCausalLM | Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling = SAMPLING,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    seed: int | None = None,
) -> Iterator[list[int | None]]:
    """Yield the next token of each prompt, None for one that has ended; see `generate`."""
    engine = InferenceEngine(model, capture=False) if isinstance(model, MiniMindForCausalLM) else model
    left = _new_tokens(prompts, engine.config.max_position_embeddings, max_new_tokens)
    if not prompts or max_new_tokens < 1:
        return
    uniform = _uniforms(len(prompts), max(left), seed).to(engine.device)
    seen = None
    if sampling.repetition_penalty != 1:
        seen = _seen(prompts, engine.config.vocab_size).to(engine.device)
    capacity = max(map(len, prompts)) + max(left)
    if isinstance(engine, InferenceEngine) and engine.has_fixed_step:
        steps = engine.decode(prompts, capacity, sampling, uniform, seen)
    else:
        steps = _decode(engine, prompts, capacity, sampling, uniform, seen)
    for tokens in steps:
        yield [token if count > 0 else None for token, count in zip(tokens, left, strict=True)]
        left = [0 if token in stop_ids else count - 1 for token, count in zip(tokens, left, strict=True)]
        if max(left) <= 0:
            return


def _decode(
    engine: Decoder,
    prompts: Sequence[Sequence[int]],
    capacity: int,
    sampling: Sampling,
    uniform: Tensor,
    seen: Tensor | None,
) -> Iterator[list[int]]:
    """Yield the next token of each sequence, one step at a time; see `InferenceEngine.decode`."""
    batch, logits = engine.begin(prompts, capacity)
    for number, drawn in enumerate(uniform, 1):
        chosen = choose(logits, sampling, seen, drawn)
        if seen is not None:
            seen.scatter_(1, chosen[:, None], True)
        yield chosen.tolist()
        if number < len(uniform):
            # Ended sequences are continued too, so that the batch keeps its shape.
            logits = engine.step(batch, chosen)


def _new_tokens(prompts: Sequence[Sequence[int]], positions: int, limit: int) -> list[int]:
    """Return the maximum number of tokens that can follow each prompt."""
    for prompt in prompts:
        if not prompt:
            raise ConfigError("the prompt is empty; start with at least the bos token.")
        if len(prompt) >= positions:
            raise ConfigError(
                f"the prompt has {len(prompt)} tokens, but the model has {positions} positions; "
                "shorten the prompt."
            )
    return [min(limit, positions - len(prompt)) for prompt in prompts]


def _uniforms(batch_size: int, count: int, seed: int | None) -> Tensor:
    """Return (count, B) random numbers in [0, 1), those of a sequence independent of the batch."""
    if seed is None:
        return torch.rand(count, batch_size, generator=_generator(None))
    draws = [torch.rand(count, generator=_generator(seed + number)) for number in range(batch_size)]
    return torch.stack(draws, dim=1)


def _generator(seed: int | None) -> torch.Generator:
    """Return a generator separate from the global one, so that other code is not affected."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
        return generator
    return generator.manual_seed(seed)


def _seen(prompts: Sequence[Sequence[int]], vocab_size: int) -> Tensor:
    """Return (B, V) bool: the tokens that occur in each prompt."""
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
    for sequence, prompt in zip(seen, prompts, strict=True):
        sequence[list(prompt)] = True
    return seen
