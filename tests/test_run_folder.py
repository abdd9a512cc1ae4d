"""The folder that a run leaves."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from minimind.config.options import PretrainConfig
from minimind.config.presets import resolve
from minimind.config.schema import parse_values, read_toml
from minimind.errors import ConfigError, DataError, UserError
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
    with pytest.raises(ConfigError, match="already holds a run; continue it with --resume, or name another"):
        claim(folder)
    claim(folder, resume=True)
    assert {path.name for path in tmp_path.iterdir()} == {trace, "config.toml"}


def claim(folder, *, resume=False, fails=False):
    with folder.claim(resume=resume):
        folder.save_options(PretrainConfig())
        if fails:
            raise DataError("no text")


def test_new_folder_is_made_with_its_parents_and_stays_clean(tmp_path):
    folder = RunFolder(tmp_path / "a" / "b")
    with folder.claim(resume=False):
        assert [path.name for path in folder.path.iterdir()] == [".lock"]
    assert not folder.path.exists()
    with folder.claim(resume=False):
        folder.save_options(PretrainConfig())
    assert [path.name for path in folder.path.iterdir()] == ["config.toml"]


def test_a_failure_before_the_first_step_leaves_no_claimed_folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(DataError):
        claim(folder, fails=True)
    assert not folder.path.exists()
    folder.path.mkdir()
    folder.metrics.write_text("{}")
    with pytest.raises(DataError):
        claim(folder, resume=True, fails=True)
    assert folder.config.exists()


def test_files_that_are_no_run_do_not_matter(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with RunFolder(tmp_path).claim(resume=False):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_temporary_files_of_a_killed_run_are_removed_and_links_not_followed(tmp_path):
    run, other = RunFolder(tmp_path / "run"), tmp_path / "other"
    for path in (run.path / ".model.tmp" / "a", run.model / ".tmp" / "b", other / ".tmp9" / "precious"):
        path.parent.mkdir(parents=True)
        path.write_text("x")
    for path in (run.path / ".config.toml.tmp", run.model / ".tmpAb12", run.model / ".a.tmp", run.config):
        path.write_text("x")
    (run.path / "spikes").symlink_to(other)
    with run.claim(resume=True):
        pass
    assert sorted(path.name for path in run.path.rglob("*")) == ["config.toml", "model", "spikes"]
    assert (other / ".tmp9" / "precious").exists()


def test_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output-dir .*run cannot be written \(.*file is not a folder\)"):
        claim(RunFolder(tmp_path / "file" / "run"))


@pytest.mark.parametrize(("owner", "call"), [(os, "open"), (Path, "mkdir"), (Path, "exists")])
def test_folder_without_permission_is_refused(tmp_path, monkeypatch, owner, call):
    def refuse(self, *args, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(owner, call, refuse)
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\); name another folder"):
        claim(RunFolder(tmp_path))


def test_a_full_disk_is_found_before_anything_is_changed(tmp_path, monkeypatch):
    def refuse(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", refuse)
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match=r"--output-dir .*run cannot be written .No space left.*: free space"):
        claim(folder)
    assert list(tmp_path.iterdir()) == []
    folder.path.mkdir()
    folder.config.write_text("seed = 3")
    with pytest.raises(UserError, match="No space left"):
        claim(folder, resume=True)
    assert [(path.name, path.read_text()) for path in folder.path.iterdir()] == [("config.toml", "seed = 3")]


def test_a_folder_in_use_is_refused_with_host_and_process(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.claim(resume=False):
        for resume in (False, True):
            with pytest.raises(ConfigError) as caught:
                claim(RunFolder(tmp_path / "run"), resume=resume)
            holder = f"process {os.getpid()} on {socket.gethostname()}"
            assert f"is in use by another run ({holder})" in str(caught.value)
    claim(folder)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_leaves_no_lock_though_its_children_survive(tmp_path):
    reader, writer = os.pipe()
    run = os.fork()
    if not run:
        with RunFolder(tmp_path / "run").claim(resume=False):
            if not os.fork():
                time.sleep(30)  # a worker, such as one of tokenization
                os._exit(0)
            os.write(writer, b"x")
            time.sleep(30)
    os.read(reader, 1)
    with pytest.raises(ConfigError, match=f"process {run} on"):
        claim(RunFolder(tmp_path / "run"))
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    claim(RunFolder(tmp_path / "run"))


def test_another_run_is_waited_for_where_a_launcher_restarts(tmp_path):
    held = RunFolder(tmp_path).claim(resume=False)
    held.__enter__()
    threading.Timer(0.3, held.__exit__, (None, None, None)).start()
    notes = []
    with RunFolder(tmp_path).claim(resume=True, wait_seconds=20, note=notes.append):
        pass
    (note,) = notes
    assert f"is in use; waiting up to 20 s for the other run to end (process {os.getpid()} on" in note


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
