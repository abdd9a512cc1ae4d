"""The folder that a run leaves."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from minimind.config.options import PretrainConfig
from minimind.config.presets import resolve
from minimind.config.schema import parse_values, read_toml
from minimind.errors import ConfigError
from minimind.io import atomic
from minimind.io.atomic import write_text
from minimind.run_folder import RunFolder


@pytest.mark.parametrize("trace", ["config.toml", "metrics.jsonl", "checkpoints"])
def test_folder_of_another_run_is_refused_unless_it_is_resumed(tmp_path, trace):
    if trace == "checkpoints":
        (tmp_path / trace).mkdir()
    else:
        (tmp_path / trace).write_text("")
    folder = RunFolder(tmp_path)
    with pytest.raises(ConfigError, match="already holds a run; go on with it by --resume, or name another"):
        folder.claim(resume=False)
    folder.claim(resume=True)


def test_new_folder_is_made_with_its_parents_and_stays_clean(tmp_path):
    folder = RunFolder(tmp_path / "a" / "b")
    folder.claim(resume=False)
    assert folder.path.is_dir()
    assert list(folder.path.iterdir()) == []
    # Claimed and not yet used: the next may have it.
    folder.claim(resume=False)


def test_files_that_are_no_run_do_not_matter(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    RunFolder(tmp_path).claim(resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--output-dir .*run cannot be written \(Not a directory\)"):
        RunFolder(tmp_path / "file" / "run").claim(resume=False)


@pytest.mark.parametrize("call", ["touch", "mkdir", "exists"])
def test_folder_without_permission_is_refused(tmp_path, monkeypatch, call):
    def refuse(self, *args, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, call, refuse)
    with pytest.raises(ConfigError, match=r"cannot be written \(Permission denied\); name another folder"):
        RunFolder(tmp_path).claim(resume=False)


def test_description_reads_back_to_the_same_configuration(tmp_path):
    config = PretrainConfig(data=("a b.txt", "模型.jsonl"), learning_rate=3e-4, max_steps=7)
    folder = RunFolder(tmp_path)
    folder.describe(config, {"python": "3.11", "host": "größer"})
    values, problems = parse_values(PretrainConfig, read_toml(folder.config), "config.toml")
    assert problems == []
    assert resolve(file=values) == config
    assert json.loads(folder.environment.read_text(encoding="utf-8"))["host"] == "größer"
    assert folder.holds_a_run()


def test_failed_write_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "config.toml"
    write_text(path, "old")

    def crash(source, target):
        assert path.read_text() == "old"
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "replace", crash)
        with pytest.raises(OSError, match="No space left"):
            write_text(path, "new")
    assert path.read_text() == "old"
    write_text(path, "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("config.toml", "new")]
