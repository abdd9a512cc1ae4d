"""A folder that appears whole or not at all, and what it may take the place of."""

from __future__ import annotations

from pathlib import Path

import pytest

from minimind.errors import ConfigError, UserError
from minimind.io.atomic import new_folder


def write(path: Path, text: str, *, overwrite: bool = False) -> None:
    with new_folder(path, "--output", overwrite=overwrite) as folder:
        (folder / "config.json").write_text(text)
        assert not (path / "config.json").exists() or (path / "config.json").read_text() != text


def everything(folder: Path) -> dict[str, str | None]:
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def test_the_folder_and_its_parents_appear_at_the_end(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b", "new")
    assert everything(tmp_path) == {"a": None, "a/b": None, "a/b/config.json": "new"}


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write(tmp_path / "a", "new")
    assert everything(tmp_path) == {"a": None, "a/config.json": "new"}


def test_the_current_folder_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write(Path("."), "new")
    assert everything(tmp_path) == {"here": None, "here/config.json": "new"}


def test_the_root_of_all_folders_cannot_be_named() -> None:
    with pytest.raises(ConfigError, match="--output / is no place for a new folder; name one below it"):
        write(Path("/"), "new")


def test_an_interruption_leaves_nothing_and_the_old_model(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")

    def interrupted(place: Path) -> None:
        with new_folder(place, "--output", overwrite=True) as folder:
            (folder / "config.json").write_text("half")
            raise KeyboardInterrupt

    for name in ("a", "b"):
        with pytest.raises(KeyboardInterrupt):
            interrupted(tmp_path / name)
    assert everything(tmp_path) == {"a": None, "a/config.json": "old"}


def test_a_full_disk_is_a_mistake_with_a_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--output .*a could not be written: .*No space left"):
        with new_folder(tmp_path / "a", "--output"):
            raise OSError(28, "No space left on device")
    assert everything(tmp_path) == {}


def test_a_model_is_replaced_only_when_asked(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")
    with pytest.raises(ConfigError, match=r"--output .*a is not empty; .* by --overwrite"):
        write(tmp_path / "a", "new")
    write(tmp_path / "a", "new", overwrite=True)
    assert everything(tmp_path) == {"a": None, "a/config.json": "new"}


@pytest.mark.parametrize("other", ["thesis.txt", "checkpoints/step"])
def test_what_is_more_than_a_model_is_never_replaced(tmp_path: Path, other: str) -> None:
    write(tmp_path / "a", "old")
    (tmp_path / "a" / other).parent.mkdir(exist_ok=True)
    (tmp_path / "a" / other).write_text("mine")
    before = everything(tmp_path)
    with pytest.raises(ConfigError, match=r"holds (thesis.txt|checkpoints), which is no part of an exported"):
        write(tmp_path / "a", "new", overwrite=True)
    assert everything(tmp_path) == before


def test_a_file_in_the_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(ConfigError, match=r"a is a file; name a folder"):
        write(tmp_path / "a", "new", overwrite=True)
    with pytest.raises(UserError, match=r"a/b.* cannot be written"):
        write(tmp_path / "a" / "b", "new")


def test_remains_of_a_killed_process_are_put_in_order(tmp_path: Path) -> None:
    """Killed while writing, and killed between moving the old model away and the new one in."""
    (tmp_path / ".a.tmp").mkdir()
    (tmp_path / ".a.tmp" / "half.json").write_text("half")
    (tmp_path / ".a.replaced").mkdir()
    (tmp_path / ".a.replaced" / "config.json").write_text("old")
    with pytest.raises(ConfigError, match="is not empty"):
        write(tmp_path / "a", "new")
    assert (tmp_path / "a" / "config.json").read_text() == "old"
    write(tmp_path / "a", "new", overwrite=True)
    assert everything(tmp_path) == {"a": None, "a/config.json": "new"}
