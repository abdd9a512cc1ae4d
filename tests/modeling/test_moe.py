"""Experts against a loop over tokens, the balancing loss against transformers, products against torch's."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.modeling import moe
from minimind.modeling.config import MiniMindConfig
from minimind.modeling.kv_cache import KVCache
from minimind.modeling.moe import MixtureOfExperts, balance_loss, looped_linear
from minimind.modeling.transformer import MiniMindForCausalLM

SHAPE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "use_moe": True, "moe_intermediate_size": 24,
}  # fmt: skip
KINDS = {
    "one": {"num_experts_per_tok": 1},
    "one, normalized": {"num_experts_per_tok": 1, "norm_topk_prob": True},
    "two": {"num_experts_per_tok": 2},
    "two, not normalized": {"num_experts_per_tok": 2, "norm_topk_prob": False},
    "all": {"num_experts_per_tok": 4},
}


def build(**changes: Any) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    return MiniMindForCausalLM(MiniMindConfig(**{**SHAPE, "initializer_range": 0.1, **changes}))


def layer(**changes: Any) -> MixtureOfExperts:
    made = build(num_hidden_layers=1, **changes).model.layers[0].mlp
    assert isinstance(made, MixtureOfExperts)
    return made


def stream(sequences: int = 3, length: int = 11, seed: int = 1) -> Tensor:
    return torch.randn(
        sequences, length, 48, generator=torch.Generator().manual_seed(seed), requires_grad=True
    )


def ids(sequences: int = 2, length: int = 24, seed: int = 1) -> Tensor:
    return torch.randint(96, (sequences, length), generator=torch.Generator().manual_seed(seed))


def one_by_one(mixture: MixtureOfExperts, x: Tensor) -> tuple[Tensor, Tensor]:
    """Every token by itself, as the definition says; also the (E,) times that each expert was chosen."""
    out, counts = [], torch.zeros(mixture.gate.out_features)
    for token in x.flatten(0, 1):
        probabilities = torch.softmax(mixture.gate(token), -1)
        chosen = probabilities.argsort(descending=True)[: mixture.experts_per_token]
        weights = probabilities[chosen]
        if mixture.normalize:
            weights = weights / weights.sum()
        experts, total = mixture.experts, torch.zeros_like(token)
        for weight, e in zip(weights, chosen.tolist(), strict=True):
            inner = F.silu(experts.gate_proj[e] @ token) * (experts.up_proj[e] @ token)
            total = total + weight * (experts.down_proj[e] @ inner)
            counts[e] += 1
        out.append(total)
    return torch.stack(out).view_as(x), counts


def gradients(module: nn.Module, x: Tensor, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [x, *module.parameters()]))


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_equal_a_loop_over_tokens(kind: str) -> None:
    mixture, x = layer(**KINDS[kind]), stream()
    direction = torch.randn_like(x)
    out, routing = mixture(x)
    expected, counts = one_by_one(mixture, x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(routing[0], counts)
    torch.testing.assert_close(routing[1], torch.softmax(mixture.gate(x), -1).sum((0, 1)))
    assert counts.min() > 0
    ours = gradients(mixture, x, (out * direction).sum())
    for grad, theirs in zip(ours, gradients(mixture, x, (expected * direction).sum()), strict=True):
        torch.testing.assert_close(grad, theirs, rtol=1e-4, atol=1e-5)


def test_no_token_is_dropped_when_all_choose_the_same_expert() -> None:
    mixture, x = layer(), stream()
    with torch.no_grad():
        mixture.gate.weight.zero_()
        mixture.gate.weight[2] = 1.0
    x = x.detach().abs().requires_grad_()
    out, routing = mixture(x)
    assert routing[0].tolist() == [0, 0, 33, 0]
    torch.testing.assert_close(out, one_by_one(mixture, x)[0], rtol=1e-4, atol=1e-6)
    out.sum().backward()
    # A gradient there is, of zeros: a wrapper that exchanges gradients waits for each.
    for stack in mixture.experts.parameters():
        assert stack.grad is not None
        assert [bool(grad.any()) for grad in stack.grad] == [False, False, True, False]


class _Rubbish(torch.autograd.Function):
    """Leaves what a kernel leaves behind the last group: anything, NaN above all."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, end: Tensor) -> Tensor:
        ctx.save_for_backward(end)
        return torch.where((torch.arange(len(rows)) < end)[:, None], rows, torch.nan)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Rubbish.forward(ctx, grad, *ctx.saved_tensors), None


@pytest.mark.parametrize("kind", ["one", "two"])
def test_padding_is_neither_routed_nor_counted(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture, x = layer(**KINDS[kind]), stream()
    mask = torch.rand(3, 11, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[2] = False
    real = x.detach()[mask][None].requires_grad_()
    expected, counted = mixture(real)
    wanted = gradients(mixture, real, expected.square().sum() + counted[1].square().sum())
    given: list[int] = []

    def with_rubbish(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        given.append(int(ends[-1]))
        return _Rubbish.apply(looped_linear(_Rubbish.apply(rows, ends[-1]), weights, ends), ends[-1])

    monkeypatch.setattr(moe, "grouped_linear", with_rubbish)
    out, routing = mixture(x, mask)
    assert given == [int(mask.sum()) * mixture.experts_per_token] * 3
    torch.testing.assert_close(out[mask], expected[0])
    assert not out[~mask].any()
    torch.testing.assert_close(routing, counted)
    found = gradients(mixture, x, out.square().sum() + routing[1].square().sum())
    assert not found[0][~mask].any()
    torch.testing.assert_close(found[0][mask], wanted[0][0], rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_sequences_of_padding_only_give_zeros() -> None:
    model = build()
    nothing = torch.zeros(2, 24, dtype=torch.bool)
    out = model(ids(), shift_labels=torch.full((2, 24), -100), num_items_in_batch=1, token_mask=nothing)
    (out.loss + balance_loss(out.routing[:, 0], out.routing[:, 1], 1)).backward()
    assert not out.routing.any()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(("kind", "learns"), [("one", True), ("one, normalized", False), ("two", True)])
def test_a_router_learns_from_the_language_loss_unless_its_only_weight_is_always_one(
    kind: str, learns: bool
) -> None:
    model = build(**KINDS[kind])
    model(ids(), shift_labels=ids().roll(-1, 1)).loss.backward()
    norms = [block.mlp.gate.weight.grad.norm().item() for block in model.model.layers]
    assert all(norm > 1e-3 for norm in norms) if learns else all(norm < 1e-6 for norm in norms)


def test_only_the_weights_of_several_experts_are_normalized_by_default() -> None:
    assert [layer(num_experts_per_tok=k).normalize for k in (1, 2)] == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loop_equals_torchs_grouped_product(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weights = (torch.randn(s, generator=generator).to(dtype) for s in ((40, 16), (4, 24, 16)))
    ends = torch.tensor([0, 13, 20, 33], dtype=torch.int32)  # one group is empty
    direction = torch.randn(33, 24, generator=generator).to(dtype)
    results = []
    for product in (looped_linear, lambda x, w, e: F.grouped_mm(x, w.mT, offs=e)):
        x, w = (tensor.clone().requires_grad_() for tensor in (rows, weights))
        out = product(x, w, ends)[:33]
        (out * direction).sum().backward()
        results.append((out, x.grad[:33], w.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("k", [1, 2])
def test_the_balancing_loss_is_that_of_transformers_block_by_block(k: int) -> None:
    qwen = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    model = build(num_experts_per_tok=k)
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[0, 15:] = False
    logits: list[Tensor] = []
    for block in model.model.layers:
        block.mlp.register_forward_pre_hook(
            lambda mixture, inputs: logits.append(F.linear(inputs[0], mixture.gate.weight).flatten(0, 1))
        )
    routing = model(ids(), token_mask=mask).routing
    expected = sum(qwen.load_balancing_loss_func((one,), 4, k, mask) for one in logits)
    ours = balance_loss(routing[:, 0], routing[:, 1], k)
    torch.testing.assert_close(ours, expected * mask.sum())
    assert ours > k * 2 * mask.sum()
    router = [block.mlp.gate.weight for block in model.model.layers]
    wanted = torch.autograd.grad(expected * mask.sum(), router, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(ours, router), wanted)


def test_balanced_experts_have_the_least_balancing_loss() -> None:
    def loss(counts: list[float]) -> float:
        chosen = torch.tensor([counts])
        return balance_loss(chosen, chosen, 1).item() / sum(counts)

    assert loss([5, 5, 5, 5]) == pytest.approx(1)
    assert loss([20, 0, 0, 0]) == pytest.approx(4)
    assert loss([8, 4, 4, 4]) > 1


def test_descending_the_balancing_loss_balances_the_experts() -> None:
    mixture, x = layer(), stream(sequences=20).detach() + 1
    with torch.no_grad():
        mixture.gate.weight[2] += 0.05
    optimizer = torch.optim.SGD([mixture.gate.weight], lr=0.05)
    counts = []
    for _ in range(30):
        _, routing = mixture(x)
        counts.append(routing[0].tolist())
        optimizer.zero_grad()
        (balance_loss(routing[:1], routing[1:], 1) / 220).backward()
        optimizer.step()
    assert max(counts[0]) > 3 * 55
    assert max(counts[-1]) < 1.1 * 55


@pytest.mark.parametrize("recompute", [False, True])
def test_the_model_traces_into_one_graph_that_serves_every_routing(recompute: bool) -> None:
    model = build(num_experts_per_tok=2)
    model.model.recompute = recompute
    compiled = torch.compile(model.model, backend="eager", fullgraph=True, dynamic=False)
    for seed in (1, 2):
        mask = ids(seed=seed + 5) > 30
        with torch._dynamo.config.patch(error_on_recompile=seed > 1):
            hidden, routing = compiled(ids(seed=seed), token_mask=mask)
        expected = model.model(ids(seed=seed), token_mask=mask)
        torch.testing.assert_close((hidden, routing), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["whole", "blocks"])
def test_a_compiled_model_gives_the_same_loss_routing_and_gradients(mode: Any) -> None:
    plain = build(num_hidden_layers=1)
    compiled = copy.deepcopy(plain)
    compiled.compile_for_training(mode)
    mask = ids(seed=3) > 20
    for model in (plain, compiled):
        out = model(ids(), shift_labels=torch.where(mask, ids(2), -100), token_mask=mask)
        (out.loss + out.routing[:, 1].square().sum() / 1e3).backward()
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_logits_as_sums_are_those_of_a_product_in_float32(dtype: torch.dtype, compiled: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 24).to(dtype).requires_grad_()
    weight = torch.randn(3, 24, requires_grad=True)
    grad = torch.randn(40, 3)
    function = moe._RouterLogits.apply
    if compiled:
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = function(x, weight)
    for_x, for_weight = torch.autograd.grad(logits, (x, weight), grad)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, x.detach().float() @ weight.detach().mT)
    torch.testing.assert_close(for_x, (grad @ weight.detach()).to(dtype))
    rounding = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(for_weight, grad.mT @ x.detach().float(), atol=rounding, rtol=0)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    plain, thrifty = build(), build()
    thrifty.model.recompute = True
    for model in (plain, thrifty):
        out = model(ids(), shift_labels=ids().roll(-1, 1))
        (out.loss + out.routing[:, 1].square().sum() / 1e3).backward()
    for one, other in zip(plain.parameters(), thrifty.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_cache_gives_the_logits_of_the_full_sequence() -> None:
    model = build().eval()
    cache = KVCache(model.config, 24, batch_size=2)
    with torch.no_grad():
        parts = [model(part, kv_cache=cache).logits for part in ids().split((5, 1, 17, 1), dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids()).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("autocast", [True, False])
def test_the_products_are_bf16_and_the_router_float32(
    autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = build(), set()
    exact = model(ids(), shift_labels=ids()).loss
    model = model if autocast else model.bfloat16()

    def noting(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        seen.update((rows.dtype, weights.dtype))
        return looped_linear(rows, weights, ends)

    monkeypatch.setattr(moe, "grouped_linear", noting)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = model(ids(), shift_labels=ids())
        x = stream()
        probabilities = model.model.layers[0].mlp._probabilities(x.flatten(0, 1))
    assert seen == {torch.bfloat16}
    weight = model.model.layers[0].mlp.gate.weight.float()
    torch.testing.assert_close(probabilities, torch.softmax(x.flatten(0, 1) @ weight.T, -1))
    torch.testing.assert_close(out.loss, exact, atol=0, rtol=1e-2)
    out.loss.backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32 if autocast else torch.bfloat16}


@pytest.mark.parametrize(("shape", "grouped"), [((2, 8, 16), True), ((2, 4, 16), False), ((2, 8, 12), False)])
def test_aligned_bf16_weights_on_a_gpu_use_grouped_products(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], grouped: bool
) -> None:
    monkeypatch.setattr(F, "grouped_mm", lambda x, weights, offs: "grouped", raising=False)
    monkeypatch.setattr(moe, "looped_linear", lambda x, weights, ends: "looped")
    x: Any = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    product: Any = moe.grouped_linear(x, torch.empty(shape), torch.zeros(2, dtype=torch.int32))
    assert product == ("grouped" if grouped else "looped")
