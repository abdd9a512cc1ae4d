"""Build the optimizer, fit it to the length of a run, set its rates and skip non-finite updates."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from ..config.options import PretrainConfig
from ..config.recipe import ANCHOR_RATES, largest_embedding_rate
from ..errors import ConfigError
from .muon import Muon

# Devices whose fused AdamW kernel reads `found_inf`; see skip_if_nonfinite.
FUSED_DEVICES = ("cuda", "cpu")

# Hugging Face names of matrices that Muon does not update: their rows belong to tokens or experts, like the
# rows of an embedding.
OUTPUT = "lm_head."
ROUTER = ".mlp.gate.weight"
# With Muon the routers keep the learning rate of AdamW: at a higher one they oscillate between experts.
ROUTER_SCALE = ANCHOR_RATES["adamw"] / ANCHOR_RATES["muon"]

# NorMuon begins with a lower momentum, which forgets the first gradients sooner.
FIRST_MOMENTUM = 0.85
MOMENTUM = 0.95

# Up to this many epochs a repeated token is worth about as much as a new one (Muennighoff et al. 2023,
# arXiv:2305.16264).
EPOCHS_LIKE_NEW_TEXT = 4.0


# Builds the optimizer of a run from its model and options; see `pretrain`.
OptimizerFactory = Callable[[nn.Module, PretrainConfig], torch.optim.Optimizer]


def build_custom_optimizer(
    factory: OptimizerFactory, model: nn.Module, config: PretrainConfig
) -> torch.optim.Optimizer:
    """Return the optimizer of a factory, and let its first step check that checkpoints can hold its state.

    Args:
        factory: of the caller.
        model: before Accelerate wraps it.
        config: passed to the factory.

    Raises:
        ConfigError: for anything but an optimizer over parameters of `model`.
    """
    optimizer = factory(model, config)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"optimizer= returned a {type(optimizer).__name__}; return a torch.optim.Optimizer over the "
            "parameters of the model."
        )
    own = {id(parameter) for parameter in model.parameters()}
    if not all(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ConfigError(
            "optimizer= returned an optimizer over tensors that are no parameters of the model; build it "
            "from the parameters of the model that it is called with."
        )
    optimizer.register_step_post_hook(_check_state_once())
    return optimizer


def _check_state_once() -> Callable[..., None]:
    checked = False

    def check(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        nonlocal checked
        if checked:
            return
        checked = True
        wrong = {
            field
            for fields in optimizer.state.values()
            for field, value in fields.items()
            if not isinstance(value, torch.Tensor)
        }
        for group in optimizer.param_groups:
            for key, value in group.items():
                try:
                    json.dumps(value if key != "params" and not isinstance(value, torch.Tensor) else None)
                except TypeError:
                    wrong.add(key)
        if wrong:
            raise ConfigError(
                f"checkpoints cannot hold {', '.join(sorted(wrong))} of the optimizer "
                f"{type(optimizer).__name__}; keep tensors in its state, and numbers, text and tensors in "
                "its parameter groups."
            )

    return check


def build_optimizer(
    model: nn.Module,
    config: PretrainConfig,
    device: torch.device | str,
    *,
    kernels: bool = False,
    process_group: ProcessGroup | None = None,
) -> torch.optim.Optimizer:
    """Return the optimizer of --optimizer over the trainable parameters of `model`, in at most four groups.

    Weight decay applies to matrices; embeddings, norms and other parameters of fewer than two dimensions have
    none. A tied embedding counts once, as an embedding. Muon updates the matrices inside the blocks, each
    expert of a stack separately; AdamW updates embeddings, the output layer, routers and vectors. The output
    layer is `get_output_embeddings()` of the model, else `lm_head`. A model with a method `matrices` names
    those of Muon itself. Each group lists its parameter names under `param_names`.

    Args:
        model: before Accelerate wraps it, so that parameter names have no prefix.
        config: optimizer, learning rate, weight decay and betas.
        device: of the parameters when the optimizer steps.
        kernels: allow Muon to compile Triton kernels.
        process_group: ranks that share Muon's orthogonalization; None for one rank.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    output = getattr(model, "get_output_embeddings", lambda: None)()
    outputs = {id(parameter) for parameter in output.parameters()} if output is not None else set()
    named = getattr(model, "matrices", None)
    chosen = None if named is None else {id(parameter) for parameter in named()}
    muon = config.optimizer in ("normuon", "muon")
    matrices: list[tuple[str, nn.Parameter]] = []
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
        elif chosen is not None and id(parameter) not in chosen:
            decayed.append((name, parameter))
        else:
            matrices.append((name, parameter))
    decay = config.matrix_weight_decay
    groups = [
        {"params": decayed, "weight_decay": decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if config.optimizer == "normuon":
        groups[1]["lr_scale"] = 1.0  # until `fit_to_horizon`
    betas = (config.beta1, config.beta2)
    fused = torch.device(device).type in FUSED_DEVICES
    if muon:
        group = {"params": matrices, "weight_decay": decay, "algorithm": "muon"}
        groups.insert(0, {**group, "normalize_rows": config.optimizer == "normuon"})
        groups.append({"params": routers, "weight_decay": decay, "lr_scale": ROUTER_SCALE})
        used = [group for group in groups if group["params"]]
        lr = config.peak_learning_rate
        options: dict[str, Any] = {
            "momentum": MOMENTUM,
            "fused": fused,
            "kernels": kernels,
            "process_group": process_group,
        }
        return Muon(used, lr, betas=betas, **options)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.peak_learning_rate,
        betas=betas,
        fused=fused or None,
        foreach=None if fused else True,
    )


def fit_to_horizon(optimizer: torch.optim.Optimizer, total_steps: int, epochs: float = 1.0) -> None:
    """Set what NorMuon derives from the length of a run; other optimizers stay as they are.

    Call this before a checkpoint is loaded: a resumed run keeps the values of its beginning.

    Args:
        optimizer: bare or prepared.
        total_steps: optimizer steps of the whole run.
        epochs: of the whole run.
    """
    if any(group.get("normalize_rows") for group in optimizer.param_groups):
        for group in optimizer.param_groups:
            if group["algorithm"] == "muon":
                group["momentum_warmup"] = momentum_warmup_steps(total_steps)
            elif group.get("lr_scale") == 1.0:
                scale = embedding_lr_scale(total_steps, epochs)
                widths = [parameter.shape[-1] for parameter in group["params"] if parameter.ndim > 1]
                if widths:
                    scale = min(scale, largest_embedding_rate(max(widths)) / optimizer.defaults["lr"])
                group["lr_scale"] = scale


def embedding_lr_scale(total_steps: int, epochs: float = 1.0) -> float:
    """Return the learning rate of embedding and norms relative to that of the matrices, for narrow models.

    200/√steps, from 1 to 6. AdamW moves a weight by at most the learning rate in a step, and in a short run
    the embedding does not get far enough. Measured (docs/experiments.md): best 6 for 1,221 steps and 3 for
    3,723. The embedding has no weight decay, and in many epochs a high rate makes it overfit: beyond four
    epochs the ratio is divided by (epochs/4)². `largest_embedding_rate` limits the rate of wide models.

    Args:
        total_steps: optimizer steps of the whole run.
        epochs: of the whole run.
    """
    ratio = min(200 / math.sqrt(max(total_steps, 1)), 6.0)
    return max(ratio / max(epochs / EPOCHS_LIKE_NEW_TEXT, 1.0) ** 2, 1.0)


def momentum_warmup_steps(total_steps: int) -> int:
    """Return over how many steps the momentum of NorMuon rises: 15% of the run, at most 300."""
    return min(round(0.15 * total_steps), 300)


def set_schedule(optimizer: torch.optim.Optimizer, lr: float, step: int = 0) -> None:
    """Set the learning rate and momentum of every group for a step.

    The learning rate is `lr` times the group's `lr_scale`, by default 1. The momentum of a group with
    `momentum_warmup` rises linearly over that many steps.

    Args:
        optimizer: bare or prepared.
        lr: of the schedule.
        step: from 0.
    """
    # Look the groups up each time: Accelerate's prepare replaces the dictionaries.
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        if "momentum_warmup" in group:
            share = min(step / max(group["momentum_warmup"], 1), 1.0)
            group["momentum"] = FIRST_MOMENTUM + (MOMENTUM - FIRST_MOMENTUM) * share


def skip_if_nonfinite(
    optimizer: torch.optim.Optimizer,
    norm: torch.Tensor,
    loss: torch.Tensor | None = None,
    *,
    limit: float | torch.Tensor = math.inf,
) -> None:
    """Skip the next `optimizer.step()` if the gradient norm or the loss is not finite, or the loss too high.

    A skipped step changes neither weights nor moments nor step counts. The fused kernels and Muon read the
    optimizer's tensor `found_inf` on the device, 1.0 to skip, as with PyTorch's GradScaler
    (`torch/optim/adam.py`, `_fused_adam`), so the host does not synchronize; without a fused kernel it does.
    Call this before every step: `found_inf` stays set. An fp16 scaler checks the gradient itself; then only a
    loss above a finite `limit` is checked here, with a synchronization.

    Args:
        optimizer: bare, or prepared by Accelerate.
        norm: () gradient norm on the device, equal on all processes.
        loss: () loss of the step, equal on all processes.
        limit: highest loss that is not skipped, equal on all processes; a () float32 tensor is finite.
    """
    scaled = getattr(optimizer, "scaler", None) is not None
    if scaled and (loss is None or limit == math.inf):
        return
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    skip = ~torch.isfinite(norm.detach())
    if loss is not None:
        # Not `loss > limit`, which is False for NaN.
        bound = limit if isinstance(limit, torch.Tensor) else min(limit, torch.finfo(torch.float32).max)
        skip = skip | ~(loss.detach() <= bound)
    if not scaled and all(group.get("fused") for group in inner.param_groups):
        inner.found_inf = skip.to(torch.float32)
    elif skip:
        # Optimizers skip parameters without a gradient, step counts included.
        inner.zero_grad(set_to_none=True)
