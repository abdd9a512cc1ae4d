"""The optimizer set up for a model, and the two things a step asks of an optimizer beside stepping."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..config.options import LEARNING_RATES, PretrainConfig
from .muon import Muon

# Where the fused kernel exists and leaves everything alone when told so on the device; see
# skip_if_nonfinite.
FUSED_DEVICES = ("cuda", "cpu")

# Matrices whose rows are choices, by their Hugging Face names: of the output tokens, like the rows of an
# embedding, and of a router experts.
OUTPUT = "lm_head."
ROUTER = ".mlp.gate.weight"
# Beside Muon a router learns as fast as it would with AdamW for all: faster, it swings from expert to expert.
ROUTER_SCALE = LEARNING_RATES["adamw"] / LEARNING_RATES["muon"]


def build_optimizer(
    model: nn.Module, config: PretrainConfig, device: torch.device | str, *, kernels: bool = False
) -> torch.optim.Optimizer:
    """Return the optimizer of --optimizer over the trainable parameters of `model`, in at most four groups.

    Weight decay acts on matrices; embeddings, norms and other parameters of fewer than two dimensions have
    none. An embedding that is also the output matrix counts as an embedding, once. Muon updates the hidden
    matrices, that is all but embeddings, output and the routers of experts, and AdamW the rest. The output is
    what `get_output_embeddings` of the model returns, else `lm_head`. Experts count one by one, though they
    are stacked. Each group lists its parameter names under `param_names`.

    Args:
        model: before Accelerate wraps it, so that names are those of the plain model.
        config: optimizer, learning rate, weight decay and betas.
        device: where the parameters will be when the optimizer steps.
        kernels: the run is one that builds kernels, so the optimizer may too.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    output = getattr(model, "get_output_embeddings", lambda: None)()
    outputs = {id(parameter) for parameter in output.parameters()} if output is not None else set()
    muon = config.optimizer == "muon"
    hidden: list[tuple[str, nn.Parameter]] = []
    routers: list[tuple[str, nn.Parameter]] = []
    decayed: list[tuple[str, nn.Parameter]] = []
    others: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or id(parameter) in embeddings:
            others.append((name, parameter))
        elif not muon or id(parameter) in outputs or name.startswith(OUTPUT):
            decayed.append((name, parameter))
        elif name.endswith(ROUTER):
            routers.append((name, parameter))
        else:
            hidden.append((name, parameter))
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    fused = torch.device(device).type in FUSED_DEVICES
    if muon:
        groups.insert(0, {"params": hidden, "weight_decay": config.weight_decay, "algorithm": "muon"})
        groups.append({"params": routers, "weight_decay": config.weight_decay, "lr_scale": ROUTER_SCALE})
        used = [group for group in groups if group["params"]]
        return Muon(used, config.peak_learning_rate, betas=betas, fused=fused, kernels=kernels)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.peak_learning_rate,
        betas=betas,
        fused=fused or None,
        foreach=None if fused else True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its learning rate: `lr` times the group's `lr_scale`, where it has one."""
    # Accelerate's prepare replaces the group dictionaries, so they are looked up each time.
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def skip_if_nonfinite(
    optimizer: torch.optim.Optimizer,
    norm: torch.Tensor,
    loss: torch.Tensor | None = None,
    *,
    limit: float = math.inf,
) -> None:
    """Turn the coming `optimizer.step()` into nothing if the gradient's norm or the loss is infinite or NaN.

    Weights, moments and step counts then stay as they were. The host does not wait for the norm: the fused
    kernels, and Muon, read a tensor `found_inf` of the optimizer, 1.0 for a step to leave out, which
    is how PyTorch's GradScaler skips steps (`torch/optim/adam.py`, `_fused_adam`). Call it before every
    step: what it says holds until the next call. With an fp16 scaler nothing is to be done, because that
    has looked at the gradient itself; without a fused kernel the host waits for the norm. A loss above a
    finite `limit` is left out too; only with a scaler the host then waits for the loss.

    Args:
        optimizer: plain, or as Accelerate prepared it.
        norm: () the norm of the gradient on the device, the same on all processes.
        loss: () the loss of the step, the same on all processes.
        limit: known before the step; the same on all processes.
    """
    scaled = getattr(optimizer, "scaler", None) is not None
    if scaled and (loss is None or limit == math.inf):
        return
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    skip = ~torch.isfinite(norm.detach())
    if loss is not None:
        # Not "above": a NaN is above nothing.
        skip = skip | ~(loss.detach() <= min(limit, torch.finfo(torch.float32).max))
    if not scaled and all(group.get("fused") for group in inner.param_groups):
        inner.found_inf = skip.to(torch.float32)
    elif skip:
        # A parameter without a gradient is passed over, its step count included.
        inner.zero_grad(set_to_none=True)
