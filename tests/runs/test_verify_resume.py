"""The check that a resumed run equals one that never stopped, and that it would find it if it did not."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind.config.options import PretrainConfig
from minimind.errors import ConfigError
from minimind.runs.verify_resume import ComparedStep, ResumeCheck, verify_resume
from support.tiny_runs import tiny, write_corpus


@pytest.fixture
def config(tmp_path: Path) -> PretrainConfig:
    return tiny(write_corpus(tmp_path / "corpus.jsonl"), tmp_path / "run")


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any, dict[str, Any]], None]) -> None:
    """Let every resume get something wrong: `change` gets the model and what the checkpoint tells."""
    module = sys.modules["minimind.checkpoint.checkpointer"]
    work = module.load_state_dict

    def restore(accelerator: Any, model: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        trainer = work(accelerator, model, *arguments, **options)
        change(model, trainer)
        return trainer

    monkeypatch.setattr(module, "load_state_dict", restore)


def test_an_exact_resume_is_equal_to_the_last_bit(
    config: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes: list[str] = []
    check = verify_resume(config, 5, note=notes.append)
    assert check.first_difference is None
    assert (check.tolerance, check.largest_difference, check.stopped_after) == (0.0, 0.0, 2)
    assert [one.step for one in check.compared if one.what == "loss"] == [1, 2, 3, 4, 5]
    assert [one.step for one in check.compared if one.what == "val_loss"] == [0, 2, 4, 5]
    assert len(notes) == 3
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_a_lost_moment_shows_in_the_first_step_that_it_matters_to(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nudge(model: torch.nn.Module, trainer: dict[str, Any]) -> None:
        with torch.no_grad():
            next(model.parameters()).add_(1e-3)

    spoil(monkeypatch, nudge)
    parting = verify_resume(config, 4).first_difference
    assert parting is not None
    assert (parting.step, parting.what, parting.same_data) == (3, "loss", True)
    assert parting.difference > 0


def test_a_lost_place_in_the_data_shows_as_other_sequences(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda model, trainer: trainer["state"].update(row=0))
    parting = verify_resume(config, 4).first_difference
    assert parting is not None
    assert (parting.step, parting.same_data) == (3, False)


@pytest.mark.alone
@pytest.mark.slow
def test_two_processes_go_on_with_the_same_data(config: PretrainConfig) -> None:
    from dataclasses import replace

    check = verify_resume(replace(config, dropout=0.0), 4, processes=2)
    assert check.first_difference is None
    assert check.tolerance == 1e-5


def test_what_cannot_be_compared_is_refused_at_once(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError) as caught:
        verify_resume(config, 1, processes=2)
    assert len(caught.value.problems) == 2
    assert "--steps 1" in caught.value.problems[0]
    assert "--dropout 0," in caught.value.problems[1]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without a launcher"):
        verify_resume(config, 4)


@pytest.mark.parametrize(
    ("resumed", "same_data", "differs"),
    [
        (2.0, True, False),
        (2.0 * (1 + 1e-6), True, False),
        (2.0 * (1 + 1e-4), True, True),
        (2.0, False, True),
        (math.nan, True, True),
    ],
)
def test_a_difference_is_other_rows_or_a_loss_beyond_rounding(
    resumed: float, same_data: bool, differs: bool
) -> None:
    step = ComparedStep(3, "loss", 2.0, resumed, same_data)
    check = ResumeCheck((step,), stopped_after=1, processes=2, tolerance=1e-5)
    assert check.first_difference == (step if differs else None)
