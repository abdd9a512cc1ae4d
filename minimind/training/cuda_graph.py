"""Forward and backward pass of a micro-batch as one CUDA graph.

Launched kernel by kernel, a block takes the host some 2 milliseconds, however few rows there are: a GPU has
done a small micro-batch sooner, and waits. A graph is launched in one go, and leaves no gaps between kernels.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config.options import PretrainConfig
from ..data.loader import MicroBatch

# Micro-batches that run as they come before one is captured: they compile, and load what they compiled.
WARMUP = 2
# A graph keeps the memory of its activations, so evaluation and optimizer find none of it: where a run takes
# more than this share of the GPU's there is no graph, and micro-batches are large enough to do without.
LARGEST_SHARE = 0.6

# Runs a micro-batch both ways with the factor of its loss and calls the third in between; returns the summed
# loss, a float32 scalar.
Passes = Callable[[MicroBatch, float | Tensor, Callable[[], None]], Tensor]


def unsupported_reason(
    config: PretrainConfig,
    device: torch.device,
    *,
    num_processes: int,
    precision: str,
    fused: bool,
    compiled: bool,
) -> str | None:
    """Return why micro-batches are not captured, None where they are.

    Args:
        config: of the run.
        device: of this process.
        num_processes: that train together; several exchange gradients in the backward pass.
        precision: of the matrix products: `no`, `bf16` or `fp16`.
        fused: the model is minimind's own and uses the kernels of `fused_ops`.
        compiled: the model is; rows without packing then have one length.
    """
    if device.type != "cuda":
        return "CUDA graphs need a CUDA GPU"
    if num_processes > 1:
        return "CUDA graphs serve one process only"
    if precision != "bf16" or not fused:
        return "CUDA graphs need bf16 and fused kernels"
    if not (compiled or config.packing):
        return "CUDA graphs need --packing where the model is not compiled"
    if config.use_moe:
        return "CUDA graphs do not serve experts"
    return None


class ForwardBackwardGraph:
    """Runs micro-batches as `passes` does, and from the third one on as a CUDA graph of it.

    Gradients are found at the parameters as ever. Those of the graph lie in memory of its own, where its next
    launch writes: take the optimizer's step before, or leave them where they are to have the next ones added.
    """

    def __init__(
        self,
        passes: Passes,
        parameters: Sequence[nn.Parameter],
        *,
        note: Callable[[str], None],
        always: bool = False,
    ) -> None:
        """Capture nothing yet.

        Args:
            passes: as it is, for warm-up, for rows of other shapes, and to be captured.
            parameters: all that get a gradient; they stay where they are in memory.
            note: gets one sentence where capturing fails.
            always: capture however much memory the run takes.
        """
        self._passes, self._parameters = passes, list(parameters)
        self._note, self._always = note, always
        self._seen = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._given_up = False
        self._batch: MicroBatch
        self._scale: Tensor
        self._loss: Tensor
        self._gradients: list[Tensor] = []
        self._halfway: Any = None

    @property
    def captured(self) -> bool:
        """Whether micro-batches now run as a graph."""
        return self._graph is not None

    def __call__(self, batch: MicroBatch, scale: float) -> Tensor:
        """Run a micro-batch both ways and return its summed loss, a scalar that the next call may overwrite.

        Args:
            batch: on the device.
            scale: what the loss is multiplied by before its gradient is taken.
        """
        if self._graph is None and not self._given_up:
            self._seen += 1
            if self._seen > WARMUP:
                self._capture(batch)
        if self._graph is None or _shapes(batch) != _shapes(self._batch):
            return self._passes(batch, scale, lambda: None)
        return self._replay(batch, scale)

    def timed(self, batch: MicroBatch, scale: float) -> tuple[float, float]:
        """Run a micro-batch of the captured shape, wait for it, and return the seconds of both passes."""
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        self._replay(batch, scale)
        ended.record()
        ended.synchronize()
        return began.elapsed_time(self._halfway) / 1e3, self._halfway.elapsed_time(ended) / 1e3

    def _replay(self, batch: MicroBatch, scale: float) -> Tensor:
        assert self._graph is not None
        for there, here in zip(_tensors(self._batch), _tensors(batch), strict=True):
            there.copy_(here)
        self._scale.fill_(scale)
        # A sum over micro-batches is kept out of the way of what the graph writes.
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if parameter.grad is gradient:
                parameter.grad = gradient.clone()
        self._graph.replay()
        sums, more = [], []
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                sums.append(parameter.grad)
                more.append(gradient)
        if sums:
            torch._foreach_add_(sums, more)
        return self._loss

    def _capture(self, batch: MicroBatch) -> None:
        parameters = self._parameters
        total = torch.cuda.get_device_properties(batch.input_ids.device).total_memory
        if not self._always and torch.cuda.max_memory_allocated() > LARGEST_SHARE * total:
            self._given_up = True
            return
        earlier = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        self._batch = _copy(batch)
        self._scale = torch.ones((), device=batch.input_ids.device)
        self._halfway = torch.cuda.Event(enable_timing=True, external=True)
        graph = torch.cuda.CUDAGraph()
        # What hangs in cycles may hold memory, or a graph of autograd that belongs to another stream.
        gc.collect()
        try:
            # The thread that reads ahead goes on with its own work on the device.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._loss = self._passes(self._batch, self._scale, self._halfway.record)
        except RuntimeError as error:
            self._given_up = True
            torch.cuda.synchronize()
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._note(f"CUDA graphs are not used: {reason}")
        else:
            self._graph = graph
            # One without a part in the loss has no gradient, and the optimizer passes it over.
            self._parameters = [p for p in parameters if p.grad is not None]
            self._gradients = [p.grad for p in parameters if p.grad is not None]
        for parameter, gradient in zip(parameters, earlier, strict=True):
            parameter.grad = gradient


def _fields(batch: MicroBatch) -> tuple[Tensor | None, ...]:
    return batch.input_ids, batch.shift_labels, batch.document_ids, batch.position_ids


def _copy(batch: MicroBatch) -> MicroBatch:
    return MicroBatch(*(None if tensor is None else tensor.clone() for tensor in _fields(batch)))  # type: ignore[arg-type]


def _tensors(batch: MicroBatch) -> list[Tensor]:
    return [tensor for tensor in _fields(batch) if tensor is not None]


def _shapes(batch: MicroBatch) -> list[torch.Size | None]:
    return [None if tensor is None else tensor.shape for tensor in _fields(batch)]
