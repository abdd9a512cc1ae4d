"""Files that are replaced as a whole, without following links, with the permissions of the umask."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from minimind.errors import ConfigError, UserError
from minimind.io import atomic
from minimind.io.atomic import replace_files, write_file, write_output, write_text
from minimind.io.reading import open_regular, parse_json
from minimind.io.safetensors import write_tensors
from minimind.run_folder import RunFolder


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    (run / ".config.toml.tmp").symlink_to(victim)
    (run / "weights").symlink_to(victim)
    (run / ".tmp").symlink_to(tmp_path)
    write_text(run / "config.toml", "new")
    write_file(run / "weights", [b"new"])
    with replace_files(run) as written:
        (written / "model").write_text("new")
    assert victim.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "victim"]
    (run / "checksums.json").unlink()
    assert {path.name: path.read_text() for path in run.iterdir()} == {
        "config.toml": "new", "weights": "new", "model": "new",
    }  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    old = os.umask(umask)
    try:
        write_text(tmp_path / "a", "x")
        write_tensors(tmp_path / "b", {"w": torch.ones(2)})
    finally:
        os.umask(old)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "ab"] == [mode, mode]


def test_text_is_on_the_disk_before_it_replaces_the_old_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(atomic.os, "fsync", lambda handle: calls.append("fsync"))
    replace = os.replace
    monkeypatch.setattr(atomic.os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    write_text(tmp_path / "a", "x")
    assert calls == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_leaves_the_old_files_and_no_temporary_ones(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "model"
    if exists:
        folder.mkdir()
        (folder / "a").write_text("old")

    def fail() -> None:
        with replace_files(folder) as written:
            (written / "a").write_text("new")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fail()
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == (
        ["model", "model/a"] if exists else []
    )
    assert not exists or (folder / "a").read_text() == "old"


def test_remains_of_a_killed_process_are_replaced(tmp_path: Path) -> None:
    for remains in (tmp_path / ".model.tmp", tmp_path / "model" / ".tmp"):
        remains.mkdir(parents=True)
        (remains / "half").write_text("half")
        with replace_files(tmp_path / "model") as written:
            (written / "a").write_text("new")
        assert not remains.exists()
        assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["a", "checksums.json"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(path)


@pytest.mark.parametrize("text", ["[" * 200_000, b"\xff", "{"])
def test_every_defect_of_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"deeply|decode|Expecting"):
        parse_json(text)


def test_a_place_that_is_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for name, reason in (("file", "is not a folder"), ("gone", "links to .*nowhere, which does not exist")):
        for path in (tmp_path / name, tmp_path / name / "run"):
            with pytest.raises(UserError, match=f"{path} cannot be written .{tmp_path / name} {reason}"):
                with RunFolder(path).claim(resume=False):
                    pass


def test_an_output_file_is_replaced_as_a_whole_and_a_link_to_it_stays(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_output("--html", tmp_path / "link", "new")
    assert ((tmp_path / "link").is_symlink(), (tmp_path / "real").read_text()) == (True, "new")
    with pytest.raises(ConfigError, match=r"--html .*nowhere/x cannot be written"):
        write_output("--html", tmp_path / "nowhere" / "x", "new")
