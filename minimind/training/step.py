"""One optimizer step: forward and backward pass of each micro-batch, gradient clipping, update."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..data.loader import MicroBatch, StepBatch
from ..distributed.shutdown import StopRequest
from ..optim.build import skip_if_nonfinite
from .cuda_graph import StepGraphs
from .load_balancing import ExpertBalance
from .step_timer import PhaseMarks, StepTimer


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: StepBatch,
    accelerator: Accelerator,
    *,
    grad_clip: float,
    loss_limit: float = math.inf,
    balance: ExpertBalance | None = None,
    graphs: StepGraphs | None = None,
    stop: StopRequest | None = None,
    decay_steps: int = 0,
    timer: StepTimer | None = None,
) -> torch.Tensor:
    """Do one optimizer step. The update is skipped where the loss or the gradient is not finite.

    The loss is the mean over the targets of the global batch. `Accelerator.backward` divides by the
    accumulation steps and DDP averages gradients over ranks, so the summed loss of a micro-batch is
    multiplied by both and divided by the number of targets of the step, which every rank knows. The
    load-balancing loss is scaled in the same way and is part of the gradient, but not of the returned loss.

    Args:
        optimizer: prepared; its learning rate is set.
        grad_clip: maximum norm of the gradient; 0 for no clipping.
        loss_limit: summed loss above which the update is skipped too.
        balance: load balancing of this step; None for a model without experts.
        graphs: of the step; None to run it eagerly.
        stop: whether this rank was asked to stop.
        decay_steps: steps that this rank asks to decay from now on; 0 for none.
        timer: gets the times of `forward`, `backward` and `optimizer`.

    Returns:
        (4,) float32 on the device: the loss summed over all ranks, the number of ranks that were asked to
        stop, the sum of `decay_steps`, and the norm of the gradient before clipping; with experts
        (5 + L·E,), followed by `ExpertBalance.sums`.
    """
    scale = accelerator.num_processes * len(batch.micro_batches) / max(batch.num_targets, 1)
    loss_sum = torch.zeros((), device=accelerator.device)
    for micro_batch in batch.micro_batches:
        with accelerator.accumulate(model):
            if timer is not None:
                timer.start()
            if graphs is not None:
                loss_sum += graphs.forward_backward(micro_batch, scale, balance, timer)
            else:
                loss_sum += forward_backward(model, micro_batch, scale, accelerator, balance, timer)
            if accelerator.sync_gradients:
                if timer is not None:
                    timer.start()
                # Requests of single ranks ride along, so that all ranks read them at the same step.
                asked = torch.full_like(loss_sum, float(stop is not None and stop.reason is not None))
                decay = torch.full_like(loss_sum, float(decay_steps))
                sums = accelerator.reduce(torch.stack((loss_sum, asked, decay)), reduction="sum")
                if graphs is not None and graphs.update is not None:
                    values = graphs.update(sums, loss_limit)
                else:
                    values = update(model, optimizer, sums, accelerator, grad_clip, loss_limit)
            optimizer.zero_grad()
    if timer is not None:
        timer.mark("optimizer")
    return values if balance is None else torch.cat((values, *balance.sums()))


def forward_backward(
    model: nn.Module,
    batch: MicroBatch,
    scale: float | torch.Tensor,
    accelerator: Accelerator,
    balance: ExpertBalance | None = None,
    timer: PhaseMarks | None = None,
) -> torch.Tensor:
    """Run forward and backward on a micro-batch, which accumulates the gradients of the parameters.

    Args:
        scale: factor of the loss whose gradient is taken.
        balance: load balancing of this step; None for a model without experts.
        timer: marks the end of `forward` and of `backward`.

    Returns:
        The cross-entropy summed over the targets, a float32 scalar.
    """
    loss = forward_loss(model, batch, balance)
    if timer is not None:
        timer.mark("forward")
    accelerator.backward((loss if balance is None else balance.added_to(loss)) * scale)
    if timer is not None:
        timer.mark("backward")
    return loss.detach()


def forward_loss(model: nn.Module, batch: MicroBatch, balance: ExpertBalance | None = None) -> torch.Tensor:
    """Return the cross-entropy of a micro-batch summed over its targets, a float32 scalar.

    With experts, `balance` selects the tokens to route and records what the routers chose.
    """
    # The constant 1 keeps the compiled graph the same for every count of targets.
    output = model(
        input_ids=batch.input_ids,
        shift_labels=batch.shift_labels,
        document_ids=batch.document_ids,
        position_ids=batch.position_ids,
        num_items_in_batch=1,
        **(balance.inputs(batch) if balance is not None else {}),
    )
    if balance is not None:
        # A subclass may return no routing.
        balance.note(getattr(output, "routing", None))
    return output.loss


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sums: torch.Tensor,
    accelerator: Accelerator,
    grad_clip: float,
    loss_limit: float | torch.Tensor,
) -> torch.Tensor:
    """Clip the gradient and update the weights, unless loss or gradient is not finite or the loss too high.

    Args:
        sums: (3,) float32, the first of which is the loss summed over all ranks.
        grad_clip: maximum norm of the gradient; 0 for no clipping.
        loss_limit: highest summed loss that is not skipped.

    Returns:
        (4,) float32: `sums` and the norm of the gradient before clipping.
    """
    norm = clip_gradient(model, optimizer, accelerator, grad_clip)
    skip_if_nonfinite(optimizer, norm, sums[0], limit=loss_limit)
    optimizer.step()
    return torch.cat((sums, norm.float().reshape(1)))


def clip_gradient(
    model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator, grad_clip: float
) -> torch.Tensor:
    """Clip the gradient in place and return its norm before clipping, the same on every rank.

    Gradients that belong to other ranks, as those of Muon's matrices under DDP, are neither read nor clipped.

    Args:
        optimizer: whose attribute `owners`, if it has one, gives the rank of a parameter by its id.
        grad_clip: maximum norm; 0 for no clipping.
    """
    limit = grad_clip or math.inf
    owners: Mapping[int, int] = getattr(getattr(optimizer, "optimizer", optimizer), "owners", {})
    if not owners:
        norm = accelerator.clip_grad_norm_(model.parameters(), limit)
        # Under FSDP2 the norm is a DTensor; gathering it is a collective that every rank takes part in.
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    accelerator.unscale_gradients()
    parameters = [p for p in model.parameters() if p.grad is not None]
    own = [p for p in parameters if owners.get(id(p)) == accelerator.process_index]
    replicated = [p for p in parameters if id(p) not in owners]

    def square(some: list[nn.Parameter]) -> torch.Tensor:
        if not some:
            return torch.zeros((), device=accelerator.device)
        return get_total_norm([p.grad for p in some]).square()  # type: ignore[misc]

    norm = (accelerator.reduce(square(own), reduction="sum") + square(replicated)).sqrt()
    clip_grads_with_norm_([*own, *replicated], limit, norm)
    return norm
