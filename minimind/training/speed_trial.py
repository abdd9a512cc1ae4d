"""A model that is trained on made-up text for a moment, to see how fast micro-batches of some size are."""

from __future__ import annotations

import gc
import math
import time
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..config.options import PretrainConfig
from ..data.batch_plan import BatchPlan
from ..data.loader import Loader, MicroBatch
from ..data.shards import TokenShards
from .load_balancing import ExpertBalance
from .trainer import forward_loss

# Share of a GPU's memory that may be used: a run evaluates and talks to other processes besides.
USABLE_MEMORY = 0.92
# Each micro-batch is timed so often, but no longer than so many seconds; the shortest counts.
ROUNDS = 5
ROUNDS_LIMIT = 3.0
# How devices say that memory is short.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")


class SpeedTrial:
    """Times micro-batches forward and back, on this process alone.

    Gradients are not exchanged: a process that runs out of memory must not leave the others waiting.

    Attributes:
        shards: the text; set before the first measurement.
    """

    shards: TokenShards

    def __init__(
        self,
        config: PretrainConfig,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._config, self._accelerator = config, accelerator
        self._model: Any = model.train()
        # Bare: the scaler of fp16 must not learn from this.
        self._optimizer: Any = getattr(optimizer, "optimizer", optimizer)

    def seconds(self, size: int) -> float:
        """Return the time of a micro-batch of so many rows; infinite where it does not fit."""
        try:
            return self._seconds(size)
        except RuntimeError as error:
            if not any(words in str(error).lower() for words in OUT_OF_MEMORY):
                raise
            return math.inf
        finally:
            self._optimizer.zero_grad()
            if self._accelerator.device.type == "cuda":
                torch.cuda.empty_cache()

    def _seconds(self, size: int) -> float:
        device = self._accelerator.device
        loader = Loader(
            self.shards,
            seq_len=self._config.max_seq_len,
            packing=self._config.packing,
            plan=BatchPlan(size, 1, 1),
            seed=0,
            process_index=0,
            device=device,
        )
        (batch,) = loader.step(0, 0).micro_batches
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        # Compiles, and fills the memory that the optimizer keeps.
        self._timed_round(batch)
        self._optimizer.step()
        times = [self._timed_round(batch)]
        while len(times) < ROUNDS and sum(times) < ROUNDS_LIMIT:
            times.append(self._timed_round(batch))
        if device.type == "cuda":
            memory = torch.cuda.get_device_properties(device).total_memory
            if torch.cuda.max_memory_reserved(device) > USABLE_MEMORY * memory:
                return math.inf
        return min(times)

    def _timed_round(self, batch: MicroBatch) -> float:
        self._synchronize()
        began = time.perf_counter()
        with self._accelerator.no_sync(self._model):
            # Without what balances experts: processes would have to do the same rounds to exchange counts.
            loss = forward_loss(self._model, batch, ExpertBalance(self._accelerator, self._config))
            self._accelerator.backward(loss / batch.shift_labels.numel())
        self._synchronize()
        return time.perf_counter() - began

    def _synchronize(self) -> None:
        if self._accelerator.device.type != "cpu":
            torch.accelerator.synchronize()

    def close(self, *, compiled: bool) -> None:
        """Give memory and compiled code back, so that the run begins as if there had been no trial."""
        self._model = self._optimizer = None
        self._accelerator.free_memory()
        gc.collect()
        if compiled:
            torch._dynamo.reset()
        if self._accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._accelerator.device)
