"""Forecast of a run's final validation bits per byte, from its evaluations on the way."""

from __future__ import annotations

from ..config.recipe import effective_tokens
from ..data.prepare import PreparedData
from ..evaluation.scaling_law import Forecast, packaged_law
from ..modeling.config import MiniMindConfig


class RunForecast:
    """Extrapolates the evaluations of a run with the scaling law."""

    def __init__(self, model_config: MiniMindConfig, data: PreparedData) -> None:
        embedding = model_config.vocab_size * model_config.hidden_size
        self._parameters = model_config.num_active_parameters() - embedding * (
            1 if model_config.tie_word_embeddings else 2
        )
        self._unique_tokens = data.train.num_tokens
        self._bytes_per_token = data.report.train.amount.text_bytes / data.train.num_tokens
        self._law = packaged_law()

    def after(self, bits_per_byte: float, *, tokens: float, share: float) -> Forecast | None:
        """Return the forecast from an evaluation; None before the first and after the last step.

        Args:
            bits_per_byte: of the evaluation.
            tokens: trained on so far.
            share: of the steps that are done.
        """
        if not 0 < share < 1 or not tokens:
            return None
        return self._law.during(
            self._parameters,
            observed=bits_per_byte,
            num_bytes=effective_tokens(tokens / share, self._unique_tokens) * self._bytes_per_token,
            share=share,
        )
