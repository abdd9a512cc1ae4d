"""The snippets of docs/fine-tuning.md, run in order on a tiny model without a network."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "fine-tuning.md"
MISSING = [name for name in ("trl", "peft", "datasets") if importlib.util.find_spec(name) is None]


def snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)


def test_both_languages_show_the_same_code() -> None:
    assert len(snippets(PAGE)) >= 4
    assert snippets(PAGE) == snippets(PAGE.with_name("fine-tuning_zh.md"))


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
def test_the_page_runs_from_pretraining_to_an_exported_chat_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from minimind import load_tokenizer, pretrain
    from minimind.formats.open_model import load_with_tokenizer
    from support import tiny_runs

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.chdir(tmp_path)
    corpus = tiny_runs.write_corpus(tmp_path / "corpus.jsonl")
    pretrain(tiny_runs.tiny(corpus, tmp_path / "out", max_steps=4, hidden_size=64))
    names: dict[str, Any] = {}
    for code in snippets(PAGE):
        exec(compile(code, str(PAGE), "exec"), names)
    for trainer in ("sft", "lora"):
        losses = [line["loss"] for line in names[trainer].state.log_history if "loss" in line]
        assert losses[-1] < losses[0], trainer
    # Only the answers were trained: 2 questions, 16 conversations.
    rows = list(names["sft"].train_dataset)
    decode = names["tokenizer"].decode
    masks = "assistant_masks" if "assistant_masks" in rows[0] else None
    trained = {
        decode([id for id, on in zip(row["input_ids"], row[masks], strict=True) if on])
        if masks
        else decode([id for id in row["labels"] if id != -100])
        for row in rows
    }
    assert trained == {f"{answer}<|im_end|>" for answer in names["questions"].values()}
    assert names["dpo"].state.global_step > 0
    # What TRL saves is a model of ours again, with the same ids, and so is the merged LoRA.
    base = load_tokenizer(tmp_path / "out" / "model")
    for folder in ("sft", "dpo", "lora-merged"):
        _, model, tokenizer = load_with_tokenizer(str(tmp_path / "out" / folder))
        assert tokenizer.encode("a list") == base.encode("a list")
        assert tokenizer.chat_template == base.chat_template
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / folder, dtype=torch.float32)
        ids = torch.tensor([[1, 300, 301, 302]])
        with torch.no_grad():
            assert torch.allclose(model.eval()(input_ids=ids).logits, theirs(ids).logits, atol=1e-4)
