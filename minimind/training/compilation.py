"""How the steps of a run are compiled, and captured in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..config.options import PretrainConfig
from ..data.loader import MicroBatch
from ..distributed.collectives import any_process
from ..distributed.gradient_reduction import GradientReduction, reduction_is_fast
from ..modeling.config import MiniMindConfig
from ..modeling.kernels.dispatch import unsupported_reason
from ..modeling.moe import ALIGNMENT
from ..modeling.transformer import MiniMindForCausalLM
from ..optim.muon import Muon
from .cuda_graph import ForwardBackwardGraph, StepGraphs, UpdateGraph
from .cuda_graph import unsupported_reason as graph_unsupported_reason
from .load_balancing import ExpertBalance
from .peak_flops import peak_flops_of
from .step import forward_backward, update
from .step_timer import PhaseMarks

# Compiling delays the start by 10 to 17 s and gains 1% where CUDA graphs are used: it pays for a run that
# trains longer than this many seconds.
SHORT_RUN = 20 * 60.0
# The share of a GPU's stated peak that training typically reaches.
USUAL_MFU = 0.4


def build_graphs(
    config: PretrainConfig,
    model_config: MiniMindConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    *,
    compiled: bool,
    note: Callable[[str], None] = lambda sentence: None,
) -> StepGraphs | None:
    """Return the CUDA graphs of a run's steps; None where there are none.

    Args:
        model: prepared.
        optimizer: prepared.
        compiled: whether the model is compiled.
        note: gets a sentence where --cuda-graphs has no effect.
    """
    if config.cuda_graphs is False:
        return None
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    reason = _graph_unsupported(config, model_config, accelerator, bare, compiled=compiled)
    if reason is not None:
        if config.cuda_graphs:
            note(f"--cuda-graphs has no effect: {reason}.")
        return None

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    group = torch.distributed.group.WORLD if accelerator.num_processes > 1 else None
    dtype = torch.bfloat16 if config.reduce_dtype == "bf16" else None
    inner = getattr(optimizer, "optimizer", optimizer)
    reduction = None
    if group is not None:
        reduction = GradientReduction(
            parameters,
            group,
            dtype,
            overlap=not reduction_is_fast(group, accelerator.device),
            owners=getattr(inner, "owners", {}),
        )
    accumulates = accelerator.gradient_accumulation_steps > 1

    def run(
        batch: MicroBatch,
        scale: float | torch.Tensor,
        balance: ExpertBalance | None,
        marks: PhaseMarks | None,
    ) -> torch.Tensor:
        return forward_backward(model, batch, scale, accelerator, balance, marks)

    def captured(
        batch: MicroBatch,
        scale: float | torch.Tensor,
        balance: ExpertBalance | None,
        marks: PhaseMarks | None,
    ) -> torch.Tensor:
        # DDP averages, `reduction` sums.
        scale = scale / accelerator.num_processes
        with reduction if reduction is not None and not accumulates else nullcontext():
            return forward_backward(bare, batch, scale, accelerator, balance, marks)

    def finish() -> None:
        if reduction is not None and accumulates and accelerator.sync_gradients:
            reduction.reduce()

    graph = ForwardBackwardGraph(
        run,
        parameters,
        note=note,
        always=bool(config.cuda_graphs),
        captured=captured,
        finish=finish,
        agree=lambda holds: not any_process(not holds, accelerator),
    )
    if type(inner) is not Muon:
        return StepGraphs(graph)

    def update_weights(sums: torch.Tensor, limit: float | torch.Tensor) -> torch.Tensor:
        return update(model, optimizer, sums, accelerator, config.grad_clip, limit)

    return StepGraphs(graph, UpdateGraph(update_weights, inner.prepare_step, graph, note=note))


def compiling_pays(
    config: PretrainConfig,
    model_config: MiniMindConfig,
    accelerator: Accelerator,
    model: nn.Module,
    tokens: int,
) -> bool:
    """Return whether compiling the model shortens a run of so many tokens, compilation included.

    With fused kernels in a CUDA graph Inductor gains little, and only a long run makes up for the later
    start. Otherwise, in FP8 and on a GPU whose peak is unknown, compiling pays.
    """
    if config.mixed_precision == "fp8":
        return True
    peak = peak_flops_of(accelerator.device)
    if peak is None or config.cuda_graphs is False or config.activation_checkpointing:
        return True
    if _graph_unsupported(config, model_config, accelerator, model, compiled=False) is not None:
        return True
    return tokens * model_config.flops_per_token(config.max_seq_len) > SHORT_RUN * USUAL_MFU * peak


def _graph_unsupported(
    config: PretrainConfig,
    model_config: MiniMindConfig,
    accelerator: Accelerator,
    model: nn.Module,
    *,
    compiled: bool,
) -> str | None:
    # A graph replays tensor operations only, and a subclass may do more, unless it could be compiled.
    known = compiled or type(model) is MiniMindForCausalLM
    return graph_unsupported_reason(
        accelerator.device,
        packing=config.packing,
        use_moe=bool(config.use_moe),
        grouped=not (config.use_moe and compiled) or _groups_products(model_config, accelerator.device),
        sharded=accelerator.is_fsdp2,
        precision=accelerator.mixed_precision,
        fused=known and uses_kernels(config, model_config, accelerator, model),
        compiled=compiled,
    )


def _groups_products(model_config: MiniMindConfig, device: torch.device) -> bool:
    """Whether the products of experts are computed without the host reading how many tokens each has."""
    widths = model_config.hidden_size, model_config.moe_intermediate_size or 0
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and not any(width % ALIGNMENT for width in widths)
    )


def uses_kernels(
    config: PretrainConfig, model_config: MiniMindConfig, accelerator: Accelerator, model: nn.Module
) -> bool:
    """Whether a model trains with the fused kernels."""
    return (
        isinstance(model, MiniMindForCausalLM)
        and accelerator.device.type == "cuda"
        and not unsupported_reason(accelerator.mixed_precision, model_config.head_dim, config.dropout)
    )


def compile_mode(config: PretrainConfig, num_processes: int, *, fused: bool) -> Literal["whole", "blocks"]:
    """Return how the model of a run is compiled.

    One graph is fastest where Inductor generates the kernels. DDP and FSDP2 overlap communication with
    computation between smaller graphs, and activation checkpointing recomputes block by block. With fused
    kernels, blocks are as fast and compile sooner.
    """
    whole = num_processes == 1 and not config.activation_checkpointing and not fused
    return "whole" if whole else "blocks"
