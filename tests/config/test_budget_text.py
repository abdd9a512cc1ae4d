"""Budgets as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind.config.budget import Budget, parse_budget


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("30m", Budget(seconds=1800)),
        ("2h", Budget(seconds=7200)),
        ("1h30m", Budget(seconds=5400)),
        (" 1.5 hours ", Budget(seconds=5400)),
        ("1d 2h 3m 4s", Budget(seconds=86400 + 7200 + 180 + 4)),
        ("45 seconds", Budget(seconds=45)),
        ("500M tokens", Budget(tokens=5e8)),
        ("1.5B tokens", Budget(tokens=1.5e9)),
        ("2e9 tokens", Budget(tokens=2e9)),
        ("1 token", Budget(tokens=1)),
        ("$3 at $2.50/h", Budget(seconds=4320)),
        ("3 at 2.5/h", Budget(seconds=4320)),
        ("3 EUR at 2.5 EUR per hour", Budget(seconds=4320)),
        ("€10 @ €20/hour", Budget(seconds=1800)),
        ("12e18 FLOPs", Budget(flops=12e18)),
        ("12e18flop", Budget(flops=12e18)),
        ("3T FLOPs", Budget(flops=3e12)),
    ],
)
def test_a_budget_is_read(text: str, budget: Budget) -> None:
    parsed = parse_budget(text)
    for name, value in vars(budget).items():
        assert getattr(parsed, name) == (None if value is None else pytest.approx(value))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "30",
        "m",
        "30 parsecs",
        "tokens",
        "5 tokens 3m",
        "-3m",
        "$3",
        "$3 at $2",
        "3h tokens",
        "30m,",
        "nan h",
    ],
)
def test_anything_else_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ValueError, match="is not a budget such as 30m, 2h, 500M tokens"):
        parse_budget(text)


@pytest.mark.parametrize("text", ["0s", "0 tokens", "$0 at $2/h", "$1 at $0/h", "1e999 tokens"])
def test_a_budget_of_nothing_or_without_end_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a budget of nothing"):
        parse_budget(text)


@given(st.integers(0, 9), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_the_parts_of_a_time_add_up(days: int, hours: int, minutes: int, seconds: int) -> None:
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    text = f"{days}d{hours}h{minutes}m{seconds}s"
    if total:
        assert parse_budget(text).seconds == total
    else:
        with pytest.raises(ValueError, match="nothing"):
            parse_budget(text)


@given(st.floats(1e-3, 1e6), st.floats(1e-3, 1e6))
def test_money_is_time_at_its_price(money: float, price: float) -> None:
    seconds = parse_budget(f"${money:f} at ${price:f}/h").seconds
    assert seconds == pytest.approx(float(f"{money:f}") / float(f"{price:f}") * 3600)


@given(st.text(max_size=30))
def test_no_text_raises_anything_but_a_value_error(text: str) -> None:
    try:
        budget = parse_budget(text)
    except ValueError:
        return
    assert sum(value is not None for value in vars(budget).values()) == 1
