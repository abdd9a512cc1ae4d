"""The rules of the recipe: their anchors, their limits, and in which direction they go."""

from __future__ import annotations

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
    ("preset", "tokens", "optimizer"),
    [
        ("tiny", 1.1e6, "muon"),
        ("350m", 7e9, "muon"),
        ("1b", 20e9, "muon"),
        ("tiny", 1.1e6, "adamw"),
        ("350m", 7e9, "adamw"),
    ],
)
def test_the_rates_of_the_presets_lie_near_the_rule(preset: str, tokens: float, optimizer: str) -> None:
    config = preset_config(preset, optimizer=optimizer)
    rule = recipe.learning_rate(
        optimizer,
        width=config.hidden_size,
        batch_tokens=recipe.global_batch_tokens(tokens),
        tokens=tokens,
    )
    assert config.learning_rate is not None
    assert 1 / 2 < rule / config.learning_rate < 2


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


@given(st.floats(1e-4, 3e-2), st.integers(1, 10**7), st.integers(1, 10**7))
def test_weight_decay_falls_with_the_steps(rate: float, one: int, other: int) -> None:
    few, many = sorted((one, other))
    assert 0.3 >= recipe.weight_decay(rate, few) >= recipe.weight_decay(rate, many) >= 0.005


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
