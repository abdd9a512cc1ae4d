"""Muon and NorMuon: momentum orthogonalized by Newton-Schulz iteration; AdamW for all other parameters.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon) with the scale of Moonlight (Liu et al. 2025, arXiv
2502.16982), which keeps the learning rate and weight decay of AdamW. NorMuon (Li et al. 2025, arXiv
2510.05491) divides each row of the orthogonal factor by a running root mean square of that row.

Shapes: n matrices of one shape, R rows, C columns; a parameter of more dimensions is a stack of matrices.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from .kernel_arguments import KernelArguments, kernels_supported, symmetric_products_supported
from .matrix_batches import Batch, batches_by_shape
from .matrix_updates import any_nonzero, local, nesterov_momenta, row_factors, update_scale
from .orthogonalize import MIN_NORM, SharedOrthogonalization, StackLayout, newton_schulz, normalized

# Batches whose orthogonal factors are gathered at the same time.
_GATHERED_AT_ONCE = 2

# Elements per kernel program: 16 for each thread of 8 warps.
_BLOCK = 4096
_WARPS = 8


# Normalized momenta (n, R, C) of this rank's matrices of one shape, and what updates the parameters of all
# ranks from their orthogonal factors.
_Halves = tuple[Tensor, Callable[[Tensor], None]]


class Muon(torch.optim.Optimizer):
    """Muon and AdamW in one optimizer; `algorithm` of a parameter group is `muon` or `adamw`.

    An update can be skipped without a synchronization: where the attribute `found_inf`, a () float tensor, is
    1.0, a step changes neither weights nor momentum nor step counts, as in PyTorch's fused AdamW.

    Both algorithms: p ← (1 - lr·weight_decay)·p - lr·update. Muon's update is √max(R, C)·0.2 times the
    orthogonal factor of its Nesterov momentum, so its root mean square is at most 0.2, that of AdamW. A group
    with `normalize_rows` multiplies the rows by `row_factors`, which keep that root mean square.

    An expert that received no token has a zero gradient, but orthogonalized momentum would still move it at
    full size. A matrix of a stack whose gradient is all zero is therefore not updated; its momentum decays.

    Several ranks share the work. With a `process_group`, as under DDP, each matrix belongs to one rank, which
    alone needs its gradient, keeps its momentum up to date and orthogonalizes it; the ranks gather the
    results. Call `gather_momenta` before the state is read. Parameters may be sharded by FSDP2: weights and
    momentum stay sharded, and the ranks exchange rows for whole matrices; see `StackLayout`.
    """

    # What ranks with equal parameters share; None where each orthogonalizes all matrices.
    shared: SharedOrthogonalization | None
    # Set by `skip_if_nonfinite`.
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        momentum: float = 0.95,
        fused: bool = True,
        kernels: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Create the optimizer.

        Args:
            params: groups with `algorithm`, and optionally `weight_decay`; `muon` takes matrices only, and
                optionally `normalize_rows` for NorMuon and the decay rate `row_decay` of its mean squares.
            betas: decay rates of AdamW's moments.
            eps: added by AdamW to the root of the second moment.
            momentum: decay rate of Muon's momentum.
            fused: use the fused AdamW kernel of CUDA and CPU; without it `found_inf` is ignored.
            kernels: use the Triton kernels of `muon_kernels.py`, compiled at the first step, where supported:
                for symmetric products on a GPU of compute capability 9, and around the products for unsharded
                float32 parameters on any CUDA GPU.
            process_group: ranks that have equal parameters and share the work; has no effect on sharded
                parameters.

        Raises:
            ValueError: for a parameter of a `muon` group that is not a matrix.
        """
        defaults = {"lr": lr, "weight_decay": 0.0, "betas": betas, "eps": eps, "momentum": momentum}
        rows = {"normalize_rows": False, "row_decay": 0.95}
        super().__init__(params, {**defaults, **rows, "algorithm": "adamw", "fused": fused})
        self._kernels = kernels
        self.shared = None if process_group is None else SharedOrthogonalization(process_group)
        self._arguments: KernelArguments | None = None
        # By group index: ids of the parameters with a gradient, and these parameters grouped by shape.
        self._batches: dict[int, tuple[list[int], list[Batch]]] = {}
        self._owners: tuple[list[int], dict[int, int]] = [], {}
        for group in self.param_groups:
            if group["algorithm"] == "muon" and any(p.ndim < 2 for p in group["params"]):
                raise ValueError("Muon updates matrices; put other parameters in a group for adamw.")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self._groups_with_gradients()
        if not (groups and groups[0][2][0].is_cuda and torch.cuda.is_current_stream_capturing()):
            self.prepare_step()
        # AdamW updates its groups while the ranks exchange orthogonal factors.
        pending = [self._muon(*group) for group in groups if group[1]["algorithm"] == "muon"]
        for index, group, parameters in groups:
            if group["algorithm"] == "adamw":
                self._adamw(index, group, parameters)
        for finish in pending:
            finish()
        return loss

    def _groups_with_gradients(self) -> list[tuple[int, dict[str, Any], list[Tensor]]]:
        """Return index, group and parameters with a gradient of the groups that have any."""
        parameters = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        return [
            (index, group, some)
            for index, (group, some) in enumerate(zip(self.param_groups, parameters, strict=True))
            if some
        ]

    @torch.no_grad()
    def prepare_step(self) -> tuple[int, ...]:
        """Copy to the GPU what the kernels of the next step read there: its rates, and addresses.

        `step` does it, except while a CUDA graph is captured: call this before the capture and before each
        replay.

        Returns:
            The addresses of gradients, parameters and states, which a graph cannot change; empty where the
            kernels are not used.
        """
        groups = self._groups_with_gradients()
        tables: dict[int, list[list[Tensor]]] = {}
        others: list[Tensor] = []
        rows: list[tuple[float, float, float, float]] = []
        first_row: dict[int, int] = {}
        for index, group, parameters in groups if self._kernels else ():
            first_row[index] = len(rows)
            lr = group["lr"]
            if group["algorithm"] == "adamw":
                rows.append((lr, 0.0, 0.0, 0.0))
                others += chain(*self._adamw_tensors(group, parameters))
                continue
            batches = self._by_shape(index, parameters)
            retained, momentum = 1.0 - lr * group["weight_decay"], group["momentum"]
            shapes = [batch.parameters[0].shape for batch in batches]
            rows += [(momentum, 1.0 - momentum, retained, lr * update_scale(shape)) for shape in shapes]
            ordered = [p for batch in batches for p in batch.parameters]
            gradients: list[Tensor] = [p.grad for p in ordered]  # type: ignore[misc]
            tables[index] = [gradients, [self._state(p, "momentum_buffer") for p in ordered], ordered]
            if group["normalize_rows"]:
                others += map(self._row_mean_square, ordered)
        if not tables or not kernels_supported(list(chain(*chain(*tables.values())))):
            self._arguments = None
            return ()
        addresses = {index: [[t.data_ptr() for t in row] for row in table] for index, table in tables.items()}
        device = groups[0][2][0].device
        self._arguments = KernelArguments.on_device(addresses, rows, first_row, device, self._arguments)
        return (*chain(*chain(*addresses.values())), *(tensor.data_ptr() for tensor in others))

    @property
    def owners(self) -> dict[int, int]:
        """The rank of each matrix, by the id of the parameter; empty where every rank updates all."""
        if self.shared is None:
            return {}
        matrices = [p for group in self.param_groups if group["algorithm"] == "muon" for p in group["params"]]
        ids = [id(p) for p in matrices]
        if self._owners[0] != ids:
            ranks = self.shared.owners([p.shape for p in matrices])
            whole = not any(isinstance(p, DTensor) for p in matrices)
            self._owners = ids, dict(zip(ids, ranks, strict=True)) if whole else {}
        return self._owners[1]

    @torch.no_grad()
    def gather_momenta(self) -> None:
        """Copy the momentum of each matrix from its rank to all ranks. A collective operation."""
        owners = self.owners
        owned = [
            p for group in self.param_groups for p in group["params"] if id(p) in owners and p in self.state
        ]
        if self.shared is not None and owned:
            momenta = [self._state(p, "momentum_buffer") for p in owned]
            self.shared.broadcast(momenta, [owners[id(p)] for p in owned])

    def _by_shape(self, index: int, parameters: list[Tensor]) -> list[Batch]:
        """Return the batches of a group, the same as in the step before where the parameters are."""
        ids = [id(p) for p in parameters]
        known, batches = self._batches.get(index, ([], []))
        if known != ids:
            batches = batches_by_shape(parameters, self.owners, self.shared)
            self._batches[index] = ids, batches
        return batches

    def _muon(self, index: int, group: dict[str, Any], parameters: list[Tensor]) -> Callable[[], None]:
        """Update the matrices of a group, or with several ranks begin to; return what finishes it."""
        batches = self._by_shape(index, parameters)
        halves: Iterator[_Halves]
        if self._arguments is not None:
            halves = self._with_kernels(index, group, batches, self._arguments)
        else:
            halves = self._with_pytorch(group, batches)
        exchanged: deque[tuple[Callable[[], Tensor], Callable[[Tensor], None]]] = deque()

        def finish(keep: int = 0) -> None:
            while len(exchanged) > keep:
                gathered, update = exchanged.popleft()
                update(gathered().flatten(0, -3))

        symmetric = self._kernels and symmetric_products_supported(parameters[0].device)
        for batch, (matrices, update) in zip(batches, halves, strict=True):
            directions = newton_schulz(matrices, kernels=symmetric)
            if self.shared is None or batch.counts is None:
                update(directions)
                continue
            stacks = directions.view(-1, *batch.parameters[0].shape)
            exchanged.append((self.shared.gather(stacks, batch.counts), update))
            finish(keep=_GATHERED_AT_ONCE)
        return finish

    def _row_factors(
        self, group: dict[str, Any], parameters: list[Tensor], directions: Tensor, layout: StackLayout
    ) -> Tensor:
        """Return the factors (n, ..., R) of all rows of orthogonal factors; update their mean squares.

        Args:
            directions: those of `layout.whole`.
        """
        kept = [self._row_mean_square(p) for p in parameters]
        squares = torch.linalg.vector_norm(directions, dim=-1, dtype=kept[0].dtype).square_()
        columns = directions.shape[-1]
        factors, updated = row_factors(
            layout.all_rows(squares), columns, torch.stack(kept), group["row_decay"]
        )
        torch._foreach_copy_(kept, list(updated.unbind()))
        return factors

    def _row_mean_square(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "row_mean_square" not in state:
            # Whole on every rank, also where the parameter is sharded: one number per row.
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            state["row_mean_square"] = torch.zeros(
                parameter.shape[:-1], dtype=dtype, device=local(parameter).device
            )
        return state["row_mean_square"]

    def _with_pytorch(self, group: dict[str, Any], batches: list[Batch]) -> Iterator[_Halves]:
        """Update the parameters of each shape with PyTorch operations, nothing where `found_inf` is 1.0."""
        apply = torch.ones((), dtype=torch.bool, device=batches[0].parameters[0].device)
        if self.found_inf is not None:
            apply = self.found_inf == 0
        for batch, own, _ in batches:
            buffers = [self._state(p, "momentum_buffer") for p in batch]
            layout = StackLayout(len(batch), batch[0])
            nesterov = batch[0].new_zeros((0, *batch[0].shape))
            if batch[own]:
                nesterov = layout.whole(nesterov_momenta(group, batch[own], buffers[own], apply))

            def update(
                x: Tensor, batch: list[Tensor] = batch, layout: StackLayout = layout, like: Tensor = nesterov
            ) -> None:
                directions = x.to(like.dtype).view(-1, *like.shape[1:])
                factors = None
                if group["normalize_rows"]:
                    factors = self._row_factors(group, batch, directions, layout)
                directions = layout.shards(directions)
                parameters = [local(p) for p in batch]
                retained = 1 - apply.to(directions.dtype) * (group["lr"] * group["weight_decay"])
                if directions.ndim > 3:
                    # FSDP2 shards the first dimension, so that matrices of a stack are never split.
                    retained = torch.where(any_nonzero(directions), retained, 1.0)
                    torch._foreach_mul_(parameters, list(retained.unbind()))
                else:
                    torch._foreach_mul_(parameters, retained)
                if factors is not None:
                    directions = directions * layout.shard_rows(factors).unsqueeze(-1)
                rate = group["lr"] * update_scale(batch[0].shape)
                torch._foreach_add_(parameters, list(directions.unbind()), alpha=-rate)

            yield normalized(nesterov), update

    def _with_kernels(
        self, index: int, group: dict[str, Any], batches: list[Batch], arguments: KernelArguments
    ) -> Iterator[_Halves]:
        """Do what `_with_pytorch` does, reading memory once before the matrix products and once after."""
        from . import muon_kernels

        table, numbers, alignment = arguments.of(index)
        device = table.device
        found_inf = self.found_inf if self.found_inf is not None else torch.zeros((), device=device)
        constants = {"ALIGNMENT": alignment, "BLOCK": _BLOCK, "num_warps": _WARPS}
        normalize = bool(group["normalize_rows"])
        first = 0
        # Triton launches kernels on the current device.
        with torch.cuda.device_of(table):
            for (batch, own, counts), of_step in zip(batches, numbers, strict=False):
                shape = batch[0].shape
                stack = shape[:-2].numel()
                count = len(batch[own]) * stack
                nesterov = torch.empty((count, *shape[-2:]), dtype=torch.bfloat16, device=device)
                x = torch.empty_like(nesterov, dtype=torch.float16)
                size = shape[-2] * shape[-1]
                blocks = -(-size // _BLOCK)
                layout = table.shape[1], stack, size, blocks
                sums, nonzero = torch.empty((2, count, blocks), device=device)
                if count:
                    muon_kernels.update_momentum[(count * blocks,)](
                        table, found_inf, of_step, nesterov, sums, nonzero, first + own.start, *layout,
                        **constants,
                    )  # fmt: skip
                    norms = sums.sum(-1).sqrt_().clamp_(min=MIN_NORM)
                    muon_kernels.normalize[(count * blocks,)](
                        nesterov, norms, x, size, blocks, BLOCK=_BLOCK, num_warps=_WARPS
                    )
                del nesterov
                active = nonzero.sum(-1) if len(shape) > 2 else torch.ones(len(batch), device=device)
                if counts is not None and len(shape) > 2:
                    # The other ranks see from the orthogonal factor, then zero, that it is not updated.
                    x *= active.ne(0).view(-1, 1, 1)

                def update(
                    directions: Tensor,
                    batch: list[Tensor] = batch,
                    of_step: Tensor = of_step,
                    active: Tensor = active,
                    shared: bool = counts is not None and len(shape) > 2,
                    programs: int = len(batch) * stack * blocks,
                    rest: tuple[int, ...] = (shape[-1], first, *layout),
                ) -> None:
                    if shared:
                        active = any_nonzero(directions).float()
                    factors = active
                    if normalize:
                        stacks = directions.view(len(batch), *batch[0].shape)
                        factors = self._row_factors(group, batch, stacks, StackLayout(len(batch), batch[0]))
                    muon_kernels.update_parameters[(programs,)](
                        table, found_inf, of_step, active, factors, directions, *rest,
                        NORMALIZE=normalize, **constants,
                    )  # fmt: skip

                yield x, update
                first += len(batch)

    def _adamw(self, index: int, group: dict[str, Any], parameters: list[Tensor]) -> None:
        fused = group["fused"]
        gradients, _, averages, squares, steps = self._adamw_tensors(group, parameters)
        lr = group["lr"]
        if self._arguments is not None and parameters[0].is_cuda:
            lr = self._arguments.of(index)[1][0, 0]
        adamw(
            parameters,
            gradients,
            averages,
            squares,
            [],
            steps,
            fused=fused,
            foreach=not fused,
            found_inf=self.found_inf if fused else None,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=lr,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _adamw_tensors(self, group: dict[str, Any], parameters: list[Tensor]) -> list[list[Tensor]]:
        """Return gradients, parameters, both moments and step counts."""
        for p in parameters:
            if not self.state[p]:
                # The fused kernel keeps the step count on the device of the parameter.
                device = p.device if group["fused"] else torch.device("cpu")
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=device)
        names = ("exp_avg", "exp_avg_sq", "step")
        gradients: list[Tensor] = [p.grad for p in parameters]  # type: ignore[misc]
        return [gradients, parameters, *([self._state(p, name) for p in parameters] for name in names)]

    def _state(self, parameter: Tensor, name: str) -> Tensor:
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state[name]
