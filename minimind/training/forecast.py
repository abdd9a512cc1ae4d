"""Forecast of a run's final validation bits per byte, from its evaluations on the way."""

from __future__ import annotations

from ..config.recipe import effective_tokens
from ..data.prepare import PreparedData
from ..evaluation.scaling_law import Forecast, ScalingLaw, packaged_law
from ..modeling.config import MiniMindConfig


class RunForecast:
    """Extrapolates evaluations with the scaling law.

    Args:
        model_config: of the run.
        unique_tokens: of the training text.
        bytes_per_token: of the training text.
        law: how loss falls with the text seen.
    """

    def __init__(
        self,
        model_config: MiniMindConfig,
        *,
        unique_tokens: float,
        bytes_per_token: float,
        law: ScalingLaw | None = None,
    ) -> None:
        embedding = model_config.vocab_size * model_config.hidden_size
        self._parameters = model_config.num_active_parameters() - embedding * (
            1 if model_config.tie_word_embeddings else 2
        )
        self._unique_tokens, self._bytes_per_token = unique_tokens, bytes_per_token
        self._law = packaged_law() if law is None else law

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
            bytes_done=self._worth(tokens),
            num_bytes=self._worth(tokens / share),
            share=share,
        )

    def _worth(self, tokens: float) -> float:
        """Return the bytes of new text that tokens of some epochs are worth."""
        return effective_tokens(tokens, self._unique_tokens) * self._bytes_per_token


def run_forecast(model_config: MiniMindConfig, data: PreparedData) -> RunForecast | None:
    """Return the forecast of a run; None without validation data."""
    if data.validation is None:
        return None
    tokens = data.train.num_tokens
    text_bytes = data.report.train.amount.text_bytes
    return RunForecast(model_config, unique_tokens=tokens, bytes_per_token=text_bytes / tokens)
