"""Trackers and weight formats of other packages, found by their entry points."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from minimind import MiniMindConfig, MiniMindForCausalLM, PretrainConfig, load_tokenizer
from minimind.config.entry_points import plugin_names
from minimind.errors import ConfigError, UserError
from minimind.formats.export import export_model
from minimind.formats.huggingface import save_model
from minimind.formats.open_model import open_model
from minimind.run_folder import RunFolder
from minimind.tracking.trackers import Trackers, check_trackers

PACKAGE = """
import dataclasses
from pathlib import Path
from safetensors.torch import load_file, save_file
from minimind.formats.open_model import ModelSource
from minimind import MiniMindConfig

class Board:
    opened = []
    def start(self, run):
        self.run, self.logged, self.run_id = run, [], "board-1"
        Board.opened.append(self)
    def log(self, values, step):
        self.logged.append((step, dict(values)))
        if values.get("loss") == 666:
            raise RuntimeError("the board is full")

class Flat:
    damage = 0.0
    def save(self, weights, config, tokenizer, folder, dtype):
        stored = {name: tensor.to(dtype) + self.damage for name, tensor in weights.items()}
        save_file(stored, folder / "flat.st")
        (folder / "flat.txt").write_text(repr(config.to_dict()))
    def load(self, folder):
        return load_file(folder / "flat.st")
    def recognizes(self, path):
        return (path / "flat.st").is_file()
    def open(self, path):
        config = MiniMindConfig.from_dict(eval((path / "flat.txt").read_text()))
        return ModelSource(path, "flat folder", config, lambda: self.load(path), lambda: None)

class NoTracker:
    pass
"""
ENTRY_POINTS = """
[minimind.trackers]
board = acme_plugins:Board
nothing = acme_plugins:NoTracker
broken = acme_plugins:Missing

[minimind.formats]
flat = acme_plugins:Flat
"""


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed distribution `acme-plugins`."""
    site = tmp_path / "site"
    metadata = site / "acme_plugins-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-plugins\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    (site / "acme_plugins.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(site))
    yield
    sys.modules.pop("acme_plugins", None)


def test_a_registered_tracker_is_a_value_of_the_option_and_gets_the_metrics(tmp_path: Path) -> None:
    assert plugin_names("minimind.trackers") == ["board", "broken", "nothing"]
    config = PretrainConfig(tracker=("board",), run_name="mine", max_steps=7)
    check_trackers(config)
    warnings: list[str] = []
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    trackers = Trackers(
        config,
        folder,
        Accelerator(cpu=True),
        {"board": "board-0"},
        start_step=2,
        environment={"python": "3"},
        warn=warnings.append,
    )
    assert trackers.state() == {"board": "board-1"}
    trackers.log({"loss": 2.5, "digest": "text"}, 3)
    trackers.log_text("sample", "Once", 3)
    trackers.log({"loss": 666}, 4)
    trackers.log({"loss": 1.0}, 5)
    trackers.close()
    (board,) = sys.modules["acme_plugins"].Board.opened
    assert board.logged == [(3, {"loss": 2.5}), (4, {"loss": 666})]
    run = board.run
    assert (run.name, run.start_step, run.run_id, run.environment) == ("mine", 2, "board-0", {"python": "3"})
    assert (run.folder, run.options["max_steps"]) == (folder.path, 7)
    assert warnings == [
        "tracker board failed and gets no more values (RuntimeError: the board is full); training continues "
        "without it."
    ]


def test_what_cannot_be_used_is_named() -> None:
    with pytest.raises(ConfigError, match=r"choose tensorboard, .*none, board, broken or nothing"):
        PretrainConfig(tracker=("paper",))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"--tracker broken is a plug-in of acme-plugins, which cannot be"):
        check_trackers(PretrainConfig(tracker=("broken",)))  # type: ignore[arg-type]
    for given in ({"config": PretrainConfig(tracker=("nothing",))}, {"trackers": [object()]}):  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="is no tracker; pass an object with the methods start and log"):
            check_trackers(**{"config": PretrainConfig(), **given})


def test_a_registered_format_writes_is_verified_and_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer()
    config = MiniMindConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = MiniMindForCausalLM(config)
    save_model(model, tmp_path / "model", dtype=torch.float32)
    done = export_model(tmp_path / "model", tmp_path / "flat", "flat")
    assert (done.format, done.dtype, sorted(done.files)) == ("flat", "float32", ["flat.st", "flat.txt"])
    stored = load_file(tmp_path / "flat" / "flat.st")
    assert torch.equal(stored["model.norm.weight"], model.model.norm.weight)
    source = open_model(tmp_path / "flat")
    assert source.what == "flat folder"
    assert torch.equal(source.weights()["model.norm.weight"], model.model.norm.weight)
    monkeypatch.setattr(sys.modules["acme_plugins"].Flat, "damage", 1e-3)
    with pytest.raises(UserError, match="verification failed"):
        export_model(tmp_path / "model", tmp_path / "again", "flat")
    with pytest.raises(ConfigError, match=r"--format round is not known; choose huggingface, .*gguf, flat"):
        export_model(tmp_path / "model", tmp_path / "again", "round")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no model"):
        open_model(tmp_path / "empty")
