"""Forward and backward pass of a micro-batch as one CUDA graph, clipping and update as another.

Launching a block kernel by kernel takes the host about 2 ms, however small the micro-batch, and the update
some 5 ms, however small the model: a GPU finishes them sooner and idles. A graph is one launch, without gaps
between kernels.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.loader import MicroBatch
from ..distributed.accelerator import capture_stream
from .load_balancing import ExpertBalance
from .step_timer import PhaseMarks, StepTimer

# Micro-batches that run eagerly before one is captured: they compile, and load what was compiled.
WARMUP = 2
# A graph reserves the memory of its activations, which evaluation and optimizer cannot use. Above this share
# of the GPU's memory there is no graph; micro-batches of such a run are large enough to do without.
LARGEST_SHARE = 0.6
# The update is captured again after a checkpoint was loaded, say, but not again and again.
MOST_CAPTURES = 4

# Forward and backward pass of a micro-batch, given the factor of its loss, the load balancing of experts and
# what marks the end of the forward pass; returns the summed loss, a float32 scalar.
ForwardBackward = Callable[[MicroBatch, float | Tensor, ExpertBalance | None, PhaseMarks | None], Tensor]
# Clipping and update of a step, given `sums` and the highest loss that is not skipped; returns what
# `step.update` does.
Update = Callable[[Tensor, float | Tensor], Tensor]


def unsupported_reason(
    device: torch.device,
    *,
    packing: bool,
    use_moe: bool,
    grouped: bool,
    sharded: bool,
    precision: str,
    fused: bool,
    compiled: bool,
) -> str | None:
    """Return why micro-batches are not captured, None where they are.

    Args:
        grouped: whether the products of experts are grouped on the GPU; else the host reads the groups.
        sharded: whether the parameters are sharded by FSDP2, which gathers them from the host.
        precision: of matrix products: `no`, `bf16` or `fp16`.
        fused: whether the model is a MiniMindForCausalLM with fused kernels.
        compiled: whether the model is compiled; unpacked sequences then have one length.
    """
    if device.type != "cuda":
        return "CUDA graphs need a CUDA GPU"
    if sharded:
        return "CUDA graphs do not support FSDP2"
    if precision != "bf16" or not fused:
        return "CUDA graphs need bf16 and fused kernels"
    if not (compiled or packing):
        return "CUDA graphs need --packing where the model is not compiled"
    if use_moe and not compiled:
        return "CUDA graphs of experts need --compile"
    if use_moe and not grouped:
        return "CUDA graphs of experts need compute capability 9.0, and widths that are multiples of 8"
    return None


class ForwardBackwardGraph:
    """Runs micro-batches as `forward_backward` does, and from the third one on as a CUDA graph of it.

    Gradients are accumulated in `parameter.grad` as in eager mode. Those of the graph are in its memory pool,
    which the next replay overwrites: step the optimizer before, or leave them in place to accumulate.
    """

    def __init__(
        self,
        forward_backward: ForwardBackward,
        parameters: Sequence[nn.Parameter],
        *,
        note: Callable[[str], None],
        always: bool = False,
        captured: ForwardBackward | None = None,
        finish: Callable[[], None] = lambda: None,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        """Capture nothing yet.

        Args:
            forward_backward: run eagerly for warm-up and for other shapes.
            parameters: all that get a gradient; their memory must not move.
            note: gets one sentence where capturing fails.
            always: capture whatever memory the run takes.
            captured: what is captured, by default `forward_backward`.
            finish: called after each replay.
            agree: whether a condition holds on all ranks.
        """
        self._forward_backward, self._parameters = forward_backward, list(parameters)
        self._note, self._always = note, always
        self._captured = captured or forward_backward
        self._finish, self._agree = finish, agree
        self._seen = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._given_up = False
        self._batch: MicroBatch
        self._scale: Tensor
        self._loss: Tensor
        self._routing: Tensor
        self._gradients: list[Tensor] = []
        # Of several micro-batches, in memory that does not move.
        self._sums: list[Tensor] = []
        self._forward_end: Any = None

    @property
    def captured(self) -> bool:
        """Whether micro-batches run as a graph by now."""
        return self._graph is not None

    def release(self) -> None:
        """Destroy the graph; what follows runs eagerly."""
        if self._graph is not None:
            self._graph.reset()
        self._graph, self._given_up = None, True

    @property
    def given_up(self) -> bool:
        """Whether no micro-batch will run as a graph."""
        return self._given_up

    @property
    def pool(self) -> Any:
        """The memory pool, for graphs that are replayed between replays of this one; None without a graph."""
        return None if self._graph is None else self._graph.pool()

    def __call__(
        self,
        batch: MicroBatch,
        scale: float,
        balance: ExpertBalance | None = None,
        timer: StepTimer | None = None,
    ) -> Tensor:
        """Run forward and backward and return the summed loss, a scalar that the next call may overwrite.

        Args:
            scale: factor of the loss whose gradient is taken.
            balance: records the choice of experts.
            timer: marks the end of `forward` and `backward`; with one, a replay waits for the device.
        """
        if self._graph is None and not self._given_up:
            self._seen += 1
            if self._seen > WARMUP:
                self._capture(batch, balance)
        if self._graph is None or _shapes(batch) != _shapes(self._batch):
            return self._forward_backward(batch, scale, balance, timer)
        loss = self._replay(batch, scale)
        if balance is not None:
            # Copied: the next replay overwrites what this one wrote.
            balance.add(self._routing.clone())
        if timer is not None:
            timer.mark_event("forward", self._forward_end)
            timer.mark("backward")
            # The next replay records the event again.
            timer.resolve()
        return loss

    def _replay(self, batch: MicroBatch, scale: float) -> Tensor:
        assert self._graph is not None
        for there, here in zip(_tensors(self._batch), _tensors(batch), strict=True):
            there.copy_(here)
        self._scale.fill_(scale)
        # An accumulated gradient must not be where the graph writes.
        if any(p.grad is own for p, own in zip(self._parameters, self._gradients, strict=True)):
            self._move_gradients()
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
        self._finish()
        return self._loss

    def _move_gradients(self) -> None:
        """Copy the gradients that the graph wrote to other memory, the same in every step."""
        if not self._sums:
            self._sums = [torch.empty_like(gradient) for gradient in self._gradients]
        moved = [
            (parameter, own, there)
            for parameter, own, there in zip(self._parameters, self._gradients, self._sums, strict=True)
            if parameter.grad is own
        ]
        torch._foreach_copy_([there for _, _, there in moved], [own for _, own, _ in moved])
        for parameter, _, there in moved:
            parameter.grad = there

    def _capture(self, batch: MicroBatch, balance: ExpertBalance | None) -> None:
        parameters = self._parameters
        device = batch.input_ids.device
        allowed = LARGEST_SHARE * torch.cuda.get_per_process_memory_fraction(device)
        most = allowed * torch.cuda.get_device_properties(device).total_memory
        if not self._agree(self._always or torch.cuda.max_memory_allocated() <= most):
            self._given_up = True
            return
        earlier = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        copies = (None if tensor is None else tensor.clone() for tensor in _fields(batch))
        self._batch = MicroBatch(*copies)  # type: ignore[arg-type]
        self._scale = torch.ones((), device=batch.input_ids.device)
        self._forward_end = torch.cuda.Event(enable_timing=True, external=True)
        graph = torch.cuda.CUDAGraph()
        # Reference cycles may hold memory, or an autograd graph of another stream.
        gc.collect()
        try:
            with _captured(graph, batch.input_ids.device):
                marks = _ForwardEnd(self._forward_end)
                own = None if balance is None else balance.empty()
                self._loss = self._captured(self._batch, self._scale, own, marks)
                if own is not None:
                    (self._routing,) = own.sums()
            reason = "another rank could not capture"
            done = True
        except RuntimeError as error:
            torch.cuda.synchronize()
            reason, done = _first_line(error), False
        if not self._agree(done):
            self._given_up = True
            self._note(f"CUDA graphs are not used: {reason}")
        else:
            self._graph = graph
            # A parameter that the loss does not depend on has no gradient, and the optimizer skips it.
            self._parameters = [p for p in parameters if p.grad is not None]
            self._gradients = [p.grad for p in parameters if p.grad is not None]
        for parameter, gradient in zip(parameters, earlier, strict=True):
            parameter.grad = gradient


class UpdateGraph:
    """Clips the gradient and updates the weights as `update` does, after some steps as a CUDA graph.

    The graph is replayed where gradients, weights and states have the addresses of its capture. It uses the
    memory of the activations, which are not needed any more.
    """

    def __init__(
        self,
        update: Update,
        prepare: Callable[[], tuple[int, ...]],
        forward_backward: ForwardBackwardGraph,
        *,
        note: Callable[[str], None],
    ) -> None:
        """Capture nothing yet.

        Args:
            update: run eagerly at first, and captured.
            prepare: copies what changes from step to step to the device, and returns the addresses; none
                where the update cannot be captured.
            forward_backward: captured before the update, in whose memory it runs.
            note: gets one sentence where capturing fails.
        """
        self._update, self._prepare, self._note = update, prepare, note
        self._forward_backward = forward_backward
        self._addresses: tuple[int, ...] = ()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captures = 0
        self._sums: Tensor
        self._limit: Tensor
        self._values: Tensor

    @property
    def captured(self) -> bool:
        """Whether updates run as a graph by now."""
        return self._graph is not None

    def release(self) -> None:
        """Destroy the graph; what follows runs eagerly."""
        if self._graph is not None:
            self._graph.reset()
        self._graph, self._captures = None, MOST_CAPTURES

    def __call__(self, sums: Tensor, limit: float) -> Tensor:
        """Clip and update; see `step.update`."""
        if self._graph is None and (self._captures >= MOST_CAPTURES or self._forward_backward.given_up):
            return self._update(sums, limit)
        addresses = self._prepare()
        if addresses != self._addresses:
            # The graph is of no use any more. The next step may have these addresses too.
            self._addresses, self._graph = addresses, None
            return self._update(sums, limit)
        if self._graph is None and (self._forward_backward.pool is None or not addresses):
            return self._update(sums, limit)
        if self._graph is None and not self._capture(sums):
            return self._update(sums, limit)
        assert self._graph is not None
        self._sums.copy_(sums)
        self._limit.fill_(min(limit, torch.finfo(torch.float32).max))
        self._graph.replay()
        # The next replay of the forward pass may overwrite them.
        return self._values.clone()

    def _capture(self, sums: Tensor) -> bool:
        self._captures += 1
        self._sums, self._limit = sums.clone(), torch.zeros((), device=sums.device)
        graph = torch.cuda.CUDAGraph()
        gc.collect()
        try:
            with _captured(graph, sums.device, self._forward_backward.pool):
                self._values = self._update(self._sums, self._limit)
        except RuntimeError as error:
            self._captures = MOST_CAPTURES
            torch.cuda.synchronize()
            self._note(f"the update is not a CUDA graph: {_first_line(error)}")
            return False
        self._graph = graph
        return True


@dataclass(frozen=True)
class StepGraphs:
    """The CUDA graphs of a step.

    Attributes:
        update: None where the optimizer cannot be captured.
    """

    forward_backward: ForwardBackwardGraph
    update: UpdateGraph | None = None

    def release(self) -> None:
        """Destroy the graphs; those of several ranks before the process group, which would wait for them."""
        self.forward_backward.release()
        if self.update is not None:
            self.update.release()


@contextmanager
def _captured(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any = None) -> Iterator[None]:
    """Capture what is done in the context."""
    before = torch.cuda.current_stream(device)
    try:
        # The prefetch thread keeps copying to the device meanwhile.
        with torch.cuda.graph(graph, pool, capture_stream(device), capture_error_mode="thread_local"):
            yield
    finally:
        # After a failure the stream of the capture would remain the current one.
        torch.cuda.set_stream(before)


class _ForwardEnd:
    """Records the event between forward and backward pass in the graph."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def mark(self, phase: str) -> None:
        """Record the end of the forward pass."""
        if phase == "forward":
            self._event.record()


def _fields(batch: MicroBatch) -> tuple[Tensor | None, ...]:
    return batch.input_ids, batch.shift_labels, batch.document_ids, batch.position_ids


def _tensors(batch: MicroBatch) -> list[Tensor]:
    return [tensor for tensor in _fields(batch) if tensor is not None]


def _shapes(batch: MicroBatch) -> list[torch.Size | None]:
    return [None if tensor is None else tensor.shape for tensor in _fields(batch)]


def _first_line(error: RuntimeError) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
