"""The model against the original, against transformers, and against itself packed, cached and compiled."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from safetensors.torch import load_file

from minimind.formats.original_minimind import load_upstream, read_upstream_config
from minimind.modeling.attention import document_mask
from minimind.modeling.config import MiniMindConfig
from minimind.modeling.kv_cache import KVCache
from minimind.modeling.transformer import CausalLMOutput, MiniMindForCausalLM

TINY = MiniMindConfig(
    vocab_size=96, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128,
)  # fmt: skip


def build(seed: int = 0, **changes) -> MiniMindForCausalLM:
    torch.manual_seed(seed)
    return MiniMindForCausalLM(dataclasses.replace(TINY, **changes))


def tokens(sequences: int = 2, length: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randint(96, (sequences, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: MiniMindForCausalLM) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["dense", "yarn", "moe"])
def test_the_original_gives_the_same_logits_and_loss(shared, kind):
    files = shared / "compat"
    config = read_upstream_config(files / f"minimind3_{kind}_tiny.config.json")
    model = load_upstream(files / f"minimind3_{kind}_tiny.pth", config).eval()
    expected = load_file(files / f"minimind3_{kind}_tiny.reference.safetensors")
    out = model(expected["input_ids"], labels=expected["labels"])
    assert expected["logits"].std() > 0.1
    torch.testing.assert_close(out.logits, expected["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(out.loss[None], expected["loss"], atol=1e-5, rtol=0)
    targets = torch.nn.functional.pad(expected["labels"][:, 1:], (0, 1), value=-100)
    fused = model(expected["input_ids"], shift_labels=targets).loss
    torch.testing.assert_close(fused[None], expected["loss"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("use_moe", [False, True])
def test_new_weights_are_normal_and_those_written_to_the_stream_smaller_with_depth(use_moe):
    model = build(hidden_size=128, num_hidden_layers=8, vocab_size=400, use_moe=use_moe)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter))
            continue
        writes = "o_proj" in name or "down_proj" in name
        expected = 0.02 / math.sqrt(16) if writes else 0.02
        assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
        assert abs(parameter.mean().item()) < 0.1 * expected


def test_embedding_and_output_are_one_parameter_where_tied():
    tied, untied = build(), build(tie_word_embeddings=False)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    assert untied.get_output_embeddings().weight is not untied.get_input_embeddings().weight
    with torch.device("meta"):
        moved = MiniMindForCausalLM(TINY)
    moved.to_empty(device="cpu")
    moved.tie_weights()
    assert moved.lm_head.weight is moved.model.embed_tokens.weight


@pytest.mark.parametrize("with_positions", [True, False])
def test_packed_documents_do_not_affect_each_other(with_positions):
    model, ids = build(seed=3), tokens(sequences=1, length=40)
    # Weights as large as a trained model's, so that attention is not nearly uniform.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3 if parameter.dim() == 2 else 1
    cuts = (0, 7, 8, 25, 40)
    documents = torch.empty(1, 40, dtype=torch.int32)
    positions = torch.empty(1, 40, dtype=torch.int32)
    for index, (start, end) in enumerate(itertools.pairwise(cuts)):
        documents[:, start:end] = index
        positions[:, start:end] = torch.arange(end - start)
    packed = model(ids, document_ids=documents, position_ids=positions if with_positions else None).logits
    for start, end in itertools.pairwise(cuts):
        alone = model(ids[:, start:end]).logits
        torch.testing.assert_close(packed[:, start:end], alone, atol=1e-5, rtol=0)
    assert (packed - model(ids).logits)[:, 7:].abs().max() > 0.01


def test_a_later_token_changes_nothing_before_it():
    model, ids = build(), tokens()
    changed = ids.clone()
    changed[:, 10] = (ids[:, 10] + 1) % 96
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.equal(before[:, 10], after[:, 10])


def test_the_summed_loss_over_its_items_is_the_mean_loss_of_the_labels():
    model, ids = build(), tokens()
    labels = ids.clone()
    labels[0, :9] = -100
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    real = int((targets != -100).sum())
    mean = model(ids, labels=labels)
    assert mean.logits.shape == (2, 24, 96)
    for items in (None, real, torch.tensor(real)):
        out = model(ids, shift_labels=targets, num_items_in_batch=items)
        assert out.logits is None
        torch.testing.assert_close(out.loss, mean.loss)
    summed = model(ids, shift_labels=targets, num_items_in_batch=1).loss
    torch.testing.assert_close(summed, mean.loss * real)
    model.zero_grad()
    mean.loss.backward()
    expected = copy.deepcopy(gradients(model))
    model.zero_grad()
    model(ids, shift_labels=targets).loss.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], atol=1e-6, rtol=1e-4)


def test_the_loss_of_a_single_target_is_its_cross_entropy():
    model, ids = build().eval(), tokens(1, 8)
    targets = torch.full_like(ids, -100)
    targets[0, 5] = 7
    expected = torch.nn.functional.cross_entropy(model(ids).logits[0, 5], targets[0, 5])
    torch.testing.assert_close(model(ids, shift_labels=targets).loss, expected)


def test_sequences_without_targets_have_zero_loss_and_gradient():
    model, ids = build(), tokens()
    loss = model(ids, shift_labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss == 0
    assert not any(grad.any() for grad in gradients(model).values())


def test_the_residual_stream_stays_float32_under_autocast():
    model, seen = build(), []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda module, inputs, output: seen.append((inputs[0].dtype, output[0].dtype))
        )
    scores = []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda m, x: scores.append(x[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(tokens(), shift_labels=tokens()).loss
    assert seen == [(torch.float32, torch.float32)] * 2
    assert scores == [torch.bfloat16]
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(grad.dtype == torch.float32 for grad in gradients(model).values())
    torch.testing.assert_close(loss, model(tokens(), shift_labels=tokens()).loss, atol=0, rtol=1e-3)


def test_a_model_in_pure_bf16_runs_close_to_float32():
    model, ids = build(), tokens()
    exact = model(ids, shift_labels=ids).loss
    half = copy.deepcopy(model).bfloat16()
    loss = half(ids, shift_labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, exact, atol=0, rtol=5e-3)
    assert {grad.dtype for grad in gradients(half).values()} == {torch.bfloat16}


def test_dropout_acts_in_training_only_and_differs_per_call():
    model, ids = build(dropout=0.2), tokens()
    torch.manual_seed(5)
    first = model(ids).logits
    assert not torch.equal(first, model(ids).logits)
    torch.manual_seed(5)
    assert torch.equal(first, model(ids).logits)
    plain = build()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("pieces", [(24,), (1,) * 24, (5, 1, 17, 1)])
def test_a_cache_gives_the_logits_of_the_full_sequence(pieces):
    model, ids = build(), tokens()
    cache = KVCache(TINY, 30, batch_size=2)
    with torch.no_grad():
        parts = [model(part, kv_cache=cache).logits for part in ids.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, atol=1e-5, rtol=0)
    assert cache.length == 24


def test_more_tokens_than_positions_are_refused():
    with pytest.raises(ValueError, match="129 tokens are more than max_position_embeddings 128"):
        build()(tokens(length=129))


def test_accelerate_does_not_change_the_output():
    out = convert_outputs_to_fp32(lambda: CausalLMOutput(torch.ones((), dtype=torch.bfloat16), None))()
    assert isinstance(out, CausalLMOutput)
    assert out.loss.dtype == torch.float32
    assert out.logits is None


@pytest.mark.parametrize("packed", [True, False])
def test_the_backbone_traces_into_one_graph_that_serves_every_batch(packed):
    model = build()
    compiled = torch.compile(model.model, backend="eager", fullgraph=True, dynamic=False)
    for seed in (1, 2, 3):
        ids = tokens(seed=seed)
        extra = {}
        if packed:
            documents = (torch.arange(24) >= 4 * seed).int().expand(2, 24).contiguous()
            extra = {
                "mask": document_mask(documents),
                "position_ids": torch.arange(24).int().expand(2, 24).contiguous(),
            }
        with torch._dynamo.config.patch(error_on_recompile=seed > 1):
            hidden, _ = compiled(ids, **extra)
        torch.testing.assert_close(hidden, model.model(ids, **extra)[0], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["whole", "blocks"])
def test_a_compiled_model_gives_the_same_loss_and_gradients_under_the_same_names(mode):
    model, ids = build(), tokens()
    documents = (torch.arange(24) >= 9).int().expand(2, 24).contiguous()
    compiled = copy.deepcopy(model)
    compiled.compile_for_training(mode)
    assert compiled.state_dict().keys() == model.state_dict().keys()
    for each in (model, compiled):
        each(ids, shift_labels=ids, document_ids=documents, num_items_in_batch=1).loss.backward()
    for name, grad in gradients(compiled).items():
        torch.testing.assert_close(grad, gradients(model)[name], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, shift_labels=ids).loss, model(ids, shift_labels=ids).loss)
