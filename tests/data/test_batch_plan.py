"""The arithmetic of a step's size and of the length of a run."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind.config.options import PretrainConfig
from minimind.data.batch_plan import (
    BatchPlan,
    candidate_micro_batches,
    count_steps,
    plan_batches,
    sequences_per_step,
)
from minimind.errors import ConfigError

small = st.integers(1, 12)


def test_without_a_global_size_accumulation_is_as_asked_for():
    assert plan_batches(PretrainConfig(batch_size=8), 4) == BatchPlan(8, 1, 4)
    plan = plan_batches(PretrainConfig(batch_size=8, accumulation_steps=3), 4)
    assert plan == BatchPlan(8, 3, 4)
    assert plan.global_batch_size == 96


@given(batch=small, processes=small, accumulation=small)
def test_global_size_stays_while_processes_and_micro_batches_change(batch, processes, accumulation):
    wanted = batch * processes * accumulation
    plan = plan_batches(PretrainConfig(batch_size=batch, global_batch_size=wanted), processes)
    assert plan == BatchPlan(batch, accumulation, processes)
    assert plan.global_batch_size == wanted


@given(sequences=st.integers(1, 5000))
def test_micro_batches_to_try_make_up_a_step_and_are_few(sequences):
    sizes = candidate_micro_batches(sequences)
    assert (sizes[0], sizes[-1]) == (1, sequences)
    assert all(sequences % size == 0 for size in sizes)
    assert all(large >= 2 * small for small, large in pairwise(sizes))


def test_micro_batches_of_a_power_of_two_are_the_powers_below():
    assert candidate_micro_batches(32) == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize(
    ("options", "sequences"),
    [
        ({"batch_size": 8}, 16),
        ({"batch_size": 8, "accumulation_steps": 3}, 48),
        ({"batch_size": 8, "global_batch_size": 64}, 64),
        ({"batch_size": "auto"}, 64),
        ({"batch_size": "auto", "accumulation_steps": 4}, 256),
        ({"batch_size": "auto", "global_batch_size": 96}, 96),
    ],
)
def test_auto_leaves_a_step_the_sequences_of_the_default(options, sequences):
    config = PretrainConfig(**options)
    assert sequences_per_step(config, 2) == sequences
    if options["batch_size"] != "auto":
        assert plan_batches(config, 2).global_batch_size == sequences


@given(batch=small, processes=small, wanted=st.integers(1, 300))
def test_every_value_that_a_refusal_offers_fits(batch, processes, wanted):
    config = PretrainConfig(batch_size=batch, global_batch_size=wanted)
    if wanted % (batch * processes) == 0:
        plan_batches(config, processes)
        return
    with pytest.raises(ConfigError) as caught:
        plan_batches(config, processes)
    advice = str(caught.value).split("; use ")[1]
    sizes = re.search(r"--global-batch-size ([\d or]+)", advice)
    for size in map(int, re.findall(r"\d+", sizes[1])):
        plan_batches(PretrainConfig(batch_size=batch, global_batch_size=size), processes)
    if offered := re.search(r"--batch-size (\d+)\.", advice):
        plan_batches(PretrainConfig(batch_size=int(offered[1]), global_batch_size=wanted), processes)
    else:
        assert wanted % processes
        assert f"a number of processes that divides {wanted}" in advice


def test_refusal_names_the_options_and_the_values_that_fit():
    with pytest.raises(ConfigError) as caught:
        plan_batches(PretrainConfig(batch_size=16, global_batch_size=200), 4)
    assert str(caught.value) == (
        "--global-batch-size 200 is not a multiple of 64 sequences (--batch-size 16 x 4 processes); "
        "use --global-batch-size 192 or 256, or --batch-size 10."
    )
    with pytest.raises(ConfigError, match=r"\(--batch-size 3 x 1 process\)"):
        plan_batches(PretrainConfig(batch_size=3, global_batch_size=4), 1)


def steps(*, sequences: int = 1000, tokens_per_sequence: int = 100, batch: int = 64, **limits) -> int:
    return count_steps(
        PretrainConfig(**limits),
        steps_per_epoch=-(-sequences // batch),
        tokens_per_epoch=sequences * tokens_per_sequence,
        tokens_per_step=batch * tokens_per_sequence,
    )


def test_run_ends_at_the_first_limit():
    assert steps() == 16
    assert steps(epochs=3) == 48
    assert steps(epochs=3, max_steps=40) == 40
    assert steps(epochs=3, max_steps=500) == 48
    # 64 sequences of 100 tokens a step.
    assert steps(epochs=3, max_tokens=6400) == 1
    assert steps(epochs=3, max_tokens=6401) == 2
    assert steps(epochs=3, max_tokens=64_000, max_steps=5) == 5
    assert steps(epochs=3, max_tokens=1) == 1


def test_other_limits_go_beyond_one_epoch_unless_epochs_are_given():
    assert steps(max_steps=500) == 500
    assert steps(max_tokens=350_000) == 3 * 16 + 8
    assert steps(max_tokens=350_000, max_steps=20) == 20
    assert steps(epochs=1, max_steps=500) == 16


@given(
    sequences=st.integers(1, 500),
    batch=st.integers(1, 64),
    epochs=st.integers(1, 4),
    tokens=st.integers(1, 300_000),
)
def test_steps_for_a_number_of_tokens_are_the_fewest_that_train_them(sequences, batch, epochs, tokens):
    """Against walking through the epochs step by step, the last step of an epoch being short."""
    trained = walked = 0
    for _ in range(epochs):
        for first in range(0, sequences, batch):
            if trained < tokens:
                trained += 100 * min(batch, sequences - first)
                walked += 1
    assert steps(sequences=sequences, batch=batch, epochs=epochs, max_tokens=tokens) == walked
