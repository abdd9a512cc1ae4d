"""Model cards: what the run recorded, nothing private, and the changes of people kept."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from minimind import pretrain
from minimind.formats.export import export_model
from minimind.formats.model_card import CARD, GENERATED, model_card
from minimind.modeling.config import MiniMindConfig
from support import tiny_runs

CONFIG = MiniMindConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
SETTINGS = {
    "data": ["/home/somebody/secret|plans/a.jsonl", "b|c.txt:0.7"],
    "output_dir": "/data/runs/first",
    "from_weight": None,
    "learning_rate": 4e-3,
    "packing": True,
    "optimizer": "muon",
}


def test_it_names_data_numbers_and_recipe_and_no_folder() -> None:
    numbers = {"tokens": 1_234_567, "step": 10, "loss": 3.21, "val_loss": math.nan}
    text = model_card(CONFIG, settings=SETTINGS, numbers=numbers)
    assert "\n# first\n" in text
    assert "| data | a.jsonl, b\\|c.txt:0.7 |" in text
    assert "| tokens | 1,234,567 |" in text
    assert "| training loss, nats per token | 3.2100 |" in text
    assert "| peak learning rate | 0.004 |\n" in text
    assert "| packing | yes |" in text
    assert not any(word in text for word in ("validation", "secret", "somebody", "/data", "nan", "None"))
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {"pipeline_tag": "text-generation", "library_name": "transformers", "tags": ["minimind"]}
    licensed = yaml.safe_load(text.split("---\n")[1].replace("# license", "license"))
    assert licensed["license"] == "mit"


def test_models_that_transformers_does_not_load_have_no_such_advice() -> None:
    text = model_card("1.2M parameters: GRU", settings=SETTINGS)
    assert "1.2M parameters: GRU. Pretrained" in text
    assert "transformers" not in text


def test_a_run_writes_one_and_keeps_what_people_made_of_it(tmp_path: Path) -> None:
    corpus = tiny_runs.write_corpus(tmp_path / "corpus.jsonl")
    changes = {"max_steps": 2, "save_interval": 2, "log_interval": 1, "eval_interval": 2}
    config = tiny_runs.tiny(corpus, tmp_path / "run", **changes)
    result = pretrain(config)
    card = result.model_dir / CARD
    written = card.read_text("utf-8")
    assert GENERATED in written
    assert "| data | corpus.jsonl |" in written
    assert f"| validation loss, nats per token | {result.val_loss:.4f} |" in written
    assert f"| training loss, nats per token | {result.loss:.4f} |" in written
    # From its checkpoint the same is known, and what was edited goes along with the model folder.
    export_model(tmp_path / "run", tmp_path / "exported")
    assert (tmp_path / "exported" / CARD).read_text("utf-8") == written
    card.write_text(written.replace(GENERATED, "Mine."), "utf-8")
    export_model(tmp_path / "run" / "model", tmp_path / "again")
    assert "Mine." in (tmp_path / "again" / CARD).read_text("utf-8")
    pretrain(tiny_runs.tiny(corpus, tmp_path / "run", **{**changes, "max_steps": 3}, resume="auto"))
    assert "Mine." in card.read_text("utf-8")
    assert json.loads((result.model_dir / "tokenizer_config.json").read_text())["model_max_length"] > 32


@pytest.mark.parametrize("missing", [True, False])
def test_a_folder_without_one_gets_what_is_known(missing: bool, tmp_path: Path) -> None:
    from minimind.formats.huggingface import save_model
    from minimind.modeling.transformer import MiniMindForCausalLM

    save_model(MiniMindForCausalLM(CONFIG), tmp_path / "a")
    if not missing:
        (tmp_path / "a" / CARD).write_text("# Theirs\n")
    export_model(tmp_path / "a", tmp_path / "b")
    text = (tmp_path / "b" / CARD).read_text("utf-8")
    assert ("Converted by minimind-train" in text) if missing else text == "# Theirs\n"
