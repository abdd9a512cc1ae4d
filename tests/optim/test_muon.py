"""Muon against a float64 reference; orthogonal updates, skipped updates, checkpoints."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import distributed as dist
from torch import nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from minimind.checkpoint.state_dict import gather_state_dict, load_state_dict
from minimind.checkpoint.store import CheckpointStore
from minimind.config.options import PretrainConfig
from minimind.distributed.gradient_reduction import GradientReduction
from minimind.modeling.config import MiniMindConfig
from minimind.modeling.transformer import MiniMindForCausalLM
from minimind.optim import matrix_batches
from minimind.optim.build import (
    build_optimizer,
    embedding_lr_scale,
    fit_to_horizon,
    set_schedule,
    skip_if_nonfinite,
)
from minimind.optim.matrix_batches import batches_by_shape
from minimind.optim.muon import Muon
from minimind.optim.orthogonalize import assign, newton_schulz, orthogonalize
from minimind.training.pretrain import pretrain
from support import muon_cases, topologies
from support.fused_cases import error

CONFIG = PretrainConfig(optimizer="muon", learning_rate=1e-2, weight_decay=0.3, beta1=0.8, beta2=0.9)

# The relative error of an update whose momentum was rounded to bf16, and orthogonalized in fp16, is 0.004 to
# 0.008.
ROUNDING = 0.012
MATRICES = 2 * len(muon_cases.SHAPES["cpu"])


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    topologies.forget_accelerator()
    yield
    topologies.forget_accelerator()


def tiny(*, tied: bool = True, seed: int = 0) -> MiniMindForCausalLM:
    torch.manual_seed(seed)
    return MiniMindForCausalLM(
        MiniMindConfig(
            vocab_size=29,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=24,
            tie_word_embeddings=tied,
        )
    )


def backward(model: nn.Module, seed: int) -> torch.Tensor:
    """Put a gradient on the parameters and return its norm."""
    ids = torch.randint(0, 29, (2, 9), generator=torch.Generator().manual_seed(seed))
    model(ids, labels=ids).loss.backward()
    return nn.utils.get_total_norm([p.grad for p in model.parameters()])


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    skip_if_nonfinite(optimizer, backward(model, seed))
    optimizer.step()
    optimizer.zero_grad()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    state = getattr(optimizer, "optimizer", optimizer).state
    kept = [p.detach().clone() for p in model.parameters()]
    return kept + [state[p][key].clone() for p in model.parameters() for key in sorted(state.get(p, ()))]


def is_hidden(name: str) -> bool:
    return name.endswith("_proj.weight")


@pytest.mark.parametrize("tied", [True, False])
def test_hidden_matrices_go_to_muon_and_all_else_to_adamw(tied: bool) -> None:
    model = tiny(tied=tied)
    groups = build_optimizer(model, CONFIG, "cpu").param_groups
    found = {name: (g["algorithm"], g["weight_decay"]) for g in groups for name in g["param_names"]}
    for name, _ in model.named_parameters():
        output = ("adamw", 0.3) if name == "lm_head.weight" else ("adamw", 0.0)
        assert found.pop(name) == (("muon", 0.3) if is_hidden(name) else output)
    assert not found


def test_routers_go_to_adamw_and_stacked_experts_to_muon() -> None:
    config = MiniMindConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, use_moe=True)
    groups = build_optimizer(MiniMindForCausalLM(config), CONFIG, "cpu").param_groups
    found = {name: (g["algorithm"], g["weight_decay"]) for g in groups for name in g["param_names"]}
    assert found["model.layers.0.mlp.gate.weight"] == ("adamw", 0.3)
    # At the rate that AdamW has by default beside that of Muon.
    slower = {name: g["lr_scale"] for g in groups if "lr_scale" in g for name in g["param_names"]}
    assert slower == {"model.layers.0.mlp.gate.weight": 5e-4 / 4e-3}
    for projection in ("gate_proj", "up_proj", "down_proj"):
        assert found[f"model.layers.0.mlp.experts.{projection}"] == ("muon", 0.3)


def test_an_output_matrix_of_another_name_goes_to_adamw() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 7, bias=False)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    groups = build_optimizer(Named(), CONFIG, "cpu").param_groups
    found = {name: g["algorithm"] for g in groups for name in g["param_names"]}
    assert found == {"inner.weight": "muon", "head.weight": "adamw"}


@pytest.mark.parametrize("stacks", [1, 2])
def test_stacked_matrices_are_updated_independently(stacks: int) -> None:
    torch.manual_seed(0)
    whole = [nn.Parameter(torch.randn(3, 10, 24)) for _ in range(stacks)]
    single = [nn.Parameter(matrix.detach().clone()) for stack in whole for matrix in stack]
    optimizers = [
        Muon([{"params": p, "algorithm": "muon", "weight_decay": 0.1}], lr=0.1) for p in (whole, single)
    ]
    for _ in range(3):
        for stack in whole:
            stack.grad = torch.randn_like(stack)
        for matrix, grad in zip(single, [g for stack in whole for g in stack.grad], strict=True):
            matrix.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(
        torch.cat([p.detach() for p in whole]), torch.stack([p.detach() for p in single])
    )


def test_a_matrix_without_a_gradient_is_not_updated() -> None:
    torch.manual_seed(0)
    some = [nn.Parameter(torch.randn(5, 8)) for _ in range(3)]
    optimizer = Muon([{"params": some, "algorithm": "muon"}], lr=0.1)
    for without in (None, 0, 2, None):
        before = [p.detach().clone() for p in some]
        for index, p in enumerate(some):
            p.grad = None if index == without else torch.randn_like(p)
        optimizer.step()
        stood = [torch.equal(p, old) for p, old in zip(some, before, strict=True)]
        assert stood == [index == without for index in range(3)]


def stacks() -> list[nn.Parameter]:
    """Return two stacks of experts and a matrix, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 5, 8), (3, 5, 8), (6, 8))]


def steps_with_an_idle_expert(parameters: list[nn.Parameter], whole: bool = True) -> Iterator[Muon]:
    """Yield after each of some steps, in all but the first of which expert 1 of the first stack is idle."""
    group = {"params": parameters, "algorithm": "muon", "weight_decay": 0.1, "normalize_rows": True}
    optimizer = Muon([group], lr=0.1)
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        for p in parameters:
            grad = torch.randn(p.shape, generator=generator)
            if step > 0 and p is parameters[0]:
                grad[1] = 0.0
            p.grad = grad if whole else distribute_tensor(grad, p.device_mesh, p.placements)
        optimizer.step()
        yield optimizer


def test_an_expert_without_tokens_is_not_updated_by_its_old_momentum() -> None:
    some = stacks()
    before, momentum = some[0].detach().clone(), torch.zeros(5, 8)
    for step, optimizer in enumerate(steps_with_an_idle_expert(some)):
        moved = (some[0].detach() - before).flatten(1).norm(dim=1)
        assert moved[[0, 2]].min() > 0.1
        assert (moved[1] == 0) == (step > 0)
        buffer = optimizer.state[some[0]]["momentum_buffer"][1]
        if step > 0:
            torch.testing.assert_close(buffer, 0.95 * momentum)
        before, momentum = some[0].detach().clone(), buffer.clone()


def test_a_step_without_gradients_for_all_experts_changes_none() -> None:
    weight = stacks()[0]
    optimizer = Muon([{"params": [weight], "algorithm": "muon", "weight_decay": 0.1}], lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, before)


# Numbers of matrices and of rows that three ranks do not share evenly.
SHARED_SHAPES = [(7, 5), (7, 5), (4, 9), (2, 3), (6, 6), (6, 6), (6, 6), (6, 6), (5, 4, 3)]


def steps_of_matrices(
    parameters: list[nn.Parameter], group: dist.ProcessGroup | None = None
) -> list[torch.Tensor]:
    """Take three steps of NorMuon with gradients that are the same however the parameters are sharded.

    Args:
        group: ranks that share the work; their gradients are summed only where they are needed.

    Returns:
        The parameters, followed by the momenta.
    """
    groups = [{"params": parameters, "algorithm": "muon", "weight_decay": 0.1, "normalize_rows": True}]
    optimizer = Muon(groups, lr=0.1, process_group=group)
    owners = optimizer.owners
    for step in range(3):
        generator = torch.Generator().manual_seed(10 + step)
        for p in parameters:
            gradient = torch.randn(p.shape, generator=generator)
            if isinstance(p, DTensor):
                gradient = distribute_tensor(gradient, p.device_mesh, p.placements)
            p.grad = gradient
        if group is not None:
            # Ranks 0 to 2 have a sixth, a third and a half of the gradient.
            torch._foreach_mul_([p.grad for p in parameters], (1 + group.rank()) / 6)
            before = [p.grad.clone() for p in parameters]
            with GradientReduction(parameters, group, overlap=False, owners=owners):
                pass
            others = [i for i, p in enumerate(parameters) if owners[id(p)] != group.rank()]
            assert others
            assert all(torch.equal(parameters[i].grad, before[i]) for i in others)
        optimizer.step()
    optimizer.gather_momenta()
    return [*parameters, *(optimizer.state[p]["momentum_buffer"] for p in parameters)]


def check_sums_for_all_ranks(rank: int) -> None:
    """Sum gradients that belong to no rank, of which ranks 0 to 2 have 1, 2 and 3."""
    some = [nn.Parameter(torch.zeros(shape)) for shape in ((4,), (3, 2))]
    reduction = GradientReduction(some, dist.group.WORLD, torch.bfloat16, overlap=False)
    for p in some:
        p.grad = torch.full_like(p, rank + 1.0)
    memory = [p.grad.data_ptr() for p in some]
    reduction.reduce()
    assert [p.grad.data_ptr() for p in some] == memory
    assert all(p.grad.dtype == torch.float32 and bool((p.grad == 6).all()) for p in some)


def random_matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHARED_SHAPES]


def train_on_three_ranks(rank: int, store: str, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    mesh = init_device_mesh("cpu", (3,))

    def sharded(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        return [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in parameters]

    check_sums_for_all_ranks(rank)
    shards = sharded(stacks())
    for _ in steps_with_an_idle_expert(shards, whole=False):
        pass
    rows = steps_of_matrices(sharded(random_matrices()))
    found = {
        "stacks": [p.full_tensor() for p in shards],
        "rows": [p.full_tensor() for p in rows],
        "shared": [p.detach() for p in steps_of_matrices(random_matrices(), dist.group.WORLD)],
    }
    torch.save(found, f"{file}{rank}")
    # A process whose peer has left already may abort in gloo's threads.
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.alone
def test_ranks_that_share_the_work_make_the_updates_of_one_process(tmp_path: Path) -> None:
    file = str(tmp_path / "found")
    torch.multiprocessing.spawn(train_on_three_ranks, (str(tmp_path / "store"), file), nprocs=3)
    whole = stacks()
    for _ in steps_with_an_idle_expert(whole):
        pass
    matrices = steps_of_matrices(random_matrices())
    first = torch.load(f"{file}0")
    for name, expected in (("stacks", whole), ("rows", matrices), ("shared", matrices)):
        for ours, wanted in zip(first[name], expected, strict=True):
            torch.testing.assert_close(ours, wanted.detach(), rtol=0, atol=2e-6)
        for rank in (1, 2):
            assert all(map(torch.equal, torch.load(f"{file}{rank}")[name], first[name]))


def test_few_matrices_at_once_give_the_same_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = steps_of_matrices(random_matrices())
    monkeypatch.setattr(matrix_batches, "LARGEST_BATCH", 2 * 6 * 6)
    some = random_matrices()
    for ours, wanted in zip(steps_of_matrices(some), expected, strict=True):
        assert torch.equal(ours, wanted)
    batches = batches_by_shape(some, {}, None)
    assert max(sum(p.numel() for p in batch.parameters) for batch in batches) <= 2 * 6 * 6
    assert sorted(id(p) for batch in batches for p in batch.parameters) == sorted(map(id, some))


class Ranks:
    """Stands for the second of three ranks."""

    rank = 1

    def owned_by(self, owners: list[int]) -> list[int]:
        return [owners.count(rank) for rank in range(3)]


def test_every_rank_has_a_share_of_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_batches, "LARGEST_BATCH", 2 * 20)
    some = [nn.Parameter(torch.zeros(4, 5)) for _ in range(15)]
    # Five for each rank, those of the first rank first.
    owners = {id(p): index // 5 for index, p in enumerate(some)}
    batches = batches_by_shape(some, owners, Ranks())  # type: ignore[arg-type]
    assert sorted(batch.counts or [] for batch in batches) == [[1, 1, 1], [2, 2, 2], [2, 2, 2]]
    for batch in batches:
        assert [owners[id(p)] for p in batch.parameters] == sorted(owners[id(p)] for p in batch.parameters)
        assert {owners[id(p)] for p in batch.parameters[batch.own]} == {1}
        assert len(batch.parameters[batch.own]) == (batch.counts or [])[1]


@pytest.mark.parametrize(
    ("costs", "ranks"), [([5, 4, 3, 3, 3], 2), ([8, *[1] * 8], 2), ([1, 1], 3), ([7.0], 1)]
)
def test_each_matrix_has_one_rank_and_none_much_more_than_its_share(costs: list[float], ranks: int) -> None:
    items = assign(costs, ranks)
    assert sorted(item for own in items for item in own) == list(range(len(costs)))
    largest = max(sum(costs[item] for item in own) for own in items)
    assert largest <= 4 / 3 * max(*costs, sum(costs) / ranks)


def test_a_vector_is_refused_for_muon() -> None:
    with pytest.raises(ValueError, match="matrices"):
        Muon([{"params": [nn.Parameter(torch.ones(3))], "algorithm": "muon"}], lr=0.1)


@pytest.mark.parametrize("name_of_optimizer", ["muon", "normuon"])
def test_updates_equal_the_algorithms_written_out_in_float64(name_of_optimizer: str) -> None:
    """One matrix at a time, momentum as a plain sum, the quintic by powers; and AdamW as in its paper."""
    model = tiny(tied=False).double()
    optimizer = build_optimizer(
        model, dataclasses.replace(CONFIG, optimizer=name_of_optimizer, learning_rate=1e-2), "cpu"
    )
    set_schedule(optimizer, 3e-3)
    rows = {name: torch.zeros(p.shape[0]).double() for name, p in model.named_parameters() if is_hidden(name)}
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    sums = {name: torch.zeros_like(p) for name, p in expected.items()}
    squares = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step in range(1, 5):
        norm = backward(model, step)
        for name, p in model.named_parameters():
            g = p.grad
            decay = 0.3 if is_hidden(name) or name == "lm_head.weight" else 0.0
            expected[name] *= 1 - 3e-3 * decay
            if is_hidden(name):
                sums[name] = 0.95 * sums[name] + g
                x = g + 0.95 * sums[name]
                x = x / torch.linalg.matrix_norm(x)
                for _ in range(5):
                    x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
                if name_of_optimizer == "normuon":
                    rows[name] = 0.95 * rows[name] + 0.05 * (x * x).mean(1)
                    scaled = x / (rows[name].sqrt() + 1e-8)[:, None]
                    x = scaled * torch.linalg.matrix_norm(x) / torch.linalg.matrix_norm(scaled)
                expected[name] -= 3e-3 * 0.2 * math.sqrt(max(p.shape)) * x
            else:
                sums[name] = 0.8 * sums[name] + 0.2 * g
                squares[name] = 0.9 * squares[name] + 0.1 * g**2
                root = (squares[name] / (1 - 0.9**step)).sqrt() + 1e-8
                expected[name] -= 3e-3 * (sums[name] / (1 - 0.8**step)) / root
        skip_if_nonfinite(optimizer, norm)
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-8, atol=1e-11)


def test_normuon_evens_out_the_rows_of_an_update_and_keeps_its_norm() -> None:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.zeros(12, 6)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
        weight.grad[0] *= 1e-3
    for weight, normalize in zip(weights, (False, True), strict=True):
        Muon([{"params": [weight], "algorithm": "muon", "normalize_rows": normalize}], lr=0.1).step()
    plain, normalized = (weight.detach() for weight in weights)
    torch.testing.assert_close(normalized.norm(), plain.norm())
    norms = normalized.norm(dim=1)
    assert norms.max() / norms.min() < 1.001 < plain.norm(dim=1).max() / plain.norm(dim=1).min()
    torch.testing.assert_close(nn.functional.cosine_similarity(normalized, plain), torch.ones(12))


def test_short_runs_move_the_embedding_faster_and_resume_with_the_values_of_their_beginning() -> None:
    model = tiny()
    optimizer = build_optimizer(model, dataclasses.replace(CONFIG, optimizer="normuon"), "cpu")
    muon, others = optimizer.param_groups[0], optimizer.param_groups[1]
    fit_to_horizon(optimizer, 1600)
    assert others["lr_scale"] == 5.0
    assert muon["momentum_warmup"] == 240
    expected = {0: 0.85, 120: 0.9, 240: 0.95, 5000: 0.95}
    for step, momentum in expected.items():
        set_schedule(optimizer, 0.01, step)
        assert muon["momentum"] == pytest.approx(momentum)
        assert others["lr"] == pytest.approx(0.05)
        assert muon["lr"] == 0.01
    assert [embedding_lr_scale(steps) for steps in (1, 1111, 10_000, 40_000, 10**7)] == [6, 6, 2, 1, 1]
    assert [embedding_lr_scale(100, epochs) for epochs in (0.5, 1, 4, 8, 16)] == [6, 6, 6, 1.5, 1]
    plain = build_optimizer(model, CONFIG, "cpu")
    fit_to_horizon(plain, 1600)
    assert not any(key in group for group in plain.param_groups for key in ("lr_scale", "momentum_warmup"))


@pytest.mark.parametrize(
    ("learning_rate", "width", "embedding_lr"),
    [
        pytest.param(0.01, 256, 0.05, id="narrow"),
        pytest.param(0.004, 512, 0.02, id="as wide as the anchor"),
        pytest.param(0.0095, 1024, 0.005, id="wide, below the rate of the matrices"),
        pytest.param(0.0005, 1024, 0.0025, id="wide, at a low rate"),
    ],
)
def test_wide_models_have_a_lower_learning_rate_of_the_embedding(
    learning_rate: float, width: int, embedding_lr: float
) -> None:
    with torch.device("meta"):
        model = MiniMindForCausalLM(
            MiniMindConfig(vocab_size=29, hidden_size=width, num_hidden_layers=1, num_attention_heads=4)
        )
    config = dataclasses.replace(CONFIG, optimizer="normuon", learning_rate=learning_rate)
    optimizer = build_optimizer(model, config, "cpu")
    fit_to_horizon(optimizer, 1600)
    set_schedule(optimizer, learning_rate, 0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([learning_rate, embedding_lr])


def test_the_first_steps_of_a_wide_model_do_not_raise_its_loss() -> None:
    torch.manual_seed(0)
    model = MiniMindForCausalLM(
        MiniMindConfig(
            vocab_size=64, hidden_size=1024, num_hidden_layers=1, num_attention_heads=8, intermediate_size=64
        )
    )
    # The rate and the warm-up of the rules for 184 steps of 65,536 tokens.
    config = dataclasses.replace(CONFIG, optimizer="normuon", learning_rate=0.0095)
    optimizer = build_optimizer(model, config, "cpu")
    fit_to_horizon(optimizer, 184)
    losses = []
    for step in range(5):
        set_schedule(optimizer, config.peak_learning_rate * min((step + 1) / 4, 1), step)
        tokens = torch.multinomial(1 / torch.arange(1, 65.0), 4 * 32, replacement=True).view(4, 32)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    # At the rate of a narrow one it is 16 after four steps.
    assert max(losses) < losses[0] + 0.5


@pytest.mark.parametrize("shape", [(3, 48, 48), (2, 64, 24), (2, 24, 64)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_singular_values_of_an_update_are_near_one_and_vectors_are_kept(
    shape: tuple[int, int, int], scale: float
) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape) * scale
    result = orthogonalize(matrices)
    values = torch.linalg.svdvals(result)
    # A square Gaussian matrix has a few singular values near zero, which five steps do not bring up.
    assert values.max() < 1.25
    assert values.quantile(0.1) > 0.6
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    along = (u.mT @ result @ v.mT).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(along, values.flip(-1).sort(descending=True).values, atol=0.6, rtol=0)
    torch.testing.assert_close(along.square().sum(-1), result.square().sum((-2, -1)), rtol=1e-3, atol=1e-3)


def iterated(matrices: torch.Tensor) -> torch.Tensor:
    """Return five steps of a·x + b·x·xᵀ·x + c·x·xᵀ·x·xᵀ·x from the normalized matrices."""
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.mT @ x + 2.0315 * x @ x.mT @ x @ x.mT @ x
    return x


def with_singular_values(values: torch.Tensor, columns: int) -> torch.Tensor:
    u, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, len(values), dtype=torch.float64))
    return u * values @ v.mT


SPECTRA = {
    "equal": torch.ones(96),
    "over two decades": torch.logspace(0, -2, 96),
    "over four decades": torch.logspace(0, -4, 96),
    "harmonic": 1 / torch.arange(1, 97),
    "rank 8": (torch.arange(96) < 8).float(),
}


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("columns", [96, 250])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_products_of_gram_matrices_are_the_newton_schulz_iteration(
    spectrum: str, columns: int, tall: bool
) -> None:
    torch.manual_seed(0)
    matrix = with_singular_values(SPECTRA[spectrum].double(), columns)
    matrix = (matrix.mT if tall else matrix)[None]
    exact = iterated(matrix)
    torch.testing.assert_close(orthogonalize(matrix), exact, atol=1e-9, rtol=0)

    assert error(orthogonalize(matrix.float()), exact) < 1e-4
    # In the precision of a GPU; the iteration on x in bf16 is off by 0.02 to 0.35.
    assert error(newton_schulz((matrix / matrix.norm()).half()), exact) < 0.05


def test_matrices_in_half_precision_are_orthogonalized_in_float32_on_a_cpu() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(2, 24, 64, dtype=torch.bfloat16)
    result = orthogonalize(matrices)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, orthogonalize(matrices.float()).bfloat16())


def test_the_update_is_as_large_as_one_of_adamw() -> None:
    """A first AdamW update is ±1 everywhere and later ones about 0.2 (Liu et al. 2025)."""
    weight = nn.Parameter(torch.zeros(96, 32))
    optimizer = Muon([{"params": [weight], "algorithm": "muon"}], lr=1.0)
    torch.manual_seed(0)
    weight.grad = torch.randn(96, 32)
    optimizer.step()
    assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_nonfinite_gradient_changes_nothing(bad: float, prepared: bool) -> None:
    model = tiny()
    optimizer = build_optimizer(model, CONFIG, "cpu")
    if prepared:
        optimizer = Accelerator(cpu=True).prepare(optimizer)
    take_step(model, optimizer, 1)
    before = snapshot(model, optimizer)
    assert len(before) > 2 * len(list(model.parameters()))

    backward(model, 2)
    model.model.layers[0].mlp.up_proj.weight.grad[0, 0] = bad
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    skip_if_nonfinite(optimizer, norm)
    optimizer.step()
    optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(model, optimizer), strict=True))

    take_step(model, optimizer, 2)
    after = snapshot(model, optimizer)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.isfinite(value).all() for value in after)


def test_a_gradient_scaler_skips_overflows_and_unscales() -> None:
    def after(scaler: GradScaler | None) -> list[torch.Tensor]:
        model = tiny()
        optimizer = build_optimizer(model, CONFIG, "cpu")
        for seed in (1, 2, 3):
            ids = torch.randint(0, 29, (2, 9), generator=torch.Generator().manual_seed(seed))
            loss = model(ids, labels=ids).loss
            if scaler is None:
                if seed != 2:
                    loss.backward()
                    optimizer.step()
            else:
                scaler.scale(loss).backward()
                if seed == 2:
                    model.model.norm.weight.grad[0] = math.inf
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
        return snapshot(model, optimizer)

    scaler = GradScaler("cpu", init_scale=1024.0)
    for ours, wanted in zip(after(scaler), after(None), strict=True):
        torch.testing.assert_close(ours, wanted)
    assert scaler.get_scale() == 512.0


def test_a_resumed_run_takes_identical_steps(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, optimizer="normuon")

    def start(seed: int):
        topologies.forget_accelerator()
        accelerator = Accelerator(cpu=True)
        model = tiny(seed=seed)
        optimizer = build_optimizer(model, config, "cpu")
        # Another horizon on the resume.
        fit_to_horizon(optimizer, 1600 * (1 + seed))
        return accelerator, *accelerator.prepare(model, optimizer)

    accelerator, model, optimizer = start(0)
    for seed in range(3):
        take_step(model, optimizer, seed)
    taken = gather_state_dict(accelerator, model, optimizer, {"step": 3})
    assert taken is not None
    assert {key.rpartition("|")[2] for key in taken.optimizer_state} == {
        *("momentum_buffer", "row_mean_square", "step", "exp_avg", "exp_avg_sq")
    }
    store = CheckpointStore(tmp_path, 1)
    store.save(taken)
    store.wait()
    for seed in range(3, 6):
        take_step(model, optimizer, seed)
    wanted = snapshot(model, optimizer)

    accelerator, model, optimizer = start(9)
    load_state_dict(accelerator, model, optimizer, store.open(tmp_path / "step-00000003"))
    again = gather_state_dict(accelerator, model, optimizer, {"step": 3})
    assert again is not None
    for kind in ("weights", "optimizer_state"):
        for name, tensor in getattr(taken, kind).items():
            assert torch.equal(tensor, getattr(again, kind)[name]), name
    groups = [json.loads(json.dumps(x.trainer["param_groups"])) for x in (taken, again)]
    assert groups[0] == groups[1]
    for seed in range(3, 6):
        take_step(model, optimizer, seed)
    assert all(torch.equal(a, b) for a, b in zip(wanted, snapshot(model, optimizer), strict=True))


def test_each_group_has_its_share_of_the_learning_rate() -> None:
    """A group of scale zero stands still while the others move."""
    model = tiny()
    optimizer = build_optimizer(model, CONFIG, "cpu")
    optimizer.param_groups[0]["lr_scale"] = 0.0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    set_schedule(optimizer, 0.1)
    take_step(model, optimizer, 1)
    for name, p in model.named_parameters():
        assert torch.equal(before[name], p) == is_hidden(name), name


@pytest.mark.slow
def test_muon_learns_faster_than_adamw_at_its_better_rate(shared: Path, tmp_path: Path) -> None:
    def loss(optimizer: str, rate: float) -> float:
        result = pretrain(
            PretrainConfig(
                data=(str(shared / "data" / "en.jsonl"),),
                cache_dir=str(tmp_path / "cache"),
                output_dir=str(tmp_path / f"{optimizer}-{rate}"),
                val_fraction=0.05,
                # 320 entries, which take less time than 6400.
                tokenizer=str(Path(__file__).parents[1] / "golden" / "tokenizer.json"),
                optimizer=optimizer,
                learning_rate=rate,
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_seq_len=128,
                batch_size=8,
                max_steps=80,
                eval_batches=25,
                save_interval=1000,
                compile=False,
                tracker=("none",),
            )
        )
        assert result.val_loss is not None
        return result.val_loss

    adamw = min(loss("adamw", rate) for rate in (8e-3, 16e-3))
    assert loss("muon", 8e-3) < adamw - 0.3


def check_kernels(found: dict[str, dict[str, float]]) -> None:
    assert len(found["updates"]) == 2 * muon_cases.STEPS * MATRICES
    assert len(found["momenta"]) == 2 * MATRICES
    assert {case: error for case, error in found["updates"].items() if not error < ROUNDING} == {}
    assert {case: error for case, error in found["momenta"].items() if not error < 1e-6} == {}
    assert {case: error for case, error in found.get("products", {}).items() if not error < 1e-3} == {}
    assert [case for case, holds in found["properties"].items() if not holds] == []
    assert found["properties"]


def interpreted(*options: str) -> Any:
    """Return what `muon_cases.py` prints, a JSON value."""
    if find_spec("triton") is None or not version("triton").startswith("3.6."):
        pytest.skip("needs triton 3.6: pip install '.[interpreter]'")
    command = [sys.executable, "-m", "support.muon_cases", *options]
    tests = Path(muon_cases.__file__).parents[1]
    path = os.pathsep.join((str(tests), *sys.path))
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_interpreted_kernels_agree_with_plain_pytorch() -> None:
    found = interpreted("--interpret")
    assert len(found["products"]) == 12
    check_kernels(found)


@pytest.mark.slow
@pytest.mark.alone
def test_ranks_that_share_the_work_of_the_kernels_make_the_updates_of_one_process() -> None:
    ranks = interpreted("--shared")
    assert len(ranks) == 2
    for found in ranks:
        assert len(found) == 2 * (1 + MATRICES * (muon_cases.STEPS + 1))
        assert {case: error for case, error in found.items() if not error < 1e-6} == {}
