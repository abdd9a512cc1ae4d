"""Runs and models with damaged or hostile files: refused in a sentence, shown without control characters."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minimind.checkpoint.files import StoredCheckpoint
from minimind.checkpoint.train_state import TrainState
from minimind.config.schema import read_toml
from minimind.errors import CheckpointError, ConfigError, UserError
from minimind.formats.huggingface import check_weights, load_config, save_model
from minimind.formats.open_model import load_with_tokenizer, open_model
from minimind.formats.sharded_safetensors import read_weights
from minimind.formatting import json_line, printable
from minimind.modeling.config import MiniMindConfig
from minimind.modeling.transformer import MiniMindForCausalLM
from minimind.runs.compare import compare_runs
from minimind.runs.info import read_info
from minimind.runs.record import read_run
from minimind.runs.reproduce import reproduce
from minimind.tokenizer import load_tokenizer
from minimind.training.result import History
from support.made_runs import make_run

DEEP = "[" * 200_000
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model(MiniMindForCausalLM(MiniMindConfig(**SIZES)), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "name",
    ["environment.json", "metrics.jsonl", "checkpoints/best.json", "checkpoints/step-00000009/trainer.json"],
)
def test_a_run_with_json_that_is_nested_too_deeply_is_still_read(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run")
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text(DEEP)
    assert read_info(run).values["kind"] == "run"
    assert compare_runs([run]).names == ("run",)
    assert "pretrain" in reproduce(read_run(run)).args


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_a_model_with_json_that_is_nested_too_deeply_is_damaged(model: Path, name: str) -> None:
    if "index" in name:
        (model / "model.safetensors").unlink()
    (model / name).write_text(DEEP)
    with pytest.raises(ConfigError, match=rf"{name} (cannot be read|is not valid JSON)"):
        open_model(model).weights()
    if name == "config.json":
        with pytest.raises(ConfigError, match=r"config\.json cannot be read \(it is nested too deeply\)"):
            read_info(model)


def test_the_number_of_layers_is_compared_before_a_model_is_built(model: Path) -> None:
    path = model / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "num_hidden_layers": 9_999}))
    expected = r"has 2 layers, but num_hidden_layers is 9999\. Use the config"
    for use in (open_model, read_info):
        with pytest.raises(ConfigError, match=expected):
            use(model)
    with pytest.raises(ConfigError, match=expected):
        check_weights(
            load_config(model), MiniMindForCausalLM(MiniMindConfig(**SIZES)).state_dict(), "weights"
        )


def test_the_number_of_experts_is_compared_before_a_model_is_built(tmp_path: Path) -> None:
    config = MiniMindConfig(**SIZES, use_moe=True, num_experts=3)
    save_model(MiniMindForCausalLM(config), tmp_path)
    path = tmp_path / "config.json"
    text = path.read_text()
    open_model(tmp_path)
    path.write_text(text.replace('"num_experts": 3', '"num_experts": 60000'))
    with pytest.raises(ConfigError, match=r"has 3 experts, but num_experts is 60000"):
        open_model(tmp_path)


def test_a_header_that_is_longer_than_the_file_is_damaged(model: Path) -> None:
    (model / "checksums.json").unlink()
    (model / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    for use in (open_model, read_info):
        with pytest.raises(ConfigError, match="cannot be read as safetensors"):
            use(model)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
@pytest.mark.parametrize("name", ["model.safetensors", "metrics.jsonl", "environment.json"])
def test_a_fifo_is_not_opened(model: Path, tmp_path: Path, name: str) -> None:
    folder = model if "model" in name else make_run(tmp_path / "run")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    found: list[object] = []

    def read() -> None:
        try:
            found.append(read_info(folder))
        except UserError as error:
            found.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(10)
    assert found, "still waiting for a writer"


def test_control_characters_are_escaped() -> None:
    text = "a\x1b[2J\x07\r\n\x85\u202eb\u2066\u200f\u2028é汉😀\t"
    assert printable(text) == r"a\x1b[2J\x07\x0d\x0a\x85\u202eb\u2066\u200f\u2028é汉😀\x09"
    assert printable("a\n\tb\r", keep="\n\t") == "a\n\tb\\x0d"
    line = json_line({"text": text + r"\x41"})
    assert printable(line) == line
    assert "é汉😀" in line
    assert json.loads(line) == {"text": text + r"\x41"}


def test_a_tokenizer_config_that_is_nested_too_deeply_is_damaged(model: Path) -> None:
    load_tokenizer().save(model)
    (model / "tokenizer_config.json").write_text(DEEP)
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
        load_with_tokenizer(model)


def test_the_advice_of_torch_to_run_code_is_not_passed_on(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "hostile.pth")
    with pytest.raises(
        ConfigError, match=r"it contains torch.nn.modules.linear.Linear, which is not"
    ) as refused:
        read_info(tmp_path / "hostile.pth")
    assert "trust" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_position_embeddings": 10**12}, "max_position_embeddings 1000000000000 is not a size"),
        (
            {"max_position_embeddings": 2**24, "head_dim": 128},
            "max_position_embeddings 16777216 is too large",
        ),
        ({"num_experts": 10**9}, "num_experts 1000000000 is not a size"),
        ({"vocab_size": 10**9}, "vocab_size 1000000000 is not a size"),
        ({"rope_scaling": {"factor": 1e300}}, "rope_scaling factor is 1e"),
        ({"rope_scaling": {"original_max_position_embeddings": 0.5}}, "rope_scaling original_max_position"),
        ({"rope_scaling": {"beta_fast": 1e-320}}, "rope_scaling beta_fast is"),
        ({"rope_scaling": {"attention_factor": float("inf")}}, "rope_scaling attention_factor is inf"),
    ],
)
def test_sizes_that_no_machine_can_hold_are_refused_before_anything_is_built(
    model: Path, changes: dict[str, Any], message: str
) -> None:
    values = json.loads((model / "config.json").read_text())
    if "rope_scaling" in changes:
        plain = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
        changes = {"rope_scaling": plain | changes["rope_scaling"], "rope_parameters": None}
    if "num_experts" in changes:
        values["model_type"] = "qwen3_moe"
    (model / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises(ConfigError, match=message):
        open_model(model)


def test_a_pipe_in_place_of_a_file_is_refused_and_does_not_block(model: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ConfigError, match=r"--config .*pipe cannot be read"):
        read_toml(pipe)
    with pytest.raises(ConfigError, match=r"cannot read .*pipe"):
        load_tokenizer(pipe)
    (tmp_path / "deep.toml").write_text("a = " + "[" * 100_000)
    with pytest.raises(ConfigError, match=r"deep\.toml is not valid TOML"):
        read_toml(tmp_path / "deep.toml")
    (model / "model.safetensors").unlink()
    os.mkfifo(model / "model.safetensors")
    for use in (open_model, lambda path: read_weights(path)):
        with pytest.raises(ConfigError):
            use(model)
    load_tokenizer().save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    os.mkfifo(tmp_path / "chat_template.jinja")
    with pytest.raises(ConfigError, match=r"cannot read .*chat_template\.jinja"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["state", "settings", "versions", "trackers", "param_groups", "tokens"])
def test_a_checkpoint_with_values_of_the_wrong_type_is_damaged(tmp_path: Path, name: str) -> None:
    step = tmp_path / "step-00000001"
    step.mkdir()
    (step / "trainer.json").write_text(json.dumps({"step": 1, name: "evil"}))
    with pytest.raises(CheckpointError, match=f"trainer.json is damaged: {name} has the wrong type"):
        _ = StoredCheckpoint(step, 1).trainer


@pytest.mark.parametrize(
    "values", [{"step": "1"}, {"row": None}, {"recent_losses": {}}, {"ending": 5}, {"ending": [1]}, {"x": 1}]
)
def test_a_state_with_values_of_the_wrong_type_is_damaged(values: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=f"is damaged: {next(iter(values))} is "):
        TrainState.from_dict(values)
    state = TrainState(step=3, decay_window=(1, 2), best_val_loss=0.5)
    assert TrainState.from_dict(json.loads(json.dumps(state.to_dict()))) == state


def test_metrics_of_the_wrong_type_are_missing_in_the_history() -> None:
    wrong = ["x", {}, [], None, 10**400]
    lines = [{"step": 1, "loss": value, "tokens": value, "grad_norm": value} for value in wrong]
    history = History.of([*lines, {"step": 2, "loss": 2, "tokens": 5, "grad_norm": 0.5}])
    assert [*np.isnan(history.losses)] == [True] * 5 + [False]
    assert [*history.tokens] == [0] * 5 + [5]


def test_a_role_that_is_half_of_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    load_tokenizer().save(tmp_path)
    (tmp_path / "checksums.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "\\ud800"}')
    with pytest.raises(ConfigError, match=r"the vocabulary has no '.*', the pad_token"):
        load_tokenizer(tmp_path)
