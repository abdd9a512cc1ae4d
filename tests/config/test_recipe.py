"""The rules of the recipe: their anchors, their limits, and in which direction they go."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind.config import recipe
from minimind.config.presets import PRESETS, preset_config
from minimind.config.recipe import LADDER

HORIZONS = st.floats(1e4, 1e13)


def test_the_anchor_is_reproduced() -> None:
    assert recipe.global_batch_tokens(61e6) == 32 * 512
    assert recipe.sequence_length(32 * 512) == 512
    for optimizer, rate in recipe.ANCHOR_RATES.items():
        assert recipe.learning_rate(optimizer, width=512, batch_tokens=32 * 512, tokens=61e6) == rate
    assert recipe.weight_decay(4e-3, 3732) == pytest.approx(0.1)
    assert recipe.weight_decay(4e-3, 2 * 3732, epochs=4) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("width", "tokens", "optimizer", "tuned"),
    [
        (128, 1.1e6, "muon", 1e-2),
        (1024, 7e9, "muon", 2e-3),
        (1792, 20e9, "muon", 1.5e-3),
        (128, 1.1e6, "adamw", 3e-3),
        (1024, 7e9, "adamw", 3e-4),
    ],
)
def test_the_rule_lies_near_rates_that_were_tuned(
    width: int, tokens: float, optimizer: str, tuned: float
) -> None:
    batch = recipe.global_batch_tokens(tokens)
    rule = recipe.learning_rate(optimizer, width=width, batch_tokens=batch, tokens=tokens)
    assert 1 / 2 < rule / tuned < 2


def test_the_batch_of_the_smallest_preset_lies_on_the_rule() -> None:
    tiny = PRESETS["tiny"]
    assert recipe.global_batch_tokens(1.1e6) in (2048, 4096)
    assert recipe.sequence_length(tiny["batch_size"] * tiny["max_seq_len"]) == tiny["max_seq_len"]


def test_only_small_batches_of_large_models_on_repeated_text_have_longer_sequences() -> None:
    def lengths(epochs: float, parameters_per_token: float) -> list[int]:
        return [
            recipe.sequence_length(batch, epochs=epochs, parameters_per_token=parameters_per_token)
            for batch in (1024, 4096, 8192, 32768)
        ]

    assert lengths(1, 2) == lengths(4, 0.5) == [128, 128, 256, 1024]
    assert lengths(4, 2) == [256, 256, 256, 1024]


@given(HORIZONS, HORIZONS)
def test_batch_and_sequence_grow_with_the_horizon(one: float, other: float) -> None:
    short, long = sorted((one, other))
    batches = [recipe.global_batch_tokens(tokens) for tokens in (short, long)]
    assert recipe.SMALLEST_BATCH <= batches[0] <= batches[1] <= recipe.LARGEST_BATCH
    lengths = [recipe.sequence_length(batch) for batch in batches]
    assert recipe.SHORTEST_SEQUENCE <= lengths[0] <= lengths[1] <= recipe.LONGEST_SEQUENCE
    assert all(batch % length == 0 for batch, length in zip(batches, lengths, strict=True))


@given(st.sampled_from(["muon", "adamw"]), HORIZONS, HORIZONS, st.integers(10, 22))
def test_the_rate_falls_with_the_horizon_and_the_width(
    optimizer: str, one: float, other: float, power: int
) -> None:
    short, long = sorted((one, other))

    def rate(width: int, tokens: float) -> float:
        return recipe.learning_rate(optimizer, width=width, batch_tokens=2.0**power, tokens=tokens)

    assert 0 < rate(512, long) <= rate(512, short) <= recipe.LARGEST_RATES[optimizer]
    assert rate(1024, short) <= rate(512, short) <= rate(64, short)


@pytest.mark.parametrize(
    ("width", "best"),
    [(256, (0.027, 0.054)), (512, (0.012, 0.024)), (768, (0.006, 0.011)), (1024, (0.0024, 0.0048))],
)
def test_the_largest_rate_of_an_embedding_lies_near_the_best_ones(
    width: int, best: tuple[float, float]
) -> None:
    # The best two that were measured (docs/experiments.md).
    low, high = best
    assert low < recipe.largest_embedding_rate(width) < 1.5 * high


@given(st.floats(1e-4, 3e-2), st.integers(1, 10**7), st.integers(1, 10**7))
def test_weight_decay_falls_with_the_steps(rate: float, one: int, other: int) -> None:
    few, many = sorted((one, other))
    assert 0.3 >= recipe.weight_decay(rate, few) >= recipe.weight_decay(rate, many) >= 0.005


def rates(epochs: float, **given: Any) -> tuple[float, float]:
    return recipe.learning_rate_and_decay(
        "normuon", width=512, batch_tokens=32 * 512, unique_tokens=61e6, epochs=epochs, **given
    )


def test_the_rates_of_a_run_follow_from_its_length() -> None:
    assert rates(1) == (4e-3, 0.1)
    lower, decay = rates(4)
    assert lower == pytest.approx(4e-3 * 4**-0.32, rel=0.02)
    # Learning rate x weight decay x steps of an epoch stay the same.
    assert lower * decay == pytest.approx(4e-4, rel=0.05)
    assert rates(8) == rates(1000) == rates(math.inf)


def test_a_run_of_few_steps_has_a_low_rate() -> None:
    def rate(steps: int) -> float:
        return rates(steps * 32 * 512 / 61e6)[0]

    assert rate(1) < rate(10) < rate(50) < rate(99)
    assert rate(20) == pytest.approx(rate(50) * 2.5**0.32 / 2.5, rel=0.05)
    assert rate(100) > rate(200) > rate(400)


def test_a_rate_that_is_given_stays_and_the_decay_follows_it() -> None:
    assert rates(1, rate=2e-3) == (2e-3, 0.2)


def test_trained_weights_have_a_lower_rate_not_a_higher_decay() -> None:
    assert rates(1, trained=True) == (1.2e-3, 0.1)
    assert rates(1, trained=True, rate=2.4e-3) == (2.4e-3, 0.05)
    # In a short run neither is higher.
    assert rates(0.05)[0] > 2 * rates(1)[0]
    assert rates(0.05)[1] == 0.3
    assert rates(0.05, trained=True) == (1.2e-3, 0.1)
    assert rates(8, trained=True)[0] == pytest.approx(0.3 * rates(8)[0])


def test_the_ladder_has_valid_shapes_of_growing_size() -> None:
    blocks = [shape.block_parameters for shape in LADDER]
    assert blocks == sorted(blocks)
    for shape in LADDER:
        config = preset_config("tiny", **shape.options())  # raises for heads that do not fit
        assert config.hidden_size // config.num_attention_heads in (32, 64, 128)


@given(HORIZONS, HORIZONS, st.floats(1e4, 1e12))
def test_repeated_tokens_are_worth_less_than_new_ones_and_never_harm(
    one: float, other: float, unique: float
) -> None:
    few, many = sorted((one, other))
    worth = [recipe.effective_tokens(tokens, unique) for tokens in (few, many)]
    assert worth[0] <= worth[1] <= many * (1 + 1e-9)
    assert worth[1] <= unique * (1 + recipe.REPETITION_SCALE) * (1 + 1e-9)
    if many <= unique:
        assert worth[1] == many


@pytest.mark.parametrize(
    ("parameters", "tokens", "epochs"),
    [
        (1e6, 1e6, 8),
        (1e3, 1e9, 8),
        (1.4e6, 1e6, 7),
        (2.7e6, 1e6, 5),
        (4.9e6, 1e6, 4),
        (16e6, 1e6, 2),
        (1e12, 1e6, 1),
    ],
)
def test_a_model_that_is_large_for_its_text_sees_it_less_often(
    parameters: float, tokens: float, epochs: int
) -> None:
    assert recipe.most_epochs(parameters, tokens) == epochs


def test_four_epochs_are_worth_nearly_three_of_new_tokens() -> None:
    assert recipe.effective_tokens(4e6, 1e6) == pytest.approx(2.9e6, rel=0.01)


def test_the_batch_of_several_epochs_is_smaller() -> None:
    # 4096 tokens were best of 4096 and 8192 for eight epochs of 0.58M tokens.
    assert recipe.global_batch_tokens(4.6e6, 0.58e6) == 4096
    assert recipe.global_batch_tokens(4.6e6) == recipe.global_batch_tokens(4.6e6, 1e9) > 4096
    assert recipe.useful_tokens(4.6e6, 8192, 0.58e6) < recipe.useful_tokens(4.6e6, 8192)


@given(st.floats(1e3, 1e10), st.floats(1e3, 1e10), st.floats(1e4, 1e12))
def test_parameters_beyond_the_tokens_count_less_and_never_harm(
    one: float, other: float, unique: float
) -> None:
    few, many = sorted((one, other))
    worth = [recipe.effective_parameters(n, unique) for n in (few, many)]
    assert worth[0] <= worth[1] <= many * (1 + 1e-9)
    if many <= unique:
        assert worth[1] == many
    assert worth[1] <= max(unique * (1 + recipe.EXCESS_SCALE) * (1 + 1e-9), 0)
