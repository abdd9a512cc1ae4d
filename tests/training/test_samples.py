"""Samples during training, which must not change it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minimind import pretrain
from minimind.errors import ConfigError
from minimind.formats.huggingface import model_from_weights, save_model
from minimind.formats.open_model import open_model
from minimind.generation.text import continue_texts
from minimind.modeling.config import MiniMindConfig
from minimind.modeling.transformer import MiniMindForCausalLM
from minimind.tokenizer import load_tokenizer
from minimind.tracking.metrics_file import MetricsFile
from minimind.training.samples import SAMPLE_TOKENS
from support.tiny_runs import assert_same_end, tiny, write_corpus

SAMPLED: dict[str, Any] = {"sample_interval": 4, "sample_prompt": ("the cat", "rain")}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture(scope="module")
def sampled(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sampled") / "run"
    pretrain(tiny(corpus, out, **SAMPLED))
    return out


def samples(out: Path) -> list[tuple[int, str, str]]:
    lines = map(json.loads, (out / "samples.jsonl").read_text(encoding="utf-8").splitlines())
    return [(line["step"], line["prompt"], line["text"]) for line in lines]


def test_a_run_with_samples_is_the_run_without(corpus: Path, sampled: Path, tmp_path: Path) -> None:
    pretrain(tiny(corpus, tmp_path / "plain"))
    assert_same_end(sampled, tmp_path / "plain")
    assert not (tmp_path / "plain" / "samples.jsonl").exists()


def test_every_prompt_is_continued_at_every_interval_and_the_text_changes(sampled: Path) -> None:
    written = samples(sampled)
    assert [(step, prompt) for step, prompt, _ in written] == [
        (step, prompt) for step in (4, 8, 12, 16, 20) for prompt in ("the cat", "rain")
    ]
    assert len({text for _, _, text in written}) == 10, "the draws are the same, the weights are not"


def test_a_sample_is_what_the_weights_of_its_step_write(sampled: Path) -> None:
    source = open_model(sampled)
    assert "step 20" in source.what
    model = model_from_weights(source.config, source.weights(), "checkpoint")
    prompts = SAMPLED["sample_prompt"]
    texts = continue_texts(model, load_tokenizer(), prompts, max_new_tokens=SAMPLE_TOKENS, seed=42)
    assert samples(sampled)[-2:] == [(20, text.prompt, text.text) for text in texts]


def test_a_resumed_run_writes_the_same_samples_once(corpus: Path, sampled: Path, tmp_path: Path) -> None:
    config = tiny(corpus, tmp_path / "run", **SAMPLED)
    pretrain(config, stop_after=10)
    # As if it had gone on beyond its last checkpoint before it was killed.
    file = MetricsFile(tmp_path / "run" / "samples.jsonl", keep_to_step=10)
    file.write({"prompt": "the cat", "text": "lost"}, 12)
    file.close()
    pretrain(tiny(corpus, tmp_path / "run", resume="auto", **SAMPLED))
    assert samples(tmp_path / "run") == samples(sampled)


def test_without_a_prompt_a_document_is_begun(corpus: Path, tmp_path: Path) -> None:
    pretrain(tiny(corpus, tmp_path / "run", max_steps=4, sample_interval=4))
    ((step, prompt, text),) = samples(tmp_path / "run")
    assert (step, prompt) == (4, "")
    assert text


def test_a_prompt_beyond_the_positions_is_refused_before_the_run(corpus: Path, tmp_path: Path) -> None:
    shape = MiniMindConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=48
    )
    save_model(MiniMindForCausalLM(shape), tmp_path / "small")
    load_tokenizer().save(tmp_path / "small")
    config = tiny(
        corpus,
        tmp_path / "run",
        from_weight=str(tmp_path / "small"),
        sample_interval=1,
        sample_prompt=("a b " * 40,),
    )
    with pytest.raises(ConfigError, match=r"^sample_prompt 'a b a b a b a b a b ...' has \d+ tokens, but"):
        pretrain(config)
    assert not (tmp_path / "run").exists()


def test_trackers_get_the_text(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[str, str, int]] = []
    monkeypatch.setattr(
        "minimind.tracking.trackers.Trackers.log_text",
        lambda self, name, text, step: logged.append((name, text, step)),
    )
    pretrain(tiny(corpus, tmp_path / "run", max_steps=4, **SAMPLED))
    written = samples(tmp_path / "run")
    assert logged == [(f"sample_{n}", prompt + text, 4) for n, (_, prompt, text) in enumerate(written)]
