"""Presets and the order in which preset, file and flags override each other."""

from __future__ import annotations

import math

import pytest

from minimind.config.naming import options_were_typed
from minimind.config.options import PretrainConfig
from minimind.config.presets import (
    PRESET_PARAMETERS,
    PRESETS,
    SHAPE_OPTIONS,
    default_preset,
    preset_config,
    resolve,
    size_text,
)
from minimind.config.schema import schema_of
from minimind.errors import ConfigError


def parameters(config: PretrainConfig, vocabulary: int = 6400) -> int:
    """Count the parameters layer by layer, the tied embedding once."""
    c, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    d = config.head_dim or c // heads
    f = config.intermediate_size or math.ceil(c * 8 / 3 / 64) * 64
    attention = c * heads * d + 2 * c * kv_heads * d + heads * d * c + 2 * d
    feed_forward = 3 * c * f
    if config.use_moe:
        feed_forward = config.num_experts * (3 * c * (config.moe_intermediate_size or f) + c)
    block = attention + feed_forward + 2 * c
    return vocabulary * c + config.num_hidden_layers * block + c


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_size_it_states(name: str) -> None:
    assert parameters(preset_config(name)) == pytest.approx(PRESET_PARAMETERS[name], rel=0.03)


def test_every_preset_states_its_size() -> None:
    assert list(PRESETS) == list(PRESET_PARAMETERS)
    assert [size_text(name) for name in PRESETS] == ["1.6M", "26M", "64M", "198M", "104M", "350M", "1B"]


def test_shape_options_are_options() -> None:
    assert schema_of(PretrainConfig).keys() >= SHAPE_OPTIONS


@pytest.mark.parametrize(
    ("shape_given", "has_gpu", "preset"),
    [(False, False, "tiny"), (True, False, None), (False, True, None), (True, True, None)],
)
def test_only_a_bare_run_without_a_gpu_is_tiny(shape_given: bool, has_gpu: bool, preset: str | None) -> None:
    assert default_preset(shape_given, has_gpu) == preset


def test_flags_override_the_file_and_the_file_the_preset() -> None:
    config = resolve(
        preset="tiny",
        file={"batch_size": 4, "log_interval": 7, "epochs": 3},
        flags={"log_interval": "9"},
    )
    assert (config.hidden_size, config.batch_size, config.log_interval, config.epochs) == (128, 4, 9, 3)


def test_a_file_may_name_a_preset_which_a_flag_overrides() -> None:
    assert resolve(file={"preset": "tiny"}).hidden_size == 128
    assert resolve(preset="minimind-3", file={"preset": "tiny"}).hidden_size == 768


def test_a_flag_for_the_size_of_a_step_replaces_the_other_one_of_the_file() -> None:
    config = resolve(file={"global_batch_size": 64}, flags={"accumulation_steps": "2"})
    assert (config.global_batch_size, config.accumulation_steps) == (None, 2)
    config = resolve(file={"accumulation_steps": 2}, flags={"global_batch_size": "64"})
    assert (config.global_batch_size, config.accumulation_steps) == (64, None)


@pytest.mark.parametrize("name", PRESETS)
def test_learning_rate_and_weight_decay_follow_from_the_run_not_from_the_preset(name: str) -> None:
    config = preset_config(name)
    assert (config.learning_rate, config.weight_decay) == (None, None)


def test_auto_in_place_of_a_batch_size_keeps_the_sequences_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert preset_config("tiny").batch_size == 16
    config = preset_config("tiny", batch_size="auto")
    assert (config.batch_size, config.global_batch_size) == ("auto", 16)
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = resolve(preset="tiny", file={"accumulation_steps": 3}, flags={"batch_size": "auto"})
    assert (config.batch_size, config.global_batch_size, config.accumulation_steps) == ("auto", 192, None)
    config = resolve(file={"batch_size": 8}, flags={"batch_size": "auto", "global_batch_size": "64"})
    assert (config.batch_size, config.global_batch_size) == ("auto", 64)
    config = resolve(preset="minimind-3", flags={"batch_size": "auto"})
    assert (config.batch_size, config.global_batch_size) == ("auto", None)


def test_a_flag_can_unset_what_the_file_set() -> None:
    assert resolve(file={"max_steps": 5}, flags={"max_steps": None}).max_steps is None


def test_problems_of_all_layers_are_reported_together() -> None:
    with options_were_typed(), pytest.raises(ConfigError) as caught:
        resolve(
            preset="big",
            file={"bach_size": 3, "epochs": 0},
            file_name="run.toml",
            flags={"learning_rate": "fast", "val_data": ["v.txt"]},
        )
    assert caught.value.problems == [
        f"--preset big is not known; choose one of {', '.join(PRESETS)}.",
        "run.toml: unknown key 'bach_size'; did you mean 'batch_size'?",
        "run.toml: --epochs 0 is out of range; it must be at least 1.",
        "--learning-rate fast is not a number; write for example 0.001.",
        "--val-data needs --data; give the training data too.",
    ]


def test_a_default_standing_in_for_a_refused_value_is_not_blamed() -> None:
    with options_were_typed(), pytest.raises(ConfigError) as caught:
        resolve(flags={"hidden_size": "100", "num_attention_heads": "ten"})
    assert caught.value.problems == ["--num-attention-heads ten is not a whole number; write for example 8."]


def test_an_unknown_keyword_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown key 'epoch'; did you mean 'epochs'"):
        preset_config("tiny", epoch=3)


@pytest.mark.parametrize("wrong", [3, ["tiny"]])
def test_a_preset_of_the_wrong_type_is_refused(wrong: object) -> None:
    with pytest.raises(ConfigError, match="choose one of tiny"):
        resolve(file={"preset": wrong})
