"""A time budget: its clock, and how the end of the run follows it."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from minimind.config.options import PretrainConfig
from minimind.schedule import LearningRateSchedule, resume_schedule
from minimind.training.time_limits import BudgetClock, budget_clock, fitted_window


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def left(clock: BudgetClock, per_step: float = 1.0, evaluation: float = 0.0, saving: float = 0.0) -> int:
    return clock.steps_left(per_step, (evaluation, 10), (saving, 20))


def test_the_clock_goes_on_from_the_time_of_earlier_attempts() -> None:
    clock = Clock()
    budget = BudgetClock(100.0, parameters=0, spent=30.0, clock=clock)
    clock.now += 25
    assert budget.spent() == 55.0
    assert left(budget) == int(100 - 55 - budget.end_seconds)


def test_steps_pay_for_evaluations_checkpoints_and_the_final_model() -> None:
    clock = Clock()
    budget = BudgetClock(100.0, parameters=10**9, clock=clock)
    assert budget.end_seconds == pytest.approx(1 + 14)
    assert left(budget) == 85
    assert left(budget, evaluation=5.0, saving=4.0) == int((85 - 9) / (1 + 0.5 + 0.2))
    clock.now += 200
    assert left(budget) == 0


def test_only_a_budget_of_time_has_a_clock() -> None:
    assert budget_clock(PretrainConfig(), 1, 0.0) is None
    assert budget_clock(PretrainConfig(budget="5M tokens"), 1, 0.0) is None
    clock = budget_clock(PretrainConfig(budget="$1 at $2/h"), 1, 7.0)
    assert clock is not None
    assert clock.seconds == 1800
    assert clock.spent() == pytest.approx(7.0, abs=1.0)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("drift", [0.5, 1.0, 2.0])
def test_a_run_of_uneven_speed_ends_on_time_with_its_decay_finished(seed: int, drift: float) -> None:
    """Steps take half to twice as long in the second half, with noise; evaluations and saves besides."""
    draw, clock = random.Random(seed), Clock()
    budget = BudgetClock(600.0, parameters=10_000_000, clock=clock)
    config = PretrainConfig(
        budget="600s",
        lr_schedule="wsd",
        decay_ratio=0.6,
        decay_shape="linear",
        min_lr_ratio=0.0,
        warmup_steps=5,
    )
    schedule = LearningRateSchedule(config, 100_000)
    window: tuple[int, int] | None = None
    step, recent, rates = 0, [0.25], []
    while step < (100_000 if window is None else window[1]):
        rates.append(schedule.at(step, window))
        took = 0.2 * draw.uniform(0.7, 1.4) * (drift if clock.now > 1300 else 1.0)
        clock.now += took
        recent = [*recent[-50:], took]
        step += 1
        if step % 10 == 0:
            clock.now += 0.3
        if step % 20 == 0:
            clock.now += 0.1
        if step >= 5 and step < (window or (0, 100_000))[1]:
            end = step + left(budget, sum(recent) / len(recent), 0.3, 0.1)
            window = fitted_window(window, step=step, end=end, warmup=5, decay_ratio=0.6) or window
    clock.now += 0.4 + budget.end_seconds
    assert budget.spent() == pytest.approx(600, rel=0.03)
    assert rates[-1] < 0.01 * max(rates)
    # The decay began after the warm-up and never jumps.
    assert all(after > before - 0.05 * max(rates) for before, after in pairwise(rates[5:]))
    assert rates[5] == max(rates)


def test_a_decay_that_has_begun_keeps_its_first_step() -> None:
    window = fitted_window(None, step=100, end=1000, warmup=10, decay_ratio=0.6)
    assert window == (400, 1000)
    assert fitted_window(window, step=500, end=800, warmup=10, decay_ratio=0.6) == (400, 800)
    assert fitted_window(window, step=300, end=800, warmup=10, decay_ratio=0.6) == (320, 800)
    # A change below a hundredth of what is left is none.
    assert fitted_window(window, step=300, end=1003, warmup=10, decay_ratio=0.6) is None
    # The end is never in the past.
    assert fitted_window(window, step=500, end=300, warmup=10, decay_ratio=0.6) == (400, 501)
    assert fitted_window(None, step=10, end=15, warmup=8, decay_ratio=0.9) == (10, 15)
    assert fitted_window(None, step=100, end=1000, warmup=10, decay_ratio=0.6, decay_steps=50) == (950, 1000)


def test_a_window_in_the_future_leaves_warm_up_and_peak_alone() -> None:
    config = PretrainConfig(lr_schedule="wsd", warmup_steps=10, learning_rate=1.0, min_lr_ratio=0.0)
    schedule = LearningRateSchedule(config, 10_000)
    assert [schedule.at(step, (50, 100)) for step in (0, 4, 9, 20, 49)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    assert 0 < schedule.at(60, (50, 100)) < 1
    assert schedule.at(99, (50, 100)) == 0


def test_another_schedule_is_compressed_into_the_time() -> None:
    config = PretrainConfig(lr_schedule="linear", warmup_steps=0, learning_rate=1.0, min_lr_ratio=0.0)
    schedule = LearningRateSchedule(config, 10_000)
    assert schedule.at(50, (40, 101)) == pytest.approx(0.5)
    assert schedule.at(100, (40, 101)) == 0


@pytest.mark.parametrize(
    ("before", "now", "window"),
    [("10m", "10m", (40, 100)), ("10m", "20m", None), ("10m", "5m", (40, 100)), ("10m", None, None)],
)
def test_a_resumed_run_keeps_its_decay_unless_it_has_a_larger_budget(
    before: str, now: str | None, window: tuple[int, int] | None
) -> None:
    config = PretrainConfig(lr_schedule="wsd", budget=now)
    saved = {"budget": before, "max_time": None, "total_steps": 1000, "chosen_warmup_steps": 5}
    found = resume_schedule(config, 1000, saved=saved, step=60, decay_window=(40, 100))
    assert found.decay_window == window


def test_a_finished_budget_says_how_to_train_on() -> None:
    config = PretrainConfig(lr_schedule="wsd", budget="10m")
    saved = {"budget": "10m", "max_time": None, "total_steps": 1000, "chosen_warmup_steps": 5}
    found = resume_schedule(config, 1000, saved=saved, step=100, decay_window=(40, 100))
    assert found.notes == (
        "finished at step 100 within --budget 10m; a longer --budget, or --budget none, trains on.",
    )
