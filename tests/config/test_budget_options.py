"""Which options a budget keeps, and what contradicts it."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest

from minimind.config.budget import BUDGET_OPTIONS
from minimind.config.command_line import to_argv
from minimind.config.options import CONFIG_SECTIONS, PretrainConfig
from minimind.config.presets import PRESETS, resolve
from minimind.config.schema import read_toml, write_toml
from minimind.errors import ConfigError


def keeps(**options: Any) -> tuple[str, ...]:
    return PretrainConfig(budget="30m", **options).budget_keeps


def test_what_is_given_is_kept_even_if_it_is_the_default() -> None:
    assert keeps() == ()
    assert keeps(hidden_size=512) == ("hidden_size",)
    assert keeps(epochs=2, output_dir="x") == ("epochs",)
    assert keeps(budget_keeps=("--max-seq-len",)) == ("max_seq_len",)


def test_without_a_budget_nothing_is_chosen() -> None:
    assert PretrainConfig(hidden_size=256).budget_chooses == ()
    assert PretrainConfig().budget_keeps == ()
    assert PretrainConfig(budget="1h").budget_chooses == BUDGET_OPTIONS


def test_what_is_kept_survives_copies() -> None:
    config = PretrainConfig(budget="30m", hidden_size=512)
    for same in (
        dataclasses.replace(config),
        dataclasses.replace(config, output_dir="elsewhere"),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ):
        assert same.budget_keeps == ("hidden_size",)
    assert dataclasses.replace(config, epochs=3).budget_keeps == ("hidden_size", "epochs")
    assert dataclasses.replace(PretrainConfig(epochs=3), budget="1h").budget_keeps == ("epochs",)


def test_a_file_and_flags_are_kept_and_of_a_preset_the_model() -> None:
    config = resolve(
        preset="350m", file={"budget": "1h", "weight_decay": 0.1}, flags={"seed": "3", "epochs": "2"}
    )
    assert set(config.budget_keeps) == {
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("intermediate_size", "weight_decay", "epochs"),
    }
    assert config.hidden_size == PRESETS["350m"]["hidden_size"]
    assert config.max_seq_len == PretrainConfig.max_seq_len


def test_a_printed_configuration_keeps_no_more_than_was_given(tmp_path: Path) -> None:
    config = resolve(flags={"budget": "1h", "max_seq_len": "512"})
    file = tmp_path / "config.toml"
    file.write_text(write_toml(config, CONFIG_SECTIONS))
    again = resolve(file=read_toml(file))
    assert again == config
    assert again.budget_keeps == ("max_seq_len",)
    assert set(resolve(file=read_toml(file), flags={"epochs": "1"}).budget_keeps) == {"max_seq_len", "epochs"}


def test_the_command_that_repeats_a_choice_spells_all_of_it() -> None:
    chosen = PretrainConfig(budget="1h", hidden_size=512, epochs=3, budget_keeps=BUDGET_OPTIONS)
    args = to_argv(chosen)
    assert "--budget-keeps" not in args
    flags = {name: args[args.index("--" + name.replace("_", "-")) + 1] for name in ("hidden_size", "epochs")}
    assert flags == {"hidden_size": "512", "epochs": "3"}
    assert "--no-compile" in args or "--compile" in args


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"budget": "soon"}, "is not a budget such as"),
        ({"budget": "1h", "max_steps": 3}, "budget and max_steps both set the length"),
        ({"budget": "1h", "max_tokens": 3}, "budget and max_tokens both set the length"),
        ({"budget_keeps": ("epochs",)}, "budget_keeps needs budget"),
        (
            {"budget": "1h", "budget_keeps": ("epoch",)},
            "budget_keeps epoch is not an option; did you mean 'epochs'",
        ),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        PretrainConfig(**options)


def test_epochs_and_a_time_limit_of_an_attempt_go_with_a_budget() -> None:
    config = PretrainConfig(budget="10h", epochs=4, max_time="1h")
    assert config.budget_keeps == ("epochs",)
