"""Load-balancing loss over all ranks, and metrics of expert utilization.

Shapes: L layers, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator

from ..data.loader import MicroBatch
from ..data.packing import IGNORED
from ..modeling.config import MiniMindConfig
from ..modeling.moe import balance_loss


def expert_balance(accelerator: Accelerator, model_config: MiniMindConfig) -> ExpertBalance | None:
    """Return the load balancing of one step, None for a model without experts."""
    if not model_config.use_moe:
        return None
    return ExpertBalance(accelerator, model_config.num_experts_per_tok, model_config.router_aux_loss_coef)


class ExpertBalance:
    """Collects what the routers chose in the micro-batches of one step.

    The counts of chosen experts are summed over all ranks before the loss is computed, so a micro-batch that
    is divided among ranks is balanced as a whole: the gradient is that of one process with all sequences.
    Micro-batches of gradient accumulation are balanced one by one, because the backward pass of the first
    comes before the forward pass of the last; the loss is their mean, weighted by tokens.
    """

    def __init__(self, accelerator: Accelerator, experts_per_token: int, coefficient: float) -> None:
        self._accelerator = accelerator
        self._experts_per_token = experts_per_token
        self._coefficient = coefficient
        self._routing: torch.Tensor | None = None  # (L, 2, E) of this rank in this micro-batch
        self._counts: torch.Tensor | None = None  # (L·E,) of all micro-batches so far
        self._loss: torch.Tensor | None = None  # of all micro-batches so far, summed over tokens and layers

    def empty(self) -> ExpertBalance:
        """Return one of the same options that has recorded nothing."""
        return ExpertBalance(self._accelerator, self._experts_per_token, self._coefficient)

    def inputs(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        """Return the mask of the tokens that are routed and counted: those that have a target.

        Besides padding only the last token of a document has none, and nothing depends on its output. So
        tokens have the same weight here as in the language-model loss.
        """
        return {"token_mask": batch.shift_labels != IGNORED}

    def note(self, routing: torch.Tensor | None) -> None:
        """Record what the routers chose in a micro-batch: (L, 2, E) as the model returns it."""
        self._routing = routing

    def added_to(self, loss: torch.Tensor) -> torch.Tensor:
        """Return a micro-batch's summed loss plus the weighted load-balancing loss of its tokens.

        A collective: every rank must call it after `note`.
        """
        routing, self._routing = self._routing, None
        if routing is None:
            return loss
        counts, sums = self._accelerator.reduce(routing.detach(), reduction="sum").unbind(1)
        whole = balance_loss(counts, sums, self._experts_per_token)
        self.add(torch.cat((whole.detach().reshape(1), counts.flatten())))
        return loss + self._coefficient * balance_loss(counts, routing[:, 1], self._experts_per_token)

    def add(self, sums: torch.Tensor) -> None:
        """Record a micro-batch by the (1 + L·E,) sums of an ExpertBalance that saw no other."""
        loss, counts = sums[0], sums[1:]
        self._counts = counts if self._counts is None else self._counts + counts
        self._loss = loss if self._loss is None else self._loss + loss

    def sums(self) -> tuple[torch.Tensor, ...]:
        """Return a (1 + L·E,) float32 tensor on the device, or nothing before the first micro-batch.

        The load-balancing loss of the step, summed over tokens and layers, and the count of each expert.
        Sums of several steps add up; `expert_metrics` converts them. No host synchronization.
        """
        if self._counts is None or self._loss is None:
            return ()
        return (torch.cat((self._loss.reshape(1), self._counts)),)


def expert_metrics(
    sums: Sequence[float], *, num_experts: int, experts_per_token: int, num_targets: int
) -> dict[str, float]:
    """Return the metrics of experts over one or several steps.

    `balance_loss` is the unweighted loss per token and layer, K where all experts are chosen equally often;
    `expert_load` the tokens of the busiest expert of any layer as a multiple of the mean; `dropped_share` the
    share of tokens without an expert.

    Args:
        sums: 1 + L·E numbers of `ExpertBalance.sums`, added over the steps.
        num_targets: targets in those steps, over all ranks.
    """
    loss, *counts = sums
    layers = [counts[first : first + num_experts] for first in range(0, len(counts), num_experts)]
    tokens = max(num_targets, 1)
    return {
        "balance_loss": loss / (len(layers) * tokens),
        "expert_load": max(max(layer) * num_experts / max(sum(layer), 1) for layer in layers),
        "dropped_share": 1 - min(map(sum, layers)) / (experts_per_token * tokens),
    }
