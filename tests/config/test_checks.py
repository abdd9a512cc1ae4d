"""Options that a run cannot follow, and what it does instead."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from minimind.config.checks import run_notes
from minimind.config.naming import options_were_typed
from minimind.config.options import PretrainConfig
from minimind.config.presets import resolve
from support.tiny_runs import pretrain_as_command as pretrain
from support.tiny_runs import tiny, write_corpus


def notes(total_steps: int, steps_per_epoch: int = 100, warmup_steps: int = 0, **options: Any) -> list[str]:
    with options_were_typed():
        return run_notes(PretrainConfig(**options), total_steps, steps_per_epoch, warmup_steps)


def test_limits_that_are_given_take_the_place_of_one_epoch() -> None:
    assert PretrainConfig().max_epochs == 1
    assert PretrainConfig(max_steps=2000).max_epochs == math.inf
    assert PretrainConfig(max_tokens=2000).max_epochs == math.inf
    assert PretrainConfig(max_steps=2000, epochs=3).max_epochs == 3


def test_the_epochs_of_a_preset_are_a_default() -> None:
    assert resolve(preset="tiny").epochs == 2
    assert resolve(preset="tiny", flags={"max_steps": "9"}).epochs is None
    assert resolve(preset="tiny", file={"max_tokens": 9}).epochs is None
    assert resolve(preset="tiny", file={"epochs": 3}, flags={"max_steps": "9"}).epochs == 3
    assert resolve(preset="tiny", flags={"max_steps": "9", "epochs": "2"}).epochs == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"total_steps": 2000, "steps_per_epoch": 6, "max_steps": 2000},
            "--max-steps 2000 takes 333 epochs of 6 steps each; --epochs limits them.",
        ),
        (
            {"total_steps": 12, "steps_per_epoch": 6, "max_steps": 2000, "epochs": 2},
            "--epochs 2 ends the run after 12 steps, before --max-steps 2000; raise it or remove it to train "
            "longer.",
        ),
        (
            {"total_steps": 9, "steps_per_epoch": 6, "max_steps": 9, "epochs": 2},
            "--max-steps 9 ends the run after 9 of the 12 steps of --epochs 2.",
        ),
        (
            {"total_steps": 9, "steps_per_epoch": 6, "max_steps": 9, "max_tokens": 10**9, "epochs": 2},
            "--max-steps 9 ends the run after 9 of the 12 steps of --epochs 2.",
        ),
        (
            {"total_steps": 5, "steps_per_epoch": 6, "max_steps": 9, "max_tokens": 100},
            "--max-tokens 100 ends the run after 5 steps, before --max-steps 9.",
        ),
        (
            {"total_steps": 12, "steps_per_epoch": 6, "max_tokens": 10**9, "epochs": 2},
            "--epochs 2 ends the run after 12 steps, before --max-tokens 1000000000; raise it or remove "
            "it to "
            "train longer.",
        ),
        (
            {"total_steps": 50, "warmup_steps": 200},
            "--warmup-steps 200 is longer than the run: in 50 steps the learning rate only reaches "
            "25.0% of its "
            "peak.",
        ),
        (
            {"total_steps": 50, "warmup_steps": 50},
            "--warmup-steps 50 takes all 50 steps: the learning rate reaches its peak and never decays.",
        ),
        (
            {"total_steps": 50, "warmup_steps": 20, "lr_schedule": "wsd", "decay_steps": 40},
            "--decay-steps 40 means 40 steps of decay, but only 30 follow the warm-up: the learning "
            "rate decays "
            "over 30.",
        ),
        (
            {"total_steps": 50, "warmup_steps": 20, "lr_schedule": "wsd", "decay_ratio": 0.8},
            "--decay-ratio 0.8 means 40 steps of decay, but only 30 follow the warm-up: the learning "
            "rate decays "
            "over 30.",
        ),
        (
            {"total_steps": 50, "save_interval": 51},
            "--save-interval 51 is beyond the run of 50 steps: the only checkpoint is that of the last step.",
        ),
        (
            {"total_steps": 50, "eval_interval": 51},
            "--eval-interval 51 is beyond the run of 50 steps: the only evaluations are those before "
            "the first "
            "and after the last step.",
        ),
        (
            {"total_steps": 50, "keep_every": 51},
            "--keep-every 51 is beyond the run of 50 steps: no checkpoint is kept for good.",
        ),
        (
            {"total_steps": 50, "sample_interval": 51},
            "--sample-interval 51 is beyond the run of 50 steps: no sample is generated.",
        ),
        (
            {"total_steps": 9, "profile": True},
            "--profile records steps 10 to 14, and the run has 9: nothing is recorded.",
        ),
        (
            {"total_steps": 50, "decay_steps": 10},
            "--decay-steps 10 has no effect: needs --lr-schedule wsd.",
        ),
        (
            {"total_steps": 50, "val_fraction": 0.0, "eval_interval": 5},
            "--eval-interval 5 has no effect: there is no validation data; set --val-fraction or --val-data.",
        ),
        (
            {"total_steps": 50, "data": ("a",), "val_data": ("b",), "val_fraction": 0.5},
            "--val-fraction 0.5 has no effect: --val-data is the validation data.",
        ),
        (
            {"total_steps": 50, "lr_schedule": "constant", "min_lr_ratio": 0.5},
            "--min-lr-ratio 0.5 has no effect: --lr-schedule constant does not decay.",
        ),
        (
            {"total_steps": 50, "sample_prompt": ("Once",)},
            "--sample-prompt Once has no effect: needs --sample-interval.",
        ),
    ],
)
def test_what_happens_instead_is_said(arguments: dict[str, Any], sentence: str) -> None:
    assert notes(**arguments) == [sentence]


@pytest.mark.parametrize(
    "arguments",
    [
        {"total_steps": 100},
        {"total_steps": 50, "max_steps": 50},
        {"total_steps": 100, "max_steps": 100, "epochs": 1},
        {"total_steps": 50, "warmup_steps": 49},
        {"total_steps": 50, "warmup_steps": 50, "lr_schedule": "constant"},
        {"total_steps": 50, "warmup_steps": 10, "lr_schedule": "wsd", "decay_steps": 40},
        {"total_steps": 50, "save_interval": 50, "eval_interval": 50, "keep_every": 50},
        {"total_steps": 50, "save_interval": 90, "keep_every": 10},
        {"total_steps": 1},
    ],
)
def test_a_run_that_follows_its_options_has_no_notes(arguments: dict[str, Any]) -> None:
    assert notes(**arguments) == []


def test_notes_name_fields_in_python() -> None:
    assert run_notes(PretrainConfig(save_interval=9), 5, 5, 0) == [
        "save_interval 9 is beyond the run of 5 steps: the only checkpoint is that of the last step."
    ]


def test_a_run_trains_beyond_one_epoch_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    steps_of_an_epoch = pretrain(tiny(corpus, tmp_path / "a", epochs=1)).steps
    steps = steps_of_an_epoch + 1
    assert pretrain(tiny(corpus, tmp_path / "b", epochs=None, max_steps=steps)).steps == steps
    printed = capsys.readouterr()
    assert f"max_steps {steps} takes " in printed.out + printed.err
