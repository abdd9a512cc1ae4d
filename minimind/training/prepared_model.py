"""Model and optimizer as a run trains them: compiled or not, both passes in a CUDA graph or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from accelerate import Accelerator
from torch import nn

from ..config.options import PretrainConfig
from ..data.batch_plan import BatchPlan
from ..data.loader import MicroBatch
from ..distributed.accelerator import cast_weights_only, prepare, wants_compile
from ..distributed.consistency import check_same_on_all_ranks, weights_fingerprint
from ..modeling.config import MiniMindConfig
from ..modeling.kernels.dispatch import unsupported_reason
from ..modeling.transformer import MiniMindForCausalLM
from ..optim.build import build_optimizer
from .build_model import build_model
from .cuda_graph import ForwardBackwardGraph
from .cuda_graph import unsupported_reason as graph_unsupported_reason
from .load_balancing import ExpertBalance
from .peak_flops import peak_flops_of
from .trainer import Run, forward_backward

# Compiling takes 10 to 17 s of a start, and brings 1% where CUDA graphs serve: after so many seconds of
# training it is ahead.
SHORT_RUN = 20 * 60.0
# The share of a GPU's stated peak that training reaches.
USUAL_MFU = 0.4


def compile_and_wrap(
    config: PretrainConfig,
    shape: MiniMindConfig,
    plan: BatchPlan,
    accelerator: Accelerator,
    model: nn.Module | None = None,
    *,
    tokens: int | None = None,
) -> tuple[nn.Module, torch.optim.Optimizer, bool]:
    """Return model and optimizer as Accelerate prepared them, and whether the model is compiled.

    Args:
        config: of the run.
        shape: of the model.
        plan: of its batches.
        accelerator: of this process.
        model: bare; made from the shape where there is none.
        tokens: of the run in all, on which it depends whether compiling pays; None for a long run.
    """
    model = build_model(config, shape) if model is None else model
    pays = tokens is None or compiling_pays(config, shape, accelerator, model, tokens)
    compiled = wants_compile(config, accelerator, pays=pays)
    fused = _uses_kernels(config, shape, accelerator, model)
    if isinstance(model, MiniMindForCausalLM):
        model.model.recompute = config.activation_checkpointing
        model.gathered_dtype = cast_weights_only(accelerator)
        if compiled:
            model.compile_for_training(compile_mode(config, accelerator.num_processes, fused=fused))
    else:
        compiled = False
    optimizer = build_optimizer(model, config, accelerator.device, kernels=compiled or fused)
    check_same_on_all_ranks(
        accelerator,
        {"starting weights": weights_fingerprint(model), "compilation": "on" if compiled else "off"},
    )
    prepared_model, prepared_optimizer = prepare(
        accelerator,
        model,
        optimizer,
        tied=shape.tie_word_embeddings and isinstance(model, MiniMindForCausalLM),
        accumulation_steps=plan.accumulation_steps,
    )
    return prepared_model, prepared_optimizer, compiled


def pass_graph(run: Run, shape: MiniMindConfig, *, compiled: bool) -> ForwardBackwardGraph | None:
    """Return what runs the micro-batches of a run as a CUDA graph; None where there is to be none.

    Args:
        run: with its model prepared.
        shape: of the model.
        compiled: the model is.
    """
    accelerator, config = run.accelerator, run.config
    if config.cuda_graphs is False:
        return None
    why_not = _graph_hindrance(config, shape, accelerator, run.model, compiled=compiled)
    if why_not is not None:
        if config.cuda_graphs:
            run.progress.note(f"--cuda-graphs has no effect: {why_not}.")
        return None

    def passes(batch: MicroBatch, scale: float | torch.Tensor, between: Callable[[], None]) -> torch.Tensor:
        return forward_backward(run, batch, scale, ExpertBalance(accelerator, config), between)

    return ForwardBackwardGraph(
        passes,
        [parameter for parameter in run.model.parameters() if parameter.requires_grad],
        note=run.progress.note,
        always=bool(config.cuda_graphs),
    )


def compiling_pays(
    config: PretrainConfig, shape: MiniMindConfig, accelerator: Accelerator, model: nn.Module, tokens: int
) -> bool:
    """Whether a run of so many tokens is over sooner if its model is compiled, which takes a while.

    With kernels of our own in a CUDA graph little is left for inductor to do, and only a long run makes up
    for the later start. Anywhere else, and on a GPU whose speed is not known, compiling pays.
    """
    peak = peak_flops_of(accelerator.device)
    if peak is None or config.cuda_graphs is False or config.activation_checkpointing:
        return True
    if _graph_hindrance(config, shape, accelerator, model, compiled=False) is not None:
        return True
    return tokens * shape.flops_per_token(config.max_seq_len) > SHORT_RUN * USUAL_MFU * peak


def _graph_hindrance(
    config: PretrainConfig,
    shape: MiniMindConfig,
    accelerator: Accelerator,
    model: nn.Module,
    *,
    compiled: bool,
) -> str | None:
    # What a subclass does beside tensors happens in no graph; that it can be compiled says there is none.
    known = compiled or type(model) is MiniMindForCausalLM
    return graph_unsupported_reason(
        config,
        accelerator.device,
        num_processes=accelerator.num_processes,
        precision=accelerator.mixed_precision,
        fused=known and _uses_kernels(config, shape, accelerator, model),
        compiled=compiled,
    )


def _uses_kernels(
    config: PretrainConfig, shape: MiniMindConfig, accelerator: Accelerator, model: nn.Module
) -> bool:
    return (
        isinstance(model, MiniMindForCausalLM)
        and accelerator.device.type == "cuda"
        and not unsupported_reason(accelerator.mixed_precision, shape.head_dim, config.dropout)
    )


def compile_mode(config: PretrainConfig, num_processes: int, *, fused: bool) -> Literal["whole", "blocks"]:
    """Return how the model of a run is compiled.

    One graph is fastest where inductor makes the kernels; DDP and FSDP2 overlap their messages with the work
    between smaller ones, and recomputation goes by blocks as well. With kernels of our own blocks are as
    fast, and compile sooner.
    """
    whole = num_processes == 1 and not config.activation_checkpointing and not fused
    return "whole" if whole else "blocks"
