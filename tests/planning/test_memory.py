"""The estimate of memory against the tensors that autograd holds, and against sums done by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from minimind.config.options import PretrainConfig
from minimind.modeling.config import MiniMindConfig
from minimind.modeling.parameter_count import PARTS, count_parts
from minimind.modeling.transformer import MiniMindForCausalLM
from minimind.optim import matrix_batches
from minimind.optim.build import build_optimizer
from minimind.planning import memory
from minimind.planning.memory import (
    Compiled,
    MemoryEstimate,
    activation_bytes_per_token_layer,
    estimate_memory,
    optimizer_bytes,
)

# Widths that all differ, so that none can stand in for another.
SHAPE = MiniMindConfig(
    vocab_size=300,
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=24,
    intermediate_size=160,
)
SEQUENCES, LENGTH = 2, 64
# The trace of a compiled run without its kernels, which takes no compiler: what it stores is the same.
TRACED = "aot_eager_decomp_partition"


EXPERTS = {"use_moe": True, "num_experts": 5, "moe_intermediate_size": 88}


def stored_bytes(
    layers: int,
    compiled: Compiled,
    *,
    half: bool,
    recompute: bool = False,
    shape: MiniMindConfig = SHAPE,
) -> int:
    """Count what the backbone stores for the backward pass, without the parameters and their copies."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = MiniMindForCausalLM(dataclasses.replace(shape, num_hidden_layers=layers)).model.train()
    model.recompute = recompute
    if compiled == "whole":
        model.compile(backend=TRACED, fullgraph=True, dynamic=False)
    elif compiled == "blocks":
        for layer in model.layers:
            layer.compile(backend=TRACED, fullgraph=True, dynamic=False)
    stored: dict[int, torch.Tensor] = {}
    sizes = {shape for p in model.parameters() for shape in (tuple(p.shape), tuple(p.shape)[::-1])}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) not in sizes:
            stored[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, SHAPE.vocab_size, (SEQUENCES, LENGTH))
    positions = torch.arange(LENGTH, dtype=torch.int32).repeat(SEQUENCES, 1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            model(ids, positions)
    return sum(tensor.untyped_storage().nbytes() for tensor in stored.values())


@pytest.mark.parametrize(
    ("compiled", "half"),
    [
        ("no", True),
        ("no", False),
        pytest.param("whole", True, marks=pytest.mark.slow),
        pytest.param("whole", False, marks=pytest.mark.slow),
        pytest.param("blocks", True, marks=pytest.mark.slow),
    ],
)
def test_a_block_stores_what_the_formula_says(compiled: Compiled, half: bool) -> None:
    one_more = stored_bytes(2, compiled, half=half) - stored_bytes(1, compiled, half=half)
    expected = activation_bytes_per_token_layer(SHAPE, half=half, compiled=compiled, seq_len=LENGTH)
    if compiled == "no":
        # A GPU's masked kernel, which there is none of here, also keeps wider keys and values and the mask.
        low = 2 if half else 4
        expected -= low * (2 * 2 * SHAPE.head_dim + LENGTH)
    assert one_more == expected * SEQUENCES * LENGTH


@pytest.mark.parametrize(
    ("compiled", "half", "expected"),
    [
        # The stream twice and 1 / rms in float32; results of both norms, queries and keys before and after
        # their norms, values, the result of attention, gate, up and SwiGLU's output.
        ("whole", True, 4 * 2 * 64 + 4 * (2 + 4 + 2) + 4 * 4 + 2 * (2 * 64 + 3 * 96 + 3 * 48 + 3 * 160)),
        ("whole", False, 4 * 2 * 64 + 4 * (2 + 4 + 2) + 4 * 4 + 4 * (2 * 64 + 3 * 96 + 3 * 48 + 3 * 160)),
        # The stream once and what attention added.
        ("blocks", True, 4 * 64 + 4 * (2 + 4 + 2) + 4 * 4 + 2 * (3 * 64 + 3 * 96 + 3 * 48 + 3 * 160)),
    ],
)
def test_a_compiled_block_stores_no_cheap_values(compiled: Compiled, half: bool, expected: int) -> None:
    """By hand; the slow tests above compare with a trace."""
    assert activation_bytes_per_token_layer(SHAPE, half=half, compiled=compiled, seq_len=LENGTH) == expected


def test_fused_kernels_store_their_inputs_and_outputs() -> None:
    fused: dict[str, Any] = {"half": True, "compiled": "whole", "seq_len": LENGTH, "fused": True}
    # Both norms, q and attention, k and v, gate and up; 1 / rms twice and the log of each softmax sum.
    dense = 2 * (2 * 64 + 2 * 96 + 2 * 48 + 2 * 160) + 4 * (2 + 4)
    assert activation_bytes_per_token_layer(SHAPE, **fused) == dense
    experts = dataclasses.replace(SHAPE, **EXPERTS, num_experts_per_tok=2)
    inner = 2 * 88
    stored = dense + 2 * 2 * (inner - 160)
    # Inputs and outputs of both experts and SwiGLU's output; probabilities, weights and three indices.
    stored += 2 * (2 * 2 * 64 + inner) + 4 * (5 + 2) + 3 * 8 * 2
    assert activation_bytes_per_token_layer(experts, **fused) == stored


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("k", [1, 2])
def test_a_block_with_experts_stores_about_what_the_formula_says(k: int, half: bool) -> None:
    shape = dataclasses.replace(SHAPE, **EXPERTS, num_experts_per_tok=k)
    two, one = (stored_bytes(layers, "no", half=half, shape=shape) for layers in (2, 1))
    expected = activation_bytes_per_token_layer(shape, half=half, compiled="no", seq_len=LENGTH)
    expected -= (2 if half else 4) * (2 * 2 * SHAPE.head_dim + LENGTH)  # as above
    assert two - one == pytest.approx(expected * SEQUENCES * LENGTH, rel=0.02)


def test_with_recomputation_a_block_stores_its_input_alone() -> None:
    two, one = (stored_bytes(layers, "no", half=True, recompute=True) for layers in (2, 1))
    one_more = two - one
    kept, plain = (estimate(recompute=r, compiled="no") for r in (True, False))
    assert one_more == 4 * SHAPE.hidden_size * SEQUENCES * LENGTH
    assert kept.activations < plain.activations / 5
    deeper = estimate(dataclasses.replace(SHAPE, num_hidden_layers=9), recompute=True, compiled="no")
    assert deeper.activations - kept.activations == one_more


def estimate(shape: MiniMindConfig = SHAPE, **changes: Any) -> MemoryEstimate:
    options = {
        "sequences": SEQUENCES,
        "seq_len": LENGTH,
        "precision": "bf16",
        "compiled": "whole",
        "optimizer": "adamw",
    }
    return estimate_memory(shape, **{**options, **changes})


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("experts", [{}, {**EXPERTS, "num_experts_per_tok": 2}], ids=["dense", "experts"])
def test_weights_gradients_and_states_are_those_of_a_real_optimizer(
    optimizer: str, tied: bool, experts: dict[str, Any]
) -> None:
    shape = dataclasses.replace(SHAPE, tie_word_embeddings=tied, **experts)
    model = MiniMindForCausalLM(shape)
    config = PretrainConfig(optimizer=optimizer)  # type: ignore[arg-type]
    real = build_optimizer(model, config, "cpu")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    real.step()
    states = [t for fields in real.state.values() for name, t in fields.items() if name != "step"]
    assert optimizer_bytes(shape, optimizer) == sum(tensor.nbytes for tensor in states)
    expected = estimate(shape, optimizer=optimizer)
    assert expected.weights == expected.gradients == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize(
    ("hidden_size", "sequences", "fused", "measured"),
    [
        (768, 128, True, 11.53e9),
        (768, 256, True, 22.07e9),
        (512, 128, True, 6.66e9),
        (512, 256, True, 12.86e9),
        # Without kernels of our own, as fp16 still does.
        (768, 128, False, 18.7e9),
    ],
)
def test_what_was_measured_on_an_h100_is_estimated_within_a_few_percent(
    hidden_size: int, sequences: int, fused: bool, measured: float
) -> None:
    """minimind-3 and minimind2-small in sequences of 512; docs/performance.md."""
    kv_heads, inner = {768: (4, 2432), 512: (2, 1408)}[hidden_size]
    shape = MiniMindConfig(hidden_size=hidden_size, num_key_value_heads=kv_heads, intermediate_size=inner)
    found = estimate(shape, sequences=sequences, seq_len=512, fused=fused).peak
    assert found == pytest.approx(measured, rel=0.05)


P, MATRICES, N = SHAPE.num_parameters(), 8 * (2 * 64 * 96 + 2 * 64 * 48 + 3 * 64 * 160), SEQUENCES * LENGTH
GATHERED = MATRICES // 4 + P - MATRICES  # two blocks, embedding and LM head


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {},
            {"weights": 4 * P, "weight_copies": 2 * MATRICES, "gradients": 4 * P, "optimizer": 8 * P,
             "optimizer_working": 0, "gradients_stay": False, "gradients_twice": False,
             # Of the loss: gradient and copy of the matrix, that of its input twice, logits and theirs.
             "working": 300 * 64 * (4 + 2) + 2 * N * 64 * 4 + N * 300 * (2 + 2)},
        ),
        ({"precision": "no"}, {"weight_copies": 0}),
        ({"compiled": "no"}, {"working": 300 * 64 * (4 + 2) + 2 * N * 64 * 4 + N * 300 * (4 + 2 + 2)}),
        # Four chunks, whose gradients are joined.
        ({"sequences": 4096, "compiled": "no"}, {"working": 300 * 64 * (4 + 2) + 2 * 2048 * N * 64 * 4
         + (1 << 17) * 300 * (4 + 2 + 2)}),
        ({"shards": 4}, {"weights": P, "gradients": P, "optimizer": 2 * P, "weight_copies": 2 * GATHERED}),
        ({"shards": 4, "precision": "no"}, {"weight_copies": 4 * GATHERED}),
        ({"accumulation_steps": 2}, {"gradients_stay": True, "gradients_twice": True}),
        ({"accumulation_steps": 2, "compiled": "blocks"}, {"gradients_stay": True, "gradients_twice": False}),
        ({"num_processes": 2}, {"gradients_stay": True, "gradients_twice": False}),
        ({"num_processes": 2, "shards": 2}, {"gradients_stay": False}),
        # Two thirds of the feed-forward matrices have one shape: four float32 and six fp16 copies.
        ({"optimizer": "muon"}, {"optimizer_working": 28 * 8 * 2 * 64 * 160,
         "optimizer": 8 * P - 4 * MATRICES}),
    ],
)  # fmt: skip
def test_an_estimate_by_hand(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    found = estimate(**changes)
    assert {name: getattr(found, name) for name in expected} == expected


def test_the_working_memory_of_muon_is_that_of_a_batch_of_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory._MUON_BATCH == matrix_batches.LARGEST_BATCH
    all_of_a_shape, one = 8 * 2 * 64 * 160, 64 * 160
    assert estimate(optimizer="muon", fused=True).optimizer_working == 12 * all_of_a_shape
    monkeypatch.setattr(memory, "_MUON_BATCH", 3 * one)
    assert estimate(optimizer="muon", fused=True).optimizer_working == 12 * 3 * one
    # Two ranks have half of twice as many, and gather all.
    gathered = estimate(optimizer="muon", fused=True, num_processes=2).optimizer_working - 12 * 3 * one
    assert gathered == 2 * 3 * 2 * 3 * one
    monkeypatch.setattr(memory, "_MUON_BATCH", 1)
    assert estimate(optimizer="muon", fused=True).optimizer_working == 12 * one


def test_the_peak_is_the_highest_of_backward_begin_backward_end_and_step() -> None:
    sizes = {"weights": 1, "weight_copies": 20, "gradients": 300, "optimizer": 4000, "activations": 50_000}
    rest = {"working": 600_000, "optimizer_working": 7, "gradients_stay": False, "gradients_twice": False}
    always = 4001 + (64 << 20)

    def peak(**changes: Any) -> int:
        return MemoryEstimate(**{**sizes, **rest, **changes}).peak - always

    assert peak() == 650_020
    assert peak(gradients_stay=True) == 650_320
    assert peak(working=0, activations=0) == 307
    assert peak(working=0, activations=0, gradients_twice=True) == 600
    assert peak(optimizer_working=10**6) == 10**6 + 300


def test_more_of_anything_takes_more() -> None:
    base = estimate().peak
    assert estimate(sequences=8).peak > base
    assert estimate(compiled="no").peak > base
    assert estimate(precision="no").peak > base
    assert estimate(accumulation_steps=2).peak >= base + estimate().gradients
    assert estimate(num_processes=2).peak >= base + estimate().gradients
    quarter = estimate(num_processes=4, shards=4)
    assert (quarter.weights, quarter.optimizer) == (estimate().weights // 4, estimate().optimizer // 4)


def test_a_large_model_of_few_sequences_peaks_when_all_gradients_are_there() -> None:
    large = MiniMindConfig(hidden_size=1024, num_hidden_layers=24)
    found = estimate(large, sequences=1, seq_len=16)
    assert found.peak - found.weights - found.optimizer - (64 << 20) == found.gradients


@pytest.mark.parametrize("tied", [True, False])
def test_parts_make_up_the_model(tied: bool) -> None:
    shape = dataclasses.replace(SHAPE, tie_word_embeddings=tied)
    parts = count_parts({name: p.shape for name, p in MiniMindForCausalLM(shape).named_parameters()})
    assert tuple(parts) == PARTS
    assert sum(parts.values()) == shape.num_parameters()
    layers, c, d = shape.num_hidden_layers, shape.hidden_size, shape.head_dim
    assert parts["norms"] == layers * (2 * c + 2 * d) + c
    assert parts["MLP"] == layers * 3 * c * shape.intermediate_size
    assert parts["head"] == (0 if tied else shape.vocab_size * c)


def test_a_name_that_is_not_known_is_counted_apart() -> None:
    assert count_parts({"backbone.layers.0.mixer.A_log": (10, 4)})["other"] == 40
    assert count_parts({"transformer.wte.weight": (10, 4)})["embedding"] == 40


def test_a_step_is_one_micro_batch_unless_given() -> None:
    assert estimate() == estimate(accumulation_steps=1)
    assert estimate() != estimate(accumulation_steps=2)
