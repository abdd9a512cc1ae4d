"""The cloze score: the packaged items, likelihoods against transformers, and scores during training."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from minimind import pretrain
from minimind.evaluation.cloze import LANGUAGES, ClozeItem, ClozeScore, cloze_scores, count_solved, load_items
from minimind.evaluation.likelihood import log_likelihoods
from minimind.modeling.config import MiniMindConfig
from minimind.modeling.transformer import MiniMindForCausalLM
from minimind.tokenizer import load_tokenizer
from support import tiny_runs

ASSETS = Path(__file__).parents[2] / "minimind" / "assets" / "cloze"
TOKENIZER = load_tokenizer()


class Prefers(nn.Module):
    """Likes some tokens more than others, whatever comes before."""

    def __init__(self, liked: list[int]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(TOKENIZER.vocab_size))
        self.logits.data[liked] = 5.0

    def forward(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_packaged_items_are_many_and_sound(language: str) -> None:
    items = load_items(language)
    assert len(items) >= 500
    assert len({(item.before, item.choices[0], item.after) for item in items}) == len(items)
    for item in items:
        assert item.before.strip()
        assert len(set(item.choices)) == 4
        assert all(choice.strip() == choice != "" for choice in item.choices)
        if language == "zh":
            assert all(len(choice) == 2 for choice in item.choices)
    # Similar frequencies: no choice is right much more often than it is wrong.
    right = Counter(item.choices[0] for item in items)
    offered = Counter(choice for item in items for choice in item.choices)
    always = sum(count for choice, count in right.items() if offered[choice] == count and count > 2)
    assert always < 0.1 * len(items)
    assert sum(path.stat().st_size for path in ASSETS.iterdir()) < 300_000


def test_the_right_choice_is_the_likeliest_sentence() -> None:
    items = [ClozeItem("Say ", ("yes", "no", "so", "if"), " now."), ClozeItem("Say ", ("no", "yes"), " now.")]
    model = Prefers(TOKENIZER.encode(" yes"))
    assert count_solved(model, TOKENIZER, items, 64) == 1
    # A model without a preference solves nothing by ties.
    assert count_solved(Prefers([]), TOKENIZER, [ClozeItem("Say ", ("a", "b"), ".")], 64) == 0


def test_a_random_model_scores_about_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    few = load_items("zh")[::3]
    monkeypatch.setattr("minimind.evaluation.cloze.load_items", lambda language: few)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = MiniMindForCausalLM(MiniMindConfig(vocab_size=TOKENIZER.vocab_size, **sizes)).train()
    (score,) = cloze_scores(model, TOKENIZER, max_length=64, languages=["zh"])
    assert model.training
    assert (score.name, score.items, score.chance) == ("cloze_zh", len(few), 0.25)
    low, high = score.interval
    assert low < 0.3
    assert high > 0.2


def test_the_interval_is_wilsons() -> None:
    low, high = ClozeScore("cloze_en", 81, 263, 0.25).interval
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert ClozeScore("cloze_en", 0, 10, 0.25).interval[0] == pytest.approx(0, abs=1e-9)


def test_likelihoods_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from minimind.formats.huggingface import save_model

    torch.manual_seed(0)
    config = MiniMindConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        initializer_range=0.3,
    )  # fmt: skip
    model = MiniMindForCausalLM(config).eval()
    save_model(model, tmp_path, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    pairs = [([1], [5, 6, 7]), ([1, 9, 9, 9, 9], [3]), ([4], []), ([1, 2], [3, 4, 5, 6, 7, 8])]
    found = log_likelihoods(model, pairs, max_length=6)
    assert found[2] == (0.0, True)
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        if not continuation:
            continue
        tokens = torch.tensor([[*context, *continuation][-7:]])
        with torch.no_grad():
            logits = theirs(tokens[:, :-1]).logits[0]
        counted = min(len(continuation), tokens.shape[1] - 1)
        targets = tokens[0, tokens.shape[1] - counted :]
        last = logits[len(logits) - counted :].log_softmax(-1)
        assert value == pytest.approx(float(last.gather(1, targets[:, None]).sum()), abs=1e-4)
        assert greedy == bool((last.argmax(-1) == targets).all())


def test_a_run_logs_scores_and_trains_as_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tiny_runs.write_corpus(tmp_path / "corpus.jsonl")
    few = {language: load_items(language)[:10] for language in LANGUAGES}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("minimind.evaluation.cloze.load_items", few.__getitem__)
        tiny_runs.pretrain_as_command(tiny_runs.tiny(corpus, tmp_path / "a", max_steps=3, score_interval=2))
    assert "step 2: cloze_en " in capsys.readouterr().out
    pretrain(tiny_runs.tiny(corpus, tmp_path / "b", max_steps=3))
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    scores = [line for line in lines if line["kind"] == "score"]
    assert [line["step"] for line in scores] == [2, 3]
    assert all(0 <= line[f"cloze_{language}"] <= 1 for line in scores for language in LANGUAGES)
    trained = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in "ab"]
    assert trained[0] == trained[1]
