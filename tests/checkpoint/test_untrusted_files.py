"""What SECURITY.md promises about files from others: nothing in them is run."""

from __future__ import annotations

import ast
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from minimind.checkpoint.files import MODEL, StoredCheckpoint
from minimind.config.options import PretrainConfig
from minimind.config.schema import schema_of
from minimind.errors import CheckpointError, ConfigError
from minimind.formats.original_minimind import load_upstream
from minimind.modeling.config import MiniMindConfig

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "minimind").rglob("*.py"), *(ROOT / "cli").rglob("*.py")])


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.mkdir, (self.folder,)


def test_every_option_that_names_a_path_is_named_to_those_who_take_a_configuration_of_others() -> None:
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    (row,) = (line for line in page.splitlines() if line.startswith("| `config.toml`"))
    paths = {
        name
        for name, setting in schema_of(PretrainConfig).items()
        if setting.metavar.strip("[]") in ("PATH", "FOLDER")
    }
    assert {"data", "cache_dir"} < paths
    assert paths <= set(re.findall(r"`(\w+)`", row))


def test_a_pickle_among_weights_is_refused_and_not_run(tmp_path: Path) -> None:
    file, made = tmp_path / "pretrain_512.pth", tmp_path / "made"
    file.write_bytes(pickle.dumps({"weight": Hostile(made)}, protocol=2))
    with pytest.raises(ConfigError, match="cannot be read as a state dict"):
        load_upstream(file, MiniMindConfig())
    (tmp_path / MODEL).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="cannot be read"):
        StoredCheckpoint(tmp_path, 1).weights()
    assert not made.exists()
    pickle.loads(file.read_bytes())
    assert made.exists()


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_no_file_unpickles_or_evaluates() -> None:
    met = 0
    for path in FILES:
        for name, call in calls(path):
            where = f"{path}:{call.lineno}"
            assert name not in ("eval", "exec", "compile", "pickle.load", "pickle.loads"), where
            if name in ("torch.load", "np.load"):
                met += 1
                safe = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}[name]
                given = {
                    word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg == safe[0]
                }
                assert given == dict([safe]), where
            assert "trust_remote_code" not in {word.arg for word in call.keywords}, where
    assert met
