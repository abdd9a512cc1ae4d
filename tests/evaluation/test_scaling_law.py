"""The scaling law of the package, and forecasts from it."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind.evaluation.scaling_law import LAW, Difficulty, Forecast, ScalingLaw, bigram_bits, packaged_law

SIZES = st.floats(1e5, 1e10)


def test_the_package_states_where_its_law_comes_from() -> None:
    values = json.loads(LAW.read_text())
    assert values["fit"]["points"] >= 10
    assert values["provenance"]["devices"]
    assert 0 < values["sigma"] < 0.2
    shares = [share for share, _, _ in values["curve"]]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)


@given(SIZES, SIZES, SIZES)
def test_more_parameters_and_more_text_never_cost_bits(one: float, other: float, fixed: float) -> None:
    law = packaged_law()
    few, many = sorted((one, other))
    assert law.relative(few, fixed) >= law.relative(many, fixed) > 0
    assert law.relative(fixed, few) >= law.relative(fixed, many) > 0


LAW_OF_TESTS = ScalingLaw(
    beginning=1.3,
    floor=0.1,
    size=(6.0, 0.25),
    text=(20.0, 0.2),
    vocabulary=0.03,
    sigma=0.02,
    gain_slope=0.08,
    curve=((0.0, 1.0, 0.2), (0.5, 0.8, 0.05), (1.0, 0.0, 0.01)),
)


def test_a_forecast_before_the_start_scales_with_the_difficulty_of_the_text() -> None:
    easy, hard = (LAW_OF_TESTS.before_start(1e6, 1e7, 6400, Difficulty(bits, 0.07)) for bits in (2.0, 3.0))
    assert hard.bits_per_byte / easy.bits_per_byte == pytest.approx(1.5)
    assert easy.low < easy.bits_per_byte < easy.high
    assert math.log(easy.high / easy.low) == pytest.approx(2 * 1.645 * 0.02)
    unknown = LAW_OF_TESTS.before_start(1e6, 1e7, 6400, None)
    assert math.log(unknown.high / unknown.low) == pytest.approx(2 * 1.645 * 0.1)


def test_few_validation_documents_make_the_interval_wide() -> None:
    few, many = (LAW_OF_TESTS.before_start(1e6, 1e7, 6400, Difficulty(2.0, 0.07, n)) for n in (4.0, 4e6))
    assert few.bits_per_byte == many.bits_per_byte
    assert math.log(many.high / many.low) == pytest.approx(2 * 1.645 * 0.02, rel=0.01)
    assert math.log(few.high / few.low) == pytest.approx(2 * 1.645 * math.hypot(0.02, 0.155 / 2))


def test_models_learn_faster_where_a_bigram_model_does() -> None:
    fast, slow = Difficulty(2.0, 0.1), Difficulty(2.0, 0.04)
    assert fast.at(1e6) == slow.at(1e6) == 2.0
    assert slow.at(2e6) / fast.at(2e6) == pytest.approx(2**0.06)
    # No further than near what a bigram model counts, and not for slopes that were not measured.
    assert fast.at(1e7) == fast.at(1e10)
    assert Difficulty(2.0, 5.0).at(1e7) > 0.8 * fast.at(1e7)
    assert Difficulty(2.0, -5.0).at(0) > 0


def test_the_smallest_run_ends_near_a_model_that_knows_no_order() -> None:
    assert LAW_OF_TESTS.relative(1, 1) == pytest.approx(1.3, rel=0.1)
    assert LAW_OF_TESTS.relative(1e13, 1e16) == pytest.approx(1 / (1 / 1.3 + 1 / 0.1), rel=0.3)


def test_a_forecast_on_the_way_subtracts_what_the_rest_of_the_run_gains() -> None:
    gain = 1 - 0.08 * math.log(10)
    assert LAW_OF_TESTS.gain(1e6, 1e7) == pytest.approx(gain)
    intervals = []
    for share, d in ((0.25, 0.9), (0.5, 0.8), (0.75, 0.4)):
        found = LAW_OF_TESTS.during(1e6, observed=2.5, num_bytes=1e7, share=share)
        assert found.bits_per_byte == pytest.approx(2.5 - d * gain)
        intervals.append(found.high - found.low)
    assert intervals == sorted(intervals, reverse=True)
    assert LAW_OF_TESTS.during(1e6, observed=2.5, num_bytes=1e7, share=1.0).bits_per_byte == 2.5
    # Beyond what was measured a forecast stays positive, and below the evaluation.
    easy = LAW_OF_TESTS.during(1e6, observed=0.05, num_bytes=1e7, share=0.5)
    assert 0 == easy.low < easy.bits_per_byte < 0.05
    assert LAW_OF_TESTS.during(1e6, observed=2.5, num_bytes=1e15, share=0.5).bits_per_byte < 2.5


@pytest.mark.parametrize(
    ("parameters", "num_bytes", "observed", "final"),
    [
        pytest.param(197_440, 1.72e6, 2.898, 2.618, id="documentation"),
        pytest.param(197_440, 2.08e6, 2.838, 2.549, id="documentation, 7.4 epochs"),
        pytest.param(787_840, 1.66e6, 2.295, 2.013, id="English prose, 1.8 epochs"),
        pytest.param(197_440, 2.06e6, 3.063, 2.835, id="Chinese prose, 3 epochs"),
        pytest.param(787_840, 5.82e6, 1.864, 1.668, id="Python's text, 3.7 epochs"),
        pytest.param(59e6, 341e6, 1.013, 0.7705, id="64M parameters, 2.3 epochs"),
        pytest.param(59e6, 561e6, 0.928, 0.6398, id="64M parameters, 5.8 epochs"),
        pytest.param(352e6, 34.1e6, 1.494, 1.1922, id="350M parameters"),
    ],
)
def test_the_forecast_at_half_time_holds_for_measured_runs(
    parameters: float, num_bytes: float, observed: float, final: float
) -> None:
    found = packaged_law().during(parameters, observed=observed, num_bytes=num_bytes, share=0.5)
    assert found.bits_per_byte == pytest.approx(final, abs=0.07)
    # 90% of the errors are smaller.
    assert found.high - found.bits_per_byte == pytest.approx(0.06, abs=0.02)


def test_a_forecast_is_written_with_its_interval() -> None:
    assert Forecast(1.2345, 1.1, 1.39).text == "1.234 (1.10 to 1.39)"


def test_the_bits_of_a_bigram_model() -> None:
    # After one token of two bytes always the same one follows: the better known, the fewer bits.
    once, often = (bigram_bits([[0, 1] * times], [[0, 1, 0, 1]], 8) for times in (2, 200))
    assert 0 < often < once < 1
    # Order counts, and what was not seen costs many bits.
    assert bigram_bits([[0, 1] * 200], [[1, 1, 0, 0]], 8) > 3 * often
    assert bigram_bits([[0, 1] * 200], [[7, 8, 9]], 6) > 3
    # All that follows a token adds up to probability one.
    training = [[0, 1, 2, 1, 0], [2, 2, 1]]
    after_one = (
        bigram_bits(training, [[1, token]], 1) - bigram_bits(training, [[1]], 1) for token in range(6400)
    )
    assert sum(2**-bits for bits in after_one) == pytest.approx(1.0)
