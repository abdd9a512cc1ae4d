"""The scaling law of the package, and forecasts from it."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind.evaluation.scaling_law import LAW, Forecast, ScalingLaw, packaged_law, unigram_bits

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


def test_a_forecast_before_the_start_scales_with_the_difficulty_of_the_text() -> None:
    law = ScalingLaw(
        0.5, (6.0, 0.25), (20.0, 0.2), 0.03, (0.1, 0.3), 0.02, ((0.0, 0.0, 0.1), (1.0, 0.0, 0.01))
    )
    easy, hard = (law.before_start(1e6, 1e7, 6400, bits) for bits in (2.0, 4.0))
    assert hard.bits_per_byte / easy.bits_per_byte == pytest.approx(1.3 / 0.7)
    assert easy.low < easy.bits_per_byte < easy.high
    assert math.log(easy.high / easy.low) == pytest.approx(2 * 1.645 * 0.02)
    unknown = law.before_start(1e6, 1e7, 6400, None)
    assert math.log(unknown.high / unknown.low) == pytest.approx(2 * 1.645 * 0.04)


def test_a_forecast_on_the_way_is_exact_for_a_run_that_follows_the_law() -> None:
    law = ScalingLaw(
        0.5,
        (6.0, 0.25),
        (20.0, 0.2),
        0.03,
        (1.0, 0.0),
        0.02,
        ((0.0, 0.1, 0.2), (0.5, 0.02, 0.05), (1.0, 0.0, 0.01)),
    )
    difficulty = 1.37
    final = difficulty * law.relative(1e6, 1e7)
    intervals = []
    for share, above in ((0.25, 0.06), (0.5, 0.02), (0.75, 0.01)):
        observed = difficulty * law.relative(1e6, share * 1e7) * math.exp(above)
        found = law.during(1e6, observed=observed, bytes_done=share * 1e7, num_bytes=1e7, share=share)
        assert found.bits_per_byte == pytest.approx(final)
        intervals.append(found.high - found.low)
    assert intervals == sorted(intervals, reverse=True)


def test_a_forecast_is_written_with_its_interval() -> None:
    assert Forecast(1.2345, 1.1, 1.39).text == "1.234 (1.10 to 1.39)"


def test_the_unigram_bits_of_a_text() -> None:
    # Four equally frequent tokens of two bytes: two bits for two bytes.
    assert unigram_bits([[0, 1], [2, 3]], 8) == pytest.approx(1.0)
    assert unigram_bits([[5, 5, 5]], 9) == 0
