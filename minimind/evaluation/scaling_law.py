"""Forecast of validation bits per byte from model size and amount of text, fitted to runs of this project.

The law is L = s·(V/6400)^-v / (1/U + 1/(E + A/N^a + B/D^b)): N parameters inside the blocks, D bytes of text,
with repeated text discounted, V entries of the vocabulary, and s the difficulty of the text, from what a
bigram model reaches on it. The sum is that of Hoffmann et al. 2022 (arXiv:2203.15556). U is where a model of
no size or no text would begin, without which the sum is far off for the smallest runs.
benchmarks/fit_scaling_law.py writes the constants with their provenance.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

LAW = Path(__file__).parents[1] / "assets" / "scaling_law" / "law.json"
# Of the interval that contains 90% of the forecasts, if residuals are normally distributed.
_DEVIATIONS = 1.645
# Entries of the tokenizer in the package.
REFERENCE_VOCABULARY = 6400
# Bounds of what the rest of a run gains: as a share of the loss, and in units of d. No run that was measured
# is near them.
_LARGEST_GAIN, _SMALLEST_GAIN = 0.4, 0.1
# Token before the first of a document.
_START = -1


@dataclass(frozen=True)
class Forecast:
    """Final validation bits per byte of a run.

    Attributes:
        bits_per_byte: the expected value.
        low: lower end of the interval of 90%.
        high: its upper end.
    """

    bits_per_byte: float
    low: float
    high: float

    @classmethod
    def of(cls, bits_per_byte: float, sigma: float) -> Forecast:
        """Return a forecast with the standard deviation of its logarithm."""
        factor = math.exp(_DEVIATIONS * sigma)
        return cls(bits_per_byte, bits_per_byte / factor, bits_per_byte * factor)

    @property
    def text(self) -> str:
        """The forecast for people, such as `1.62 (1.56 to 1.68)`."""
        return f"{self.bits_per_byte:.3f} ({self.low:.2f} to {self.high:.2f})"


class Difficulty(NamedTuple):
    """How hard data is to predict, by a bigram model.

    Attributes:
        bits: bits per byte of a model that counts 1 MB.
        slope: exponent of the bytes counted with which they fall.
        documents: effective number of documents that were predicted, (Σ bytes)² / Σ bytes² (Kish 1965).
    """

    bits: float
    slope: float
    documents: float = math.inf

    def at(self, num_bytes: float) -> float:
        """Return s for D bytes: models learn faster where the bigram model does.

        Relative to documentation, whose slope the constants of the law contain. Far beyond what the bigram
        model counts the difference is unknown, and text that is repeated adds nothing to it.
        """
        slope = min(max(self.slope, _SLOPES[0]), _SLOPES[1])
        return self.bits * (min(max(num_bytes, 1.0), _MOST_BYTES) / _COUNTED_BYTES) ** (TYPICAL.slope - slope)


# Documentation in English.
TYPICAL = Difficulty(2.5, 0.073)
# The slopes of data in English and Chinese and of Python were from 0.04 to 0.1.
_SLOPES = (0.03, 0.12)
_COUNTED_BYTES, _MOST_BYTES = 1e6, 3e6
# Standard deviation over documents of the logarithm of a model's bits per byte over those of a bigram model:
# 1,266 documents of documentation packages, a model of 0.7M parameters.
_DOCUMENT_SPREAD = 0.155


@dataclass(frozen=True)
class ScalingLaw:
    """The constants of the law, and how far off it was.

    Attributes:
        beginning: U.
        floor: E.
        size: A and a.
        text: B and b.
        vocabulary: v.
        sigma: standard deviation of log L before the start, on data that the fit did not see.
        gain_slope: g, see `gain`.
        curve: at shares of a run, d of `gain`, and the standard deviation of the forecast from there in
            bits/byte; ascending.
    """

    beginning: float
    floor: float
    size: tuple[float, float]
    text: tuple[float, float]
    vocabulary: float
    sigma: float
    gain_slope: float
    curve: tuple[tuple[float, float, float], ...]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ScalingLaw:
        """Return the law that `to_dict` described; other keys are its provenance."""
        return cls(
            beginning=values["U"],
            floor=values["E"],
            size=(values["A"], values["a"]),
            text=(values["B"], values["b"]),
            vocabulary=values["v"],
            sigma=values["sigma"],
            gain_slope=values["g"],
            curve=tuple(tuple(point) for point in values["curve"]),
        )

    def relative(self, parameters: float, num_bytes: float, vocab_size: int = REFERENCE_VOCABULARY) -> float:
        """Return L/s of a finished run.

        Args:
            parameters: N.
            num_bytes: D.
            vocab_size: V.
        """
        (a_factor, a), (b_factor, b) = self.size, self.text
        power_law = self.floor + a_factor * parameters**-a + b_factor * max(num_bytes, 1.0) ** -b
        reached = 1 / (1 / self.beginning + 1 / power_law)
        return reached * (vocab_size / REFERENCE_VOCABULARY) ** -self.vocabulary

    def before_start(
        self, parameters: float, num_bytes: float, vocab_size: int, difficulty: Difficulty | None
    ) -> Forecast:
        """Return the forecast of a run that has not begun; of unknown difficulty a wide one."""
        relative = self.relative(parameters, num_bytes, vocab_size)
        scale = (difficulty or TYPICAL).at(num_bytes)
        documents = difficulty.documents if difficulty else math.inf
        sigma = math.hypot(self.sigma if difficulty else 5 * self.sigma, _DOCUMENT_SPREAD / documents**0.5)
        return Forecast.of(scale * relative, sigma)

    def during(self, parameters: float, *, observed: float, num_bytes: float, share: float) -> Forecast:
        """Return the forecast from an evaluation on the way.

        Args:
            parameters: N.
            observed: bits per byte of the evaluation.
            num_bytes: D of the whole run.
            share: of the run that is done, from 0 to 1.
        """
        d, sigma = self._on_curve(share)
        final = observed - min(d * self.gain(parameters, num_bytes), _LARGEST_GAIN * observed)
        return Forecast(final, max(final - _DEVIATIONS * sigma, 0.0), final + _DEVIATIONS * sigma)

    def gain(self, parameters: float, num_bytes: float) -> float:
        """Return 1 - g ln(D/N): the bits/byte that the rest of a run gains, up to d.

        It was about the same for text of any difficulty and any number of epochs, from 0.2M to 350M
        parameters; with more text per parameter it is smaller. The factor d depends on the share of the run
        that is done.
        """
        bytes_per_parameter = max(num_bytes, 1.0) / max(parameters, 1.0)
        return max(1 - self.gain_slope * math.log(bytes_per_parameter), _SMALLEST_GAIN)

    def _on_curve(self, share: float) -> tuple[float, float]:
        """Return d at a share of a run, and the deviation of the forecast from there in bits/byte."""
        start, *values = self.curve[0]
        for end, *following in self.curve:
            if end >= share:
                weight = (share - start) / (end - start) if end > start else 0.0
                values = [a + weight * (b - a) for a, b in zip(values, following, strict=True)]
                break
            start, values = end, following
        return values[0], values[1]


@cache
def packaged_law() -> ScalingLaw:
    """Return the law in the package."""
    return ScalingLaw.from_dict(json.loads(LAW.read_text(encoding="utf-8")))


def bigram_bits(
    training: Iterable[Sequence[int]], held_out: Iterable[Sequence[int]], num_bytes: int
) -> float:
    """Return the bits per byte of a bigram model on held-out documents.

    The model is interpolated by the method of Witten and Bell (1991, IEEE Trans. Inf. Theory 37(4)): the
    more different tokens have followed one, the more likely is a token that has not.

    Args:
        training: token ids of the documents that are counted.
        held_out: those of the documents to predict.
        num_bytes: UTF-8 bytes of the latter.
    """
    pairs = Counter(pair for ids in training for pair in zip((_START, *ids), ids, strict=False))
    before: Counter[int] = Counter()
    followers: Counter[int] = Counter()
    tokens: Counter[int] = Counter()
    for (first, second), number in pairs.items():
        before[first] += number
        followers[first] += 1
        tokens[second] += number
    total, kinds = tokens.total(), max(len(tokens), 1)
    bits = 0.0
    for ids in held_out:
        for pair in zip((_START, *ids), ids, strict=False):
            first, second = pair
            alone = (tokens[second] + kinds / REFERENCE_VOCABULARY) / (total + kinds)
            new = followers[first]
            probability = (pairs[pair] + new * alone) / (before[first] + new) if new else alone
            bits -= math.log2(probability)
    return bits / max(num_bytes, 1)
