"""Validation of a run: the batches of its validation split, evaluated with the model in training."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from ..data.loader import evaluation_batches
from ..data.shards import TokenShards
from ..distributed.shutdown import StopRequest
from ..evaluation.validation import Evaluation, evaluate
from .setup import RunInputs, TrainingParts


class Evaluator:
    """Evaluates the model of a run on its validation split; every rank must call it."""

    def __init__(
        self, shards: TokenShards, inputs: RunInputs, parts: TrainingParts, accelerator: Accelerator
    ) -> None:
        """Read nothing yet; `shards` holds the tokens of the validation split."""
        self._shards, self._inputs, self._parts, self._accelerator = shards, inputs, parts, accelerator
        tokenizer = inputs.tokenizer
        # The vocabulary of the model may exceed the tokenizer's.
        table = torch.zeros(inputs.model_config.vocab_size)
        table[: tokenizer.vocab_size] = torch.from_numpy(shards.bytes_per_token(tokenizer))
        self._bytes_per_token = table.to(accelerator.device)

    def evaluate(self, max_batches: int | None, stop: StopRequest | None = None) -> Evaluation | None:
        """Return the validation loss, None where some rank was asked to stop meanwhile.

        Args:
            max_batches: size of a fixed sample of the split, in batches of an optimizer step; None for all.
            stop: requests that end the evaluation early.
        """
        config, plan = self._inputs.config, self._parts.plan
        batches = evaluation_batches(
            self._shards,
            seq_len=config.max_seq_len,
            packing=config.packing,
            batch_size=plan.micro_batch_size,
            process_index=self._accelerator.process_index,
            num_processes=self._accelerator.num_processes,
            device=self._accelerator.device,
            max_sequences=None if max_batches is None else max_batches * plan.global_batch_size,
            pad_token_id=self._inputs.tokenizer.pad_token_id,
        )
        return evaluate(
            self._parts.model,
            batches,
            self._bytes_per_token,
            self._accelerator,
            asked_to_stop=lambda: stop is not None and stop.reason is not None,
        )
