"""Validation of a run: the batches of its validation split, evaluated with the model in training."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

from ..data.batch_plan import BatchPlan
from ..data.loader import evaluation_batches
from ..data.shards import TokenShards
from ..distributed.shutdown import StopRequest
from ..evaluation.validation import Evaluation, evaluate
from ..tokenizer import Tokenizer


class Evaluator:
    """Evaluates the model of a run on its validation split; every rank must call it."""

    def __init__(
        self,
        shards: TokenShards,
        model: nn.Module,
        accelerator: Accelerator,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        seq_len: int,
        packing: bool,
        plan: BatchPlan,
    ) -> None:
        """Read nothing yet.

        Args:
            shards: tokens of the validation split.
            tokenizer: gives the bytes of each token, and the padding token.
            vocab_size: V of the model, which may exceed the tokenizer's.
            packing: as in training.
            plan: of training.
        """
        self._shards, self._model, self._accelerator = shards, model, accelerator
        self._seq_len, self._packing, self._plan = seq_len, packing, plan
        self._pad_token_id = tokenizer.pad_token_id
        table = torch.zeros(vocab_size)
        table[: tokenizer.vocab_size] = torch.from_numpy(shards.bytes_per_token(tokenizer))
        self._bytes_per_token = table.to(accelerator.device)

    def evaluate(self, max_batches: int | None, stop: StopRequest | None = None) -> Evaluation | None:
        """Return the validation loss, None where some rank was asked to stop meanwhile.

        Args:
            max_batches: size of a fixed sample of the split, in batches of an optimizer step; None for all.
            stop: requests that end the evaluation early.
        """
        batches = evaluation_batches(
            self._shards,
            seq_len=self._seq_len,
            packing=self._packing,
            batch_size=self._plan.micro_batch_size,
            process_index=self._accelerator.process_index,
            num_processes=self._accelerator.num_processes,
            device=self._accelerator.device,
            max_sequences=None if max_batches is None else max_batches * self._plan.global_batch_size,
            pad_token_id=self._pad_token_id,
        )
        return evaluate(
            self._model,
            batches,
            self._bytes_per_token,
            self._accelerator,
            asked_to_stop=lambda: stop is not None and stop.reason is not None,
        )
