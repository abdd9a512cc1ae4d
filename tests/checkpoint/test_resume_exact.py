"""A resumed run equals an uninterrupted one, to the bit."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind import PretrainConfig
from minimind.checkpoint.files import best_checkpoint
from minimind.training.summary import PretrainResult
from minimind.training.trainer import Trainer
from support.tiny_runs import (
    STEPS,
    STEPS_PER_EPOCH,
    assert_same_end,
    last_checkpoint,
    reports,
    tiny,
    write_corpus,
)
from support.tiny_runs import pretrain_as_command as pretrain


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


def interrupted(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, *steps: int) -> PretrainResult:
    """Run to the end with a SIGTERM during each of the steps named, and a `--resume` after each."""
    work = Trainer.train_step
    wanted = list(steps)

    def step_with_signal(run: Any, batch: Any, limit: float) -> torch.Tensor:
        if wanted and run.state.step + 1 == wanted[0]:
            wanted.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)
        return work(run, batch, limit)

    monkeypatch.setattr(Trainer, "train_step", step_with_signal)
    for step in steps:
        stopped = pretrain(config)
        assert (stopped.stopped, stopped.steps) == ("SIGTERM", step)
        config = dataclasses.replace(config, resume="auto")
    return pretrain(config)


@pytest.fixture(scope="module")
def straight(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    assert pretrain(tiny(corpus, out)).steps == STEPS
    return out


def test_the_run_that_is_compared_has_what_could_go_wrong(straight: Path) -> None:
    lines = reports(straight)
    assert [line["step"] for line in lines if "loss" in line] == [3, 6, 9, 12, 15, 18, STEPS]
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 5, 10, 15, STEPS]
    digests = [line["digest"] for line in lines if "loss" in line]
    assert len(set(digests)) == len(digests)
    assert last_checkpoint(straight).trainer["state"]["digest"] == digests[-1]
    assert last_checkpoint(straight).trainer["state"]["epoch"] == 2


# Before the first report and checkpoint, at a checkpoint between two reports, at an evaluation, at both edges
# of an epoch (whose last step is short) and before the end.
@pytest.mark.parametrize("step", [1, 4, 5, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 1, STEPS - 1])
def test_stopped_at_a_step_and_resumed_equals_never_stopped(
    corpus: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    result = interrupted(tiny(corpus, tmp_path / "run"), monkeypatch, step)
    assert (result.stopped, result.steps) == (None, STEPS)
    assert_same_end(tmp_path / "run", straight)


@pytest.mark.slow
def test_stopped_at_every_step_and_resumed_equals_never_stopped(
    corpus: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tiny(corpus, tmp_path / "run"), monkeypatch, *range(1, STEPS))
    assert_same_end(tmp_path / "run", straight)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"packing": False},
        {"packing": False, "dropout": 0.0, "accumulation_steps": 1},
        {"mixed_precision": "bf16"},
        {"use_moe": True, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        {"lr_schedule": "wsd", "warmup_steps": 5, "grad_clip": 0.0, "tie_word_embeddings": False},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_other_configurations_are_as_exact(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    pretrain(tiny(corpus, tmp_path / "straight", max_steps=10, **changes))
    interrupted(tiny(corpus, tmp_path / "run", max_steps=10, **changes), monkeypatch, 2, 5, 8)
    assert_same_end(tmp_path / "run", tmp_path / "straight")


def stop_before_evaluation(number: int, work: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `validate` to have this process asked to stop as it begins for the n-th time."""
    left = iter(range(1, 100))

    def validate(*arguments: Any, **options: Any) -> Any:
        if next(left) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return work(*arguments, **options)

    return validate


# Evaluations of the loop, counted from 1; the fourth is the one at the end.
@pytest.mark.parametrize("number", [2, 4])
def test_an_evaluation_that_was_cut_off_is_done_later(
    corpus: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    config = tiny(corpus, tmp_path / "run")
    wrapped = stop_before_evaluation(number, Trainer.validate)
    monkeypatch.setattr(Trainer, "validate", wrapped)
    assert pretrain(config).stopped == "SIGTERM"
    pretrain(dataclasses.replace(config, resume="auto"))
    assert_same_end(tmp_path / "run", straight)


def test_a_mark_of_the_best_that_a_crash_prevented_is_set_on_resume(corpus: Path, tmp_path: Path) -> None:
    """The evaluation was written down, but the process was killed before best.json was."""
    config = tiny(corpus, tmp_path / "run", save_interval=5)
    pretrain(config, stop_after=10)
    best = tmp_path / "run" / "checkpoints" / "best.json"
    marked = best_checkpoint(best.parent)
    assert marked is not None
    assert marked == (10, reports(tmp_path / "run")[-1]["val_loss"])
    best.unlink()
    pretrain(dataclasses.replace(config, resume="auto"), stop_after=11)
    assert best_checkpoint(best.parent) == marked


def test_a_run_can_be_ended_after_a_step_to_go_on_another_time(
    corpus: Path, straight: Path, tmp_path: Path
) -> None:
    config = tiny(corpus, tmp_path / "run")
    result = pretrain(config, stop_after=6)
    assert (result.steps, result.stopped) == (6, "the step asked for")
    pretrain(dataclasses.replace(config, resume="auto"))
    assert_same_end(tmp_path / "run", straight)


def test_other_sequences_have_another_digest(corpus: Path, straight: Path, tmp_path: Path) -> None:
    pretrain(tiny(corpus, tmp_path / "run", seed=7, max_steps=3))
    assert reports(tmp_path / "run")[1]["digest"] != reports(straight)[1]["digest"]


def test_a_finished_run_that_is_resumed_changes_nothing(corpus: Path, tmp_path: Path) -> None:
    config = tiny(corpus, tmp_path / "run", max_steps=6)
    pretrain(config)
    before = reports(tmp_path / "run")
    saved = (last_checkpoint(tmp_path / "run").path / "manifest.json").stat()
    assert pretrain(dataclasses.replace(config, resume="auto")).steps == 6
    assert reports(tmp_path / "run") == before
    assert (last_checkpoint(tmp_path / "run").path / "manifest.json").stat() == saved


def test_a_weighted_mixture_stopped_and_resumed_equals_never_stopped(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b").mkdir()
    lines = corpus.read_text().replace("cat", "dog").splitlines(keepends=True)
    (tmp_path / "b" / "1.jsonl").write_text("".join(lines[:6]))
    (tmp_path / "b" / "2.jsonl").write_text("".join(lines[6:10]))
    data = (f"{corpus}:0.7", f"{tmp_path}/b/*.jsonl:0.3")
    pretrain(tiny(corpus, tmp_path / "straight", data=data))
    banner = [line.split() for line in capsys.readouterr().out.splitlines() if "of its epochs" in line]
    assert [line[line.index("of") - 1] for line in banner] == ["70.0%", "30.0%"]
    # The small entry holds fewer tokens than its share: it is read more often than the two passes of the run.
    passes = [float(line[-4]) for line in banner]
    assert passes[0] < 2 < passes[1]
    config = tiny(corpus, tmp_path / "run", data=data)
    result = interrupted(config, monkeypatch, 5, 13)
    assert result.stopped is None
    assert_same_end(tmp_path / "run", tmp_path / "straight")
