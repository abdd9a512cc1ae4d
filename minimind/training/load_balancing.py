"""The load of experts over all processes: a loss to balance it, numbers to show it.

Shapes: L blocks, E experts, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator

from ..config.options import PretrainConfig
from ..data.loader import MicroBatch
from ..data.packing import IGNORED
from ..modeling.moe import balance_loss


class ExpertBalance:
    """Collects what the routers chose in the micro-batches of a step. Without experts it does nothing.

    How often an expert was chosen is summed over all processes before the loss is made of it, so a
    micro-batch that several processes share is balanced as a whole: the gradient is that of one process with
    all the rows. Micro-batches that follow one another in accumulation are balanced each by itself, since the
    first has been through its backward pass before the last is routed; the loss is their mean, weighted by
    tokens.
    """

    def __init__(self, accelerator: Accelerator, config: PretrainConfig) -> None:
        self._accelerator = accelerator
        self._use_moe = config.use_moe
        self._experts_per_token = config.num_experts_per_tok
        self._coefficient = config.router_aux_loss_coef
        self._routing: torch.Tensor | None = None  # (L, 2, E) of this process in this micro-batch
        self._counts: torch.Tensor | None = None  # (L, E) of all micro-batches so far
        self._loss: torch.Tensor | None = None  # of all micro-batches so far, summed over tokens and blocks

    def inputs(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        """Return what the model has to be told besides the rows: which tokens are routed and counted.

        Those that have a target. Besides padding only the last token of a document has none, and nothing
        depends on what a block makes of that. So tokens weigh here as they do in the language loss.
        """
        return {"token_mask": batch.shift_labels != IGNORED} if self._use_moe else {}

    def note(self, routing: torch.Tensor | None) -> None:
        """Take what the routers chose in a micro-batch: (L, 2, E) as the model returns it."""
        self._routing = routing

    def added_to(self, loss: torch.Tensor) -> torch.Tensor:
        """Return a micro-batch's summed language loss with the weighted balancing loss of its tokens added.

        Every process must call this after `note`: the processes exchange counts.
        """
        routing, self._routing = self._routing, None
        if routing is None:
            return loss
        counts, sums = self._accelerator.reduce(routing.detach(), reduction="sum").unbind(1)
        whole = balance_loss(counts, sums, self._experts_per_token)
        self._counts = counts if self._counts is None else self._counts + counts
        self._loss = whole if self._loss is None else self._loss + whole
        return loss + self._coefficient * balance_loss(counts, routing[:, 1], self._experts_per_token)

    def sums(self) -> tuple[torch.Tensor, ...]:
        """Return a (1 + L·E,) float32 tensor on the device, or nothing without experts.

        The balancing loss of the step, summed over tokens and blocks, and how often each expert was chosen.
        Those of several steps may be added up; `expert_numbers` tells what they say. The host does not wait.
        """
        if self._counts is None or self._loss is None:
            return ()
        return (torch.cat((self._loss.reshape(1), self._counts.flatten())),)


def expert_numbers(
    sums: Sequence[float], *, num_experts: int, experts_per_token: int, num_targets: int
) -> dict[str, float]:
    """Return what is logged of the experts in one or several steps.

    `balance_loss` is that of a block per token, unweighted, K where all experts are chosen alike;
    `expert_load` the tokens of the busiest expert of any block as a multiple of the mean; `dropped_share` the
    share of tokens that no expert took.

    Args:
        sums: 1 + L·E numbers of `ExpertBalance.sums`, added up.
        num_experts: E.
        experts_per_token: K.
        num_targets: of those steps, over all processes.
    """
    loss, *counts = sums
    blocks = [counts[first : first + num_experts] for first in range(0, len(counts), num_experts)]
    tokens = max(num_targets, 1)
    return {
        "balance_loss": loss / (len(blocks) * tokens),
        "expert_load": max(max(block) * num_experts / max(sum(block), 1) for block in blocks),
        "dropped_share": 1 - min(map(sum, blocks)) / (experts_per_token * tokens),
    }
