"""What --resume continues, what it refuses, and that a refusal changes nothing."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import minimind.training.pretrain  # noqa: F401 - for sys.modules below
from minimind.checkpoint.files import stored_checkpoints
from minimind.checkpoint.resume import containing_run, run_to_resume
from minimind.errors import CheckpointError, ConfigError
from minimind.run_folder import RunFolder
from minimind.training.trainer import Trainer
from support.tiny_runs import assert_same_end, last_checkpoint, reports, tiny, write_corpus
from support.tiny_runs import pretrain_as_command as pretrain

MODULE = sys.modules["minimind.training.pretrain"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 12 steps, saved at 3, 6, 9 and 12."""
    folder = tmp_path_factory.mktemp("finished")
    write_corpus(folder / "corpus.jsonl")
    pretrain(config_of(folder / "run"))
    return folder / "run"


def config_of(run: Path, **changes: Any) -> Any:
    return tiny(run.parent / "corpus.jsonl", run, max_steps=12, save_interval=3, **changes)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes | str | None]:
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }


def flip(run: Path) -> None:
    for checkpoint in stored_checkpoints(run / "checkpoints"):
        data = bytearray((checkpoint.path / "model.safetensors").read_bytes())
        data[-9] ^= 1
        (checkpoint.path / "model.safetensors").write_bytes(data)


def truncate(run: Path) -> None:
    for checkpoint in stored_checkpoints(run / "checkpoints"):
        (checkpoint.path / "manifest.json").write_text("[" * 200_000)


def unmount(run: Path, *, mount_point: bool = False) -> None:
    (run / "checkpoints").rename(run.parent / "elsewhere")
    if mount_point:
        (run.parent / "disk").mkdir()
    (run / "checkpoints").symlink_to(run.parent / "disk")


def remove(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def empty(run: Path) -> None:
    remove(run)
    (run / "checkpoints").mkdir()


def empty_without_model(run: Path) -> None:
    empty(run)
    shutil.rmtree(run / "model")


LOSSES: list[tuple[Callable[[Path], None], str]] = [
    (flip, r"all 2 checkpoints are damaged in .*checkpoints: .*step-00000012.*checksum mismatch"),
    (truncate, r"all 2 checkpoints are damaged in .*manifest.json is damaged: it is not JSON"),
    (unmount, r"checkpoints are missing: .*checkpoints links to .*disk, which does not exist"),
    (lambda run: unmount(run, mount_point=True), r"checkpoints are missing: .*Mount or restore them"),
    (remove, r"holds a run of 12 steps or more, but its checkpoints are missing"),
    (empty, r"holds a run of 12 steps or more, but its checkpoints are missing"),
    (empty_without_model, r"holds a run of 12 steps or more, but its checkpoints are missing"),
]


@pytest.mark.parametrize(("lose", "message"), LOSSES)
def test_a_run_that_lost_its_checkpoints_is_not_started_again(
    run: Path, lose: Callable[[Path], None], message: str
) -> None:
    lose(run)
    before = contents(run)
    with pytest.raises(CheckpointError, match=message):
        pretrain(config_of(run, resume="auto"))
    assert contents(run) == before


def test_a_run_killed_before_its_first_checkpoint_starts_again(run: Path, finished: Path) -> None:
    """The report of step 6 may be written before the checkpoint of step 3 is."""
    for name in ("checkpoints", "model"):
        shutil.rmtree(run / name)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    assert max(report["step"] for report in reports_of(lines[:3])) <= 6
    pretrain(config_of(run, resume="auto"))
    assert_same_end(run, finished)


def reports_of(lines: list[str]) -> list[dict[str, Any]]:
    import json

    return [json.loads(line) for line in lines]


def test_an_older_checkpoint_is_used_when_the_newest_is_damaged(run: Path, finished: Path) -> None:
    (last_checkpoint(run).path / "trainer.json").write_text("[" * 200_000)
    pretrain(config_of(run, resume="auto"))
    assert_same_end(run, finished)
    assert [entry.step for entry in stored_checkpoints(run / "checkpoints")] == [9, 12]


def test_resuming_a_finished_run_writes_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run)
    for resume in ("auto", str(run)):
        result = pretrain(config_of(run, resume=resume))
        assert (result.steps, result.stopped, result.tokens > 0) == (12, None, True)
        assert "finished (12/12 steps); --max-steps or --epochs trains on." in capsys.readouterr().out
        assert contents(run) == before
    with pytest.raises(CheckpointError, match="seed 42 → 43"):
        pretrain(config_of(run, resume="auto", seed=43))
    assert contents(run) == before


@pytest.mark.parametrize("lost", ["model", "model/tokenizer.json", "totals"])
def test_a_run_killed_before_its_model_was_written_is_not_finished(
    run: Path, finished: Path, lost: str
) -> None:
    if lost == "totals":
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics.jsonl").write_text("".join(lines[:-1]))
        (run / "model" / "model.safetensors").write_bytes(b"of an earlier part")
    elif lost == "model":
        shutil.rmtree(run / lost)
    else:
        (run / lost).unlink()
    pretrain(config_of(run, resume="auto"))
    assert_same_end(run, finished)
    if lost == "totals":
        assert sum("total_elapsed" in line for line in (run / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_finished_run_trains_on_with_more_steps(run: Path) -> None:
    assert pretrain(dataclasses.replace(config_of(run, resume="auto"), max_steps=15)).steps == 15
    assert max(line["step"] for line in reports(run)) == 15


def test_options_are_saved_before_tokenization(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config_of(finished), output_dir=str(tmp_path / "run"), seed=7)
    saved: list[str] = []

    def killed(*args: Any, **kwargs: Any) -> None:
        saved.append((tmp_path / "run" / "config.toml").read_text())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MODULE, "prepare_data", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config)
    assert "seed = 7\n" in saved[0]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.toml"]
    assert pretrain(dataclasses.replace(config, resume="auto")).steps == 12


@pytest.mark.slow
def test_a_second_run_is_refused_while_the_first_one_trains(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[subprocess.CompletedProcess[str]] = []
    train = Trainer.train

    def train_beside_others(trainer: Trainer) -> None:
        for resume in ([], ["--resume"]):
            args = ["pretrain", *resume, "--output-dir", str(run), "--config", str(run / "config.toml")]
            command = [sys.executable, "-m", "minimind_cli", *args, "--seed", "7"]
            paths = os.pathsep.join(filter(None, sys.path))
            env = os.environ | {"PYTHONPATH": paths, "COLUMNS": "1000"}
            refused.append(subprocess.run(command, env=env, capture_output=True, text=True))
        train(trainer)

    monkeypatch.setattr(Trainer, "train", train_beside_others)
    pretrain(dataclasses.replace(config_of(run, resume="auto"), max_steps=13))
    assert [done.returncode for done in refused] == [2, 2]
    holder = f"is in use by another run (process {os.getpid()} on "
    assert all(holder in done.stderr for done in refused)
    assert "seed = 42\n" in (run / "config.toml").read_text()


# Where the options come from.


def test_options_come_from_the_folder_that_is_resumed(run: Path) -> None:
    found = run_to_resume("auto", str(run), complete=False)
    assert (found.config, found.output_dir) == (run / "config.toml", None)
    checkpoint = run / "checkpoints" / "step-00000009"
    for path in (run, run / "checkpoints", checkpoint):
        found = run_to_resume(str(path), None, complete=False)
        assert (found.config, found.output_dir) == (run / "config.toml", str(run))
        assert found.note == (
            f"Continuing in {run} with the options of {run}/config.toml; flags override them."
        )
    found = run_to_resume(str(checkpoint), "other", complete=False)
    assert (found.config, found.output_dir) == (run / "config.toml", None)
    assert found.note is not None
    assert found.note.startswith(f"Starting from the checkpoint {checkpoint} in other with the options of")


def test_a_folder_without_a_run_is_refused_unless_the_command_is_complete(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="typo holds no run to resume; check --output-dir"):
        run_to_resume("auto", str(tmp_path / "typo"), complete=False)
    assert run_to_resume("auto", str(tmp_path / "typo"), complete=True).config is None
    assert run_to_resume(str(tmp_path / "typo"), None, complete=False).config is None


def test_a_folder_of_runs_is_not_accepted_as_a_run(run: Path) -> None:
    (run / "other").mkdir()
    assert containing_run(run / "other") is None
    assert containing_run(run.parent) is None
    assert containing_run(run) == RunFolder(run)
