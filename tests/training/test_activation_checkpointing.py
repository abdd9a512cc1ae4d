"""Recomputing blocks in the backward pass: the same gradients from less memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from minimind.config.options import PretrainConfig
from minimind.data.batch_plan import BatchPlan
from minimind.distributed.accelerator import start_accelerator
from minimind.errors import ConfigError
from minimind.modeling.config import MiniMindConfig
from minimind.modeling.transformer import MiniMindForCausalLM
from minimind.training.build_model import compile_and_wrap
from minimind.training.compilation import compile_mode
from support import topologies


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    topologies.forget_accelerator()
    yield
    topologies.forget_accelerator()


def model(*, recompute: bool, dropout: float = 0.0, layers: int = 3) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    made = MiniMindForCausalLM(
        MiniMindConfig(
            vocab_size=61,
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            dropout=dropout,
        )
    )
    made.model.recompute = recompute
    return made.train()


def loss_of(made: MiniMindForCausalLM, *, packed: bool = False) -> torch.Tensor:
    ids = torch.randint(0, 61, (4, 48), generator=torch.Generator().manual_seed(1))
    documents = (torch.arange(48) // 20).expand(4, 48) if packed else None
    torch.manual_seed(7)  # of dropout
    loss = made(ids, shift_labels=ids.roll(-1, 1), document_ids=documents).loss
    assert loss is not None
    return loss


def saved_bytes(made: MiniMindForCausalLM) -> int:
    """Bytes of the tensors that wait for the backward pass, each memory once, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in made.parameters()}
    held: dict[int, int] = {}
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(made)
    return sum(held.values())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradients_are_the_same(dropout: float, packed: bool) -> None:
    plain, thrifty = (model(recompute=wanted, dropout=dropout) for wanted in (False, True))
    losses = [loss_of(made, packed=packed) for made in (plain, thrifty)]
    assert losses[0].item() == losses[1].item()
    for loss in losses:
        loss.backward()
    for (name, one), other in zip(plain.named_parameters(), thrifty.parameters(), strict=True):
        torch.testing.assert_close(
            one.grad, other.grad, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_block_more_costs_one_tensor_and_not_all_that_it_computes() -> None:
    def per_block(*, recompute: bool) -> float:
        return saved_bytes(model(recompute=recompute, layers=4)) - saved_bytes(
            model(recompute=recompute, layers=3)
        )

    stream = 4 * 48 * 32 * 4
    assert per_block(recompute=True) == stream
    assert per_block(recompute=False) > 8 * stream


def test_evaluation_does_not_go_through_it() -> None:
    made = model(recompute=True).eval()
    assert saved_bytes(made) == saved_bytes(model(recompute=False).eval())


@pytest.mark.parametrize("wanted", [False, True])
def test_the_option_reaches_the_model(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config = PretrainConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, activation_checkpointing=wanted
    )
    shape = MiniMindConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    made, _, _ = compile_and_wrap(config, shape, BatchPlan(32, 1, 1), start_accelerator(config))
    assert made.model.recompute is wanted


@pytest.mark.parametrize(
    ("processes", "recompute", "fused", "mode"),
    [
        (1, False, False, "whole"),
        (2, False, False, "blocks"),
        (1, True, False, "blocks"),
        (1, False, True, "blocks"),
    ],
)
def test_one_graph_is_made_where_nothing_speaks_for_blocks(
    processes: int, recompute: bool, fused: bool, mode: str
) -> None:
    config = PretrainConfig(activation_checkpointing=recompute)
    assert compile_mode(config, processes, fused=fused) == mode


@pytest.mark.slow
def test_compiled_blocks_are_recomputed_too() -> None:
    plain, thrifty = model(recompute=False), model(recompute=True)
    thrifty.compile_for_training("blocks")
    for made in (plain, thrifty):
        loss_of(made).backward()
    for one, other in zip(plain.parameters(), thrifty.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_fsdp_is_left_to_do_it_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Accelerator, "is_fsdp2", True)
    with pytest.raises(ConfigError, match="--fsdp_activation_checkpointing"):
        start_accelerator(PretrainConfig(activation_checkpointing=True))
