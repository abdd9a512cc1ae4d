"""Summation of gradients over ranks during the backward pass, in a form that a CUDA graph can capture.

DistributedDataParallel counts its backward passes on the host, so a replay of its hooks would do nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

# Bytes of a bucket, at least: large enough for the bandwidth, small enough that few gradients are left when
# the backward pass ends.
BUCKET_BYTES = 16 << 20


class GradientReduction:
    """Sums gradients in buckets: each as soon as the backward pass has computed all its gradients.

    Used as a context manager around the backward pass. Every rank does the same passes.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], group: ProcessGroup, dtype: torch.dtype | None = None
    ) -> None:
        """Form the buckets.

        Args:
            parameters: all that get a gradient, in the order of the forward pass.
            group: ranks that have the same parameters.
            dtype: in which gradients are summed, by default their own; they are rounded to it before.
        """
        self._group, self._dtype = group, dtype
        self._buckets: list[list[nn.Parameter]] = [[]]
        size = 0
        # Gradients arrive in the reverse order of the forward pass.
        for parameter in reversed(parameters):
            if size >= BUCKET_BYTES:
                self._buckets.append([])
                size = 0
            self._buckets[-1].append(parameter)
            size += parameter.numel() * parameter.element_size()
        self._hooks: list[Any] = []
        self._left: list[list[nn.Parameter]] = []
        # The reduction of a bucket, what it sums, and where the sums belong.
        self._begun: list[tuple[Any, list[Tensor], list[Tensor]]] = []

    def __enter__(self) -> GradientReduction:
        self._left = list(self._buckets)
        for bucket in self._buckets:
            missing = {id(parameter) for parameter in bucket}

            def arrive(
                parameter: Tensor, bucket: list[nn.Parameter] = bucket, missing: set[int] = missing
            ) -> None:
                missing.discard(id(parameter))
                if not missing:
                    self._begin(bucket)

            self._hooks += [parameter.register_post_accumulate_grad_hook(arrive) for parameter in bucket]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if kind is None:
            self._finish()

    def reduce(self) -> None:
        """Sum the gradients that are there now."""
        self._left = list(self._buckets)
        self._finish()

    def _begin(self, bucket: list[nn.Parameter]) -> None:
        self._left = [other for other in self._left if other is not bucket]
        gradients = [parameter.grad for parameter in bucket if parameter.grad is not None]
        if gradients:
            summed = gradients if self._dtype is None else [tensor.to(self._dtype) for tensor in gradients]
            self._begun.append((self._group.allreduce_coalesced(summed), summed, gradients))

    def _finish(self) -> None:
        # Those with a parameter that has no gradient.
        for bucket in self._left:
            self._begin(bucket)
        for work, summed, gradients in self._begun:
            work.wait()
            if summed is not gradients:
                torch._foreach_copy_(gradients, summed)
        self._begun.clear()
