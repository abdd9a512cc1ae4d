"""A custom model in a run: how it is called, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from minimind import ConfigError, MiniMindConfig, MiniMindForCausalLM, PretrainConfig, pretrain
from minimind.formats.huggingface import load_model, save_model, save_weights
from minimind.modeling.transformer import CausalLMOutput
from minimind.tokenizer import load_tokenizer
from minimind.training.build_model import build_model, resolve_model_config
from support.tiny_runs import tiny, write_corpus

SHAPE = MiniMindConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)


class Bigram(nn.Module):
    """The next token from the last one alone."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, 8)
        self.output = nn.Linear(8, vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int = 1,
        document_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> CausalLMOutput:
        logits = self.output(self.table(input_ids))
        if shift_labels is None:
            return CausalLMOutput(None, logits)
        flat = (logits.flatten(0, 1), shift_labels.flatten())
        loss = nn.functional.cross_entropy(*flat, ignore_index=-100, reduction="sum")
        return CausalLMOutput(loss / num_items_in_batch, None)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


def test_a_plain_model_with_custom_weights_is_saved_as_usual(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_zero(shape: MiniMindConfig) -> nn.Module:
        model = MiniMindForCausalLM(shape)
        for weight in model.parameters():
            nn.init.zeros_(weight)
        return model

    monkeypatch.setattr("minimind.training.build_trainer.peak_flops_of", lambda device: 1e12)
    result = pretrain(tiny(corpus, tmp_path / "out", max_steps=1), model_factory=all_zero)
    assert '"total_mfu"' in (tmp_path / "out" / "metrics.jsonl").read_text()
    delivered = load_model(result.model_dir)
    # Nothing reaches weights behind a norm of zero, so they are the factory's.
    assert not delivered.model.layers[0].mlp.up_proj.weight.any()


def test_a_subclass_that_computes_the_same_is_written_for_transformers_by_hand(
    corpus: Path, tmp_path: Path
) -> None:
    class OtherLoss(MiniMindForCausalLM):
        pass

    shapes: list[MiniMindConfig] = []

    def factory(shape: MiniMindConfig) -> nn.Module:
        shapes.append(shape)
        return OtherLoss(shape)

    result = pretrain(tiny(corpus, tmp_path / "out", max_steps=1), model_factory=factory)
    assert not (result.model_dir / "config.json").exists()
    weights = load_file(result.model_dir / "model.safetensors")
    save_weights(weights, shapes[0], tmp_path / "folder")
    trained = weights["model.embed_tokens.weight"]
    assert torch.equal(load_model(tmp_path / "folder").lm_head.weight, trained.half().float())


def test_a_jump_is_reported_with_the_texts_of_a_model_of_ones_own(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minimind.training.loss_spikes.MIN_STEPS", 2)
    monkeypatch.setattr("minimind.training.build_trainer.peak_flops_of", lambda device: 1e12)
    config = tiny(corpus, tmp_path / "out", max_steps=12, spike_sigma=1e-9, learning_rate=30.0)
    pretrain(config, model_factory=lambda shape: Bigram(shape.vocab_size))
    assert list((tmp_path / "out" / "spikes").glob("step-*.json"))
    # Its arithmetic is not known.
    assert "mfu" not in (tmp_path / "out" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"compile": True}, "--compile is implemented in MiniMindForCausalLM"),
        ({"activation_checkpointing": True}, "--activation-checkpointing is implemented in"),
        ({"use_moe": True}, "--use-moe is implemented in"),
        ({"mixed_precision": "fp8"}, "--mixed-precision fp8 is implemented in"),
        ({"sample_interval": 5}, "--sample-interval generates with MiniMindForCausalLM"),
    ],
)
def test_what_only_miniminds_model_does_is_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(PretrainConfig(**option), SHAPE, lambda shape: Bigram(shape.vocab_size))
    assert isinstance(build_model(PretrainConfig(**option), SHAPE), MiniMindForCausalLM)


def test_stored_weights_go_into_a_model_with_the_same_names_only(tmp_path: Path) -> None:
    class Same(MiniMindForCausalLM):
        pass

    torch.manual_seed(5)
    stored = MiniMindForCausalLM(SHAPE)
    save_model(stored, tmp_path)
    config = PretrainConfig(from_weight=str(tmp_path))
    made = build_model(config, SHAPE, Same)
    assert torch.equal(made.lm_head.weight, stored.lm_head.weight.half().float())
    with pytest.raises(ConfigError, match="holds other tensors than a Bigram has"):
        build_model(config, SHAPE, lambda shape: Bigram(shape.vocab_size))


def test_what_was_assumed_of_stored_weights_is_said(tmp_path: Path) -> None:
    torch.manual_seed(5)
    torch.save(MiniMindForCausalLM(SHAPE).state_dict(), tmp_path / "weights.pth")
    notes: list[str] = []
    build_model(PretrainConfig(from_weight=str(tmp_path / "weights.pth")), SHAPE, note=notes.append)
    (note,) = notes
    assert note.startswith("--from-weight: configuration inferred from the tensors, with the original's")


def test_the_factory_may_draw_from_the_generator_of_the_run() -> None:
    first, second = (build_model(PretrainConfig(seed=7), SHAPE, lambda _: Bigram(32)) for _ in range(2))
    assert torch.equal(first.table.weight, second.table.weight)


@pytest.mark.parametrize(("length", "positions"), [(8, 32768), (32769, 65536), (65536, 65536)])
def test_a_model_has_positions_for_the_longest_sequence(length: int, positions: int) -> None:
    _, shape = resolve_model_config(PretrainConfig(max_seq_len=length), load_tokenizer(None))
    assert shape.max_position_embeddings == positions


def test_stored_weights_have_the_positions_that_they_have(tmp_path: Path) -> None:
    sizes = {"vocab_size": 6400, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    save_model(MiniMindForCausalLM(MiniMindConfig(**sizes, max_position_embeddings=64)), tmp_path)
    config, tokenizer = PretrainConfig(from_weight=str(tmp_path), max_seq_len=64), load_tokenizer(None)
    assert resolve_model_config(config, tokenizer)[1].max_position_embeddings == 64
    with pytest.raises(ConfigError, match="--max-seq-len 65 is more than the 64 positions"):
        resolve_model_config(dataclasses.replace(config, max_seq_len=65), tokenizer)
