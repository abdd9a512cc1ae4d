"""What a resumed run takes from its checkpoint, and what from the options it is given now."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minimind.checkpoint.checkpointer import RunCheckpoints
from minimind.checkpoint.compatibility import changes_evaluation
from minimind.checkpoint.files import best_checkpoint
from minimind.checkpoint.store import CheckpointStore
from minimind.checkpoint.train_state import TrainState
from minimind.errors import CheckpointError
from minimind.training.callbacks import Callbacks
from support import topologies
from support.tiny_runs import last_checkpoint, tiny, write_corpus
from support.tiny_runs import pretrain_as_command as pretrain

SETTINGS = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "learning_rate": 1e-2, "seed": 42}


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    topologies.forget_accelerator()
    yield
    topologies.forget_accelerator()


class Messages:
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.notes: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)


def checkpoints_in(folder: Path, **settings: Any) -> RunCheckpoints:
    """The checkpoints of a run of one tiny model, as `pretrain` puts them together."""
    topologies.forget_accelerator()
    accelerator, model, optimizer = topologies.start()
    topologies.train(accelerator, model, optimizer, 0, 1)
    parts = RunCheckpoints(
        CheckpointStore(folder, 9),
        accelerator,
        model,
        optimizer,
        SETTINGS | settings,
        Messages(),
        Callbacks(),
    )
    parts.trackers = SimpleNamespace(state=lambda: {"board": "chart 7"}, flush=lambda: None)
    return parts


def save(parts: RunCheckpoints, **state: Any) -> None:
    parts.save(TrainState(**state))
    parts.store.wait()


def group_values(parts: RunCheckpoints) -> list[tuple[float, tuple[float, float]]]:
    return [(group["weight_decay"], group["betas"]) for group in parts.optimizer.param_groups]


def test_a_run_resumed_with_another_weight_decay_and_beta_trains_with_them(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    config = tiny(corpus, tmp_path / "run", max_steps=4, weight_decay=0.1, beta1=0.9, beta2=0.95)
    pretrain(config, stop_after=2)
    before = last_checkpoint(tmp_path / "run").trainer["param_groups"]
    assert {tuple(group["betas"]) for group in before} == {(0.9, 0.95)}
    assert {group["weight_decay"] for group in before} == {0.1, 0.0}
    pretrain(dataclasses.replace(config, resume="auto", weight_decay=0.3, beta2=0.5))
    after = last_checkpoint(tmp_path / "run").trainer["param_groups"]
    assert {tuple(group["betas"]) for group in after} == {(0.9, 0.5)}
    assert [group["weight_decay"] for group in after] == [
        0.3 if group["weight_decay"] == 0.1 else 0.0 for group in before
    ]


def test_changed_group_values_stay_and_all_others_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    saved = checkpoints_in(tmp_path)
    saved.optimizer.param_groups[0]["betas"] = (0.7, 0.8)
    save(saved, step=1)
    parts = checkpoints_in(tmp_path, weight_decay=0.5)
    parts.optimizer.param_groups[0]["weight_decay"] = 0.5
    parts.resume("auto")
    (decay, betas), (no_decay, _) = group_values(parts)
    assert (decay, betas, no_decay) == (0.5, (0.7, 0.8), 0.0)


def test_changed_options_are_reported_unless_the_run_branches_off(tmp_path: Path) -> None:
    save(checkpoints_in(tmp_path), step=1)
    parts = checkpoints_in(tmp_path, learning_rate=5e-3)
    parts.resume("auto", branch=True)
    assert parts.progress.warnings == []
    parts.resume("auto")
    (warning,) = parts.progress.warnings
    assert warning.startswith("--learning-rate 0.01 → 0.005")


def test_options_that_may_not_change_are_refused_with_the_checkpoint_named(tmp_path: Path) -> None:
    save(checkpoints_in(tmp_path), step=1)
    with pytest.raises(CheckpointError, match=r"step-00000001(.|\n)*--seed 42 → 43"):
        checkpoints_in(tmp_path, seed=43).resume("auto")


def test_without_a_checkpoint_a_run_starts_and_says_so_where_one_was_wanted(tmp_path: Path) -> None:
    parts = checkpoints_in(tmp_path)
    assert parts.resume(None) == (TrainState(), -1, {})
    assert parts.progress.notes == []
    assert parts.resume("auto") == (TrainState(), -1, {})
    assert len(parts.progress.notes) == 1


@pytest.mark.parametrize("path", ["checkpoints", "link/checkpoints", "../run/checkpoints"])
def test_a_checkpoint_of_this_run_is_its_own_by_any_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "link").symlink_to(run)
    monkeypatch.chdir(run)
    save(checkpoints_in(run / "checkpoints"), step=1)
    state, saved_step, charts = checkpoints_in(run / "checkpoints").resume(path, branch=True)
    assert (state.step, saved_step, charts) == (1, 1, {"board": "chart 7"})


@pytest.mark.parametrize("branch", [False, True])
def test_a_checkpoint_of_another_run_is_not_saved_here_and_a_branch_gets_new_charts(
    tmp_path: Path, branch: bool
) -> None:
    save(checkpoints_in(tmp_path / "one"), step=1)
    parts = checkpoints_in(tmp_path / "other")
    state, saved_step, charts = parts.resume(str(tmp_path / "one"), branch=branch)
    assert (state.step, saved_step) == (1, -1)
    assert charts == ({} if branch else {"board": "chart 7"})


@pytest.mark.parametrize(("best_step", "expected"), [(2, 1.5), (4, 1.5), (6, math.inf)])
def test_the_best_loss_up_to_the_checkpoint_is_known_after_a_resume(
    tmp_path: Path, best_step: int, expected: float
) -> None:
    """A checkpoint is written before its step is evaluated, so the mark of the best tells what it cannot."""
    first = checkpoints_in(tmp_path)
    for step in (2, 4, 6):
        save(first, step=step)
    first.mark_best(TrainState(step=best_step, best_val_loss=1.5))
    first.store.wait()
    state, *_ = checkpoints_in(tmp_path).resume(str(tmp_path / "step-00000004"))
    assert (state.step, state.best_val_loss) == (4, expected)


def test_a_worse_checkpoint_is_not_marked_best_after_a_resume(tmp_path: Path) -> None:
    first = checkpoints_in(tmp_path)
    save(first, step=2)
    first.mark_best(TrainState(step=2, best_val_loss=1.5))
    first.store.wait()
    save(first, step=4, best_val_loss=1.5)
    parts = checkpoints_in(tmp_path)
    state, *_ = parts.resume("auto")
    assert state.best_val_loss == 1.5
    parts.mark_best(dataclasses.replace(state, best_val_loss=1.9))
    parts.store.wait()
    assert parts.store.best() == (2, 1.5)


def test_a_resume_restores_the_whole_state_of_the_last_checkpoint(tmp_path: Path) -> None:
    parts = checkpoints_in(tmp_path)
    saved = TrainState(
        step=2, epoch=1, sequence=3, tokens=40, skipped_steps=1, digest="d", interval_loss=2.5,
        interval_targets=9, interval_routing=[1.0], skipped_in_a_row=1, recent_losses=[2.0],
        excluded_sequences=[[0, 1, 2]], rewinds=1, stopping=True, decay_window=(3, 9), best_val_loss=1.25,
    )  # fmt: skip
    parts.save(saved)
    state, *_ = parts.resume("auto")
    # A run that was asked to stop when it was saved continues when it is resumed.
    assert state == dataclasses.replace(saved, stopping=False)
    assert isinstance(state.decay_window, tuple)


def test_resuming_an_earlier_checkpoint_abandons_the_later_ones(tmp_path: Path) -> None:
    parts = checkpoints_in(tmp_path)
    for step in (2, 4):
        save(parts, step=step)
    parts.resume(str(tmp_path / "step-00000002"))
    save(parts, step=3)
    assert [entry.step for entry in parts.store.entries()] == [2, 3]


def test_a_checkpoint_is_written_after_the_reports_before_it(tmp_path: Path) -> None:
    order: list[str] = []
    parts = checkpoints_in(tmp_path)
    parts.trackers.flush = lambda: order.append(f"reports, {len(list(tmp_path.glob('step-*')))} checkpoints")
    save(parts, step=1)
    assert order == ["reports, 0 checkpoints"]


def test_what_a_killed_process_left_is_removed_by_the_next_resume(tmp_path: Path) -> None:
    """Killed after a checkpoint was replaced and before the one it replaced was removed."""
    save(checkpoints_in(tmp_path), step=2, tokens=1)
    (tmp_path / "step-00000002").rename(tmp_path / ".step-00000002.replaced-77")
    save(checkpoints_in(tmp_path), step=2, tokens=2)
    state, *_ = checkpoints_in(tmp_path).resume("auto")
    assert state.tokens == 2
    assert [path.name for path in tmp_path.iterdir() if "step" in path.name] == ["step-00000002"]


def test_a_run_that_the_launcher_starts_again_resumes_from_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    config = tiny(corpus, tmp_path / "run", max_steps=4)
    pretrain(config, stop_after=2)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    trained: list[int] = []
    advance = TrainState.advance
    monkeypatch.setattr(
        TrainState, "advance", lambda state, *rest: (advance(state, *rest), trained.append(state.step))
    )
    assert pretrain(config).steps == 4
    assert trained == [3, 4]


def test_another_number_of_evaluation_batches_starts_the_best_loss_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses of different samples do not compare: the next evaluation is the best, however high."""
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    folder = tmp_path / "run" / "checkpoints"
    config = tiny(corpus, tmp_path / "run", max_steps=12, save_interval=4, eval_interval=4, val_fraction=0.4)
    config = dataclasses.replace(config, eval_batches=1, batch_size=2, resume="auto")
    pretrain(dataclasses.replace(config, resume=None), stop_after=6)
    (folder / "best.json").write_text('{"step": 4, "val_loss": 0.001}')
    capsys.readouterr()
    pretrain(config, stop_after=8)
    assert best_checkpoint(folder) == (4, 0.001)
    assert "best validation loss starts again" not in capsys.readouterr().out
    # The number of sequences counts, not that of the batches; at step 8 an evaluation is due.
    pretrain(dataclasses.replace(config, eval_batches=2), stop_after=9)
    assert "best validation loss starts again" in capsys.readouterr().out
    step, loss = best_checkpoint(folder) or (0, 0.0)
    assert (step, loss > 1) == (8, True)


@pytest.mark.parametrize(
    ("saved", "now", "changes"),
    [
        ({"eval_batches": None}, None, False),
        ({"eval_batches": None}, 8, True),
        # Older versions evaluated the first batches.
        ({"eval_batches": 2}, 8, True),
        ({"eval_batches": 2, "evaluated_sequences": 8}, 8, False),
        ({"eval_batches": 2, "evaluated_sequences": 8}, 16, True),
        ({"eval_batches": 2, "evaluated_sequences": 8}, None, True),
    ],
)
def test_the_evaluated_sample_is_compared_with_that_of_the_checkpoint(
    saved: dict[str, Any], now: int | None, changes: bool
) -> None:
    assert changes_evaluation(saved, {"evaluated_sequences": now}) == changes
