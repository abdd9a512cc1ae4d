"""The table of checkpoints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from minimind.checkpoint.store import CheckpointStore, Snapshot
from minimind.errors import CheckpointError
from minimind_cli.checkpoints import checkpoints

app = typer.Typer()
app.command()(checkpoints)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    store = CheckpointStore(tmp_path / "checkpoints", 5)
    for step in (10, 20, 30):
        store.save(Snapshot(step, {"w": torch.ones(1000)}, {}, {"step": step, "tokens": step * 1000}))
    store.mark_best(20, 3.25)
    store.wait()
    return tmp_path


def lines(*arguments: object) -> list[str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return [line.rstrip() for line in result.output.splitlines()]


def test_each_checkpoint_has_a_row(run: Path) -> None:
    header, *rows = lines(run)
    assert header.split() == ["step", "tokens", "val", "loss", "size", "written", "state"]
    assert [row.split()[:2] for row in rows] == [["10", "10,000"], ["20", "20,000"], ["30", "30,000"]]
    assert "3.2500" in rows[1]
    assert rows[1].endswith("valid (best)")
    assert rows[2].endswith("valid")


def test_damage_shows_with_its_reason(run: Path) -> None:
    file = run / "checkpoints" / "step-00000030" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "model.safetensors is damaged" in lines(run / "checkpoints")[3]
    assert "checksums not verified" in lines(run, "--no-verify")[3]
    file.unlink()
    assert "model.safetensors is missing" in lines(run, "--no-verify")[3]


def test_a_folder_without_checkpoints_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        checkpoints(tmp_path, verify=True)


def test_listing_needs_no_torch() -> None:
    code = "import sys, minimind_cli.checkpoints; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_path_in_the_table_is_no_markup(run: Path) -> None:
    folder = run / "a[/b]\x1b"
    folder.mkdir(parents=True)
    (run / "checkpoints").rename(folder / "checkpoints")
    weights = folder / "checkpoints" / "step-00000010" / "model.safetensors"
    weights.unlink()
    assert "[/b]\\x1b/checkpoints" in "".join(lines(folder))
