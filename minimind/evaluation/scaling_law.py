"""Forecast of validation bits per byte from model size and amount of text, fitted to runs of this project.

The law is L = s·(V/6400)^-v·(E + A/N^a + B/D^b), after Hoffmann et al. 2022 (arXiv:2203.15556): N parameters
inside the blocks, D bytes of text, with repeated text discounted, V entries of the vocabulary, and s the
difficulty of the text, by default from the entropy of its tokens. benchmarks/fit_scaling_law.py writes the
constants with their provenance.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

LAW = Path(__file__).parents[1] / "assets" / "scaling_law" / "law.json"
# Of the interval that contains 90% of the forecasts, if residuals are normally distributed.
_DEVIATIONS = 1.645
# Entries of the tokenizer in the package.
REFERENCE_VOCABULARY = 6400


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


@dataclass(frozen=True)
class ScalingLaw:
    """The constants of the law, and how far off it was.

    Attributes:
        floor: E.
        size: A and a.
        text: B and b.
        vocabulary: v.
        difficulty: s is the first of these plus the second times the unigram bits per byte.
        sigma: standard deviation of log L before the start, on texts that were left out of the fit.
        curve: at shares of a run, how far log L lies above the law of a finished run, and the standard
            deviation of the forecast from there; ascending.
    """

    floor: float
    size: tuple[float, float]
    text: tuple[float, float]
    vocabulary: float
    difficulty: tuple[float, float]
    sigma: float
    curve: tuple[tuple[float, float, float], ...]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ScalingLaw:
        """Return the law that `to_dict` described; other keys are its provenance."""
        return cls(
            floor=values["E"],
            size=(values["A"], values["a"]),
            text=(values["B"], values["b"]),
            vocabulary=values["v"],
            difficulty=tuple(values["difficulty"]),
            sigma=values["sigma"],
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
        reached = self.floor + a_factor * parameters**-a + b_factor * max(num_bytes, 1.0) ** -b
        return reached * (vocab_size / REFERENCE_VOCABULARY) ** -self.vocabulary

    def scale(self, unigram_bits: float | None) -> float:
        """Return s of a text by its unigram bits per byte; that of typical text where None."""
        first, slope = self.difficulty
        return max(first + slope * unigram_bits, 0.05) if unigram_bits is not None else 1.0

    def before_start(
        self, parameters: float, num_bytes: float, vocab_size: int, unigram_bits: float | None
    ) -> Forecast:
        """Return the forecast of a run that has not begun; without `unigram_bits` a wide one."""
        sigma = self.sigma if unigram_bits is not None else 2 * self.sigma
        relative = self.relative(parameters, num_bytes, vocab_size)
        return Forecast.of(self.scale(unigram_bits) * relative, sigma)

    def during(
        self, parameters: float, *, observed: float, bytes_done: float, num_bytes: float, share: float
    ) -> Forecast:
        """Return the forecast from an evaluation on the way: it gives the difficulty of the text.

        Args:
            parameters: N.
            observed: bits per byte of the evaluation.
            bytes_done: D up to the evaluation.
            num_bytes: D of the whole run.
            share: of the run that is done, from 0 to 1.
        """
        above, sigma = self._on_curve(share)
        expected = self.relative(parameters, bytes_done) * math.exp(above)
        return Forecast.of(observed * self.relative(parameters, num_bytes) / expected, sigma)

    def _on_curve(self, share: float) -> tuple[float, float]:
        """Return how far log L lies above the law at a share of a run, and the deviation from there."""
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


def unigram_bits(ids: Iterable[Sequence[int]], num_bytes: int) -> float:
    """Return the entropy of the tokens of some documents, in bits per byte of their text.

    The measure of a text's difficulty: what a model without context would reach.

    Args:
        ids: token ids of each document.
        num_bytes: UTF-8 bytes of all documents.
    """
    counts = Counter(token for document in ids for token in document)
    total = counts.total()
    entropy = -sum(n * math.log2(n / total) for n in counts.values())
    return entropy / max(num_bytes, 1)
