"""Choose the next token from logits.

Each function matches the logits processor of that name in Hugging Face transformers, ties included, and they
are applied in the same order. Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.naming import flag_of
from ..errors import ConfigError

# Below this sampling is greedy, since divided logits would overflow.
_GREEDY_BELOW = 1e-20


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling parameters.

    Attributes:
        temperature: divides the logits; 0 is greedy decoding and ignores the next three.
        top_k: sample from this many most likely tokens; None samples from all.
        top_p: sample from the smallest set of most likely tokens whose probabilities reach this sum.
        min_p: sample from tokens at least this fraction as likely as the most likely one.
        repetition_penalty: above 1, makes tokens of the prompt and continuation less likely.

    Raises:
        ConfigError: for values out of range; all of them are listed.
    """

    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is chosen."""
        return self.temperature < _GREEDY_BELOW

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise ConfigError(problems)

    def _problems(self) -> Iterator[str]:
        checks = (
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or none"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "at least 0 and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
        )
        for name, valid, expected in checks:
            if not valid:
                yield f"{flag_of(name)} {getattr(self, name)} is out of range; it must be {expected}."


def choose(logits: Tensor, sampling: Sampling, seen: Tensor | None, uniform: Tensor) -> Tensor:
    """Return the next token of each sequence, (B,) int64.

    Args:
        logits: (B, V) float32.
        seen: (B, V) bool, tokens that occur in the sequence; used by the repetition penalty only.
        uniform: (B,) uniform random numbers in [0, 1).
    """
    if sampling.repetition_penalty != 1 and seen is not None:
        logits = penalize_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.greedy:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        logits = keep_min_p(logits, sampling.min_p)
    return draw(logits, uniform)


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive logits of seen tokens by `penalty` and multiply negative ones (Keskar et al. 2019)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Set all but the `k` largest logits, and those equal to the last of them, to -∞."""
    smallest = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Set the logits of the least likely tokens that together reach no more than 1 - p to -∞."""
    ascending, order = logits.sort(dim=-1)
    drop = ascending.softmax(-1).cumsum(-1) <= 1 - p
    drop[..., -1] = False
    return logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Set the logits of tokens less likely than `p` times the most likely one to -∞."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -torch.inf)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Return tokens sampled by inverting the cumulative distribution at `uniform`, (B,) int64."""
    probabilities = logits.softmax(-1)
    sums = probabilities.cumsum(-1)
    token = torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True)
    token = token.clamp(max=logits.shape[-1] - 1)
    # Rounding of the float32 sums may select a token of probability 0.
    possible = probabilities.gather(-1, token) > 0
    return torch.where(possible, token, probabilities.argmax(-1, keepdim=True))[:, 0]
