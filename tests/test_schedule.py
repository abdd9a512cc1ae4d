"""The learning rate over a run."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from minimind.config.options import PretrainConfig
from minimind.schedule import (
    LearningRateSchedule,
    ResumedSchedule,
    decay_steps_due,
    fit_to_time,
    lr_factor,
    resume_schedule,
    stable_phase,
    warmup_problem,
    warmup_steps,
)

FALLING = ("cosine", "linear", "wsd")


@st.composite
def runs(draw: st.DrawFn, schedules: tuple[str, ...] = (*FALLING, "constant")) -> dict:
    total = draw(st.integers(2, 3000))
    return {
        "total_steps": total,
        "warmup_steps": draw(st.integers(0, total - 1)),
        "schedule": draw(st.sampled_from(schedules)),
        "min_lr_ratio": draw(st.floats(0, 1)),
        "decay_ratio": draw(st.floats(0.01, 1)),
    }


def curve(run: dict) -> list[float]:
    return [lr_factor(step, **run) for step in range(run["total_steps"])]


@given(runs())
def test_warm_up_is_linear_and_its_first_step_learns(run):
    warmup = run["warmup_steps"]
    factors = curve(run)
    assert factors[:warmup] == [(step + 1) / warmup for step in range(warmup)]
    assert factors[max(warmup - 1, 0)] == 1.0


@given(runs())
def test_factor_stays_in_bounds_and_never_rises_after_warm_up(run):
    factors = curve(run)
    after = factors[max(run["warmup_steps"] - 1, 0) :]
    assert all(run["min_lr_ratio"] - 1e-12 <= factor <= 1 for factor in after)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(after))


@given(runs(FALLING))
def test_last_step_has_exactly_the_smallest_rate_and_it_stays_there(run):
    # A warm-up up to the last step leaves no step to fall in.
    assume(run["warmup_steps"] < run["total_steps"] - 1)
    last = run["total_steps"] - 1
    assert lr_factor(last, **run) == pytest.approx(run["min_lr_ratio"], abs=1e-12)
    assert lr_factor(last + 5, **run) == lr_factor(last, **run)


@given(runs())
def test_neighbouring_steps_differ_by_no_more_than_the_steepest_slope(run):
    factors = curve(run)
    warmup, last = run["warmup_steps"], run["total_steps"] - 1
    falling = last - max(warmup - 1, 0)
    decaying = min(falling, max(round(run["decay_ratio"] * run["total_steps"]), 1))
    steepest = {
        "cosine": math.pi / 2 / max(falling, 1),
        "linear": 1 / max(falling, 1),
        "wsd": 1 / math.sqrt(max(decaying, 1)),
        "constant": 0.0,
    }[run["schedule"]]
    limit = max(1 / warmup if warmup else 0.0, steepest)
    jumps = [abs(b - a) for a, b in itertools.pairwise(factors)]
    assert max(jumps) <= limit + 1e-12


def test_values_by_hand():
    run = {"total_steps": 101, "warmup_steps": 1, "min_lr_ratio": 0.1, "decay_ratio": 0.5}
    assert lr_factor(50, schedule="cosine", **run) == pytest.approx(0.55)
    assert lr_factor(25, schedule="cosine", **run) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert lr_factor(25, schedule="linear", **run) == pytest.approx(0.775)
    # 101 steps decay over the last 50: half-way down they have lost sqrt(1/2) of the way.
    assert lr_factor(50, schedule="wsd", **run) == 1.0
    assert lr_factor(75, schedule="wsd", **run) == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(0.5)))
    assert lr_factor(75, schedule="wsd", decay_shape="linear", **run) == pytest.approx(0.55)
    assert lr_factor(75, schedule="wsd", decay_steps=50, **{**run, "decay_ratio": 0.1}) == lr_factor(
        75, schedule="wsd", **run
    )
    assert lr_factor(100, schedule="constant", **run) == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_one_step_run_learns_at_the_peak(schedule):
    run = {"total_steps": 1, "schedule": schedule, "min_lr_ratio": 0.0, "decay_ratio": 0.2}
    assert lr_factor(0, warmup_steps=0, **run) == 1.0


def test_run_shorter_than_its_warm_up_has_the_rates_of_the_long_run():
    rest = {"warmup_steps": 100, "schedule": "cosine", "min_lr_ratio": 0.1, "decay_ratio": 0.2}
    short = [lr_factor(step, total_steps=10, **rest) for step in range(10)]
    assert short == [lr_factor(step, total_steps=1000, **rest) for step in range(10)]


@pytest.mark.parametrize(("total", "warmup"), [(10, 0), (1000, 20), (1_000_000, 1000)])
def test_default_warm_up_is_two_percent_up_to_a_thousand(total, warmup):
    rate = LearningRateSchedule(PretrainConfig(learning_rate=1.0, lr_schedule="constant"), total).at
    reached = next(step for step in range(total) if rate(step) == 1.0)
    assert reached == max(warmup - 1, 0)


def test_rates_are_the_peak_times_the_factor():
    config = PretrainConfig(learning_rate=4e-3, lr_schedule="linear", warmup_steps=4, min_lr_ratio=0.25)
    rate = LearningRateSchedule(config, 50).at
    assert rate(0) == pytest.approx(1e-3)
    assert rate(3) == pytest.approx(4e-3)
    assert rate(49) == pytest.approx(1e-3)


def test_every_schedule_of_the_configuration_exists():
    from minimind.config.schema import schema_of

    for schedule in schema_of(PretrainConfig)["lr_schedule"].choices:
        assert LearningRateSchedule(PretrainConfig(lr_schedule=schedule), 100).at(50) > 0
    with pytest.raises(ValueError, match="unknown schedule"):
        lr_factor(0, total_steps=1, warmup_steps=0, schedule="step", min_lr_ratio=0, decay_ratio=1)
    for shape in schema_of(PretrainConfig)["decay_shape"].choices:
        config = PretrainConfig(lr_schedule="wsd", decay_shape=shape)
        assert LearningRateSchedule(config, 100).at(99) > 0
    run = {"total_steps": 1, "warmup_steps": 0, "min_lr_ratio": 0, "decay_ratio": 1}
    with pytest.raises(ValueError, match="unknown shape"):
        lr_factor(0, schedule="wsd", decay_shape="round", **run)


@given(
    total=st.integers(1, 60),
    warmup=st.none() | st.integers(0, 60),
    ratio=st.floats(0.01, 1),
    steps=st.none() | st.integers(1, 60),
    schedule=st.sampled_from(["wsd", "constant"]),
)
def test_the_stable_phase_is_where_the_rate_has_its_peak(
    total: int,
    warmup: int | None,
    ratio: float,
    steps: int | None,
    schedule: str,
) -> None:
    config = PretrainConfig(
        learning_rate=1.0,
        lr_schedule=schedule,
        warmup_steps=warmup,
        decay_ratio=ratio,
        decay_steps=steps,
        min_lr_ratio=0.0,
    )
    rate = LearningRateSchedule(config, total).at
    phase = stable_phase(config, total)
    assert phase is not None
    for done in range(1, total + 1):
        past_warm_up = done >= warmup_steps(config, total)
        assert (phase[0] <= done <= phase[1]) == (past_warm_up and rate(done - 1, None) == 1.0)


def test_a_moved_end_ends_the_stable_phase() -> None:
    config = PretrainConfig(learning_rate=1.0, lr_schedule="wsd", warmup_steps=10)
    assert stable_phase(config, 100) == (10, 80)
    assert stable_phase(config, 100, (40, 50)) == (10, 40)
    rate = LearningRateSchedule(config, 100).at
    assert rate(39, None) == 1.0
    assert rate(40, (40, 50)) < 1.0


def test_other_schedules_have_no_stable_phase() -> None:
    assert stable_phase(PretrainConfig(lr_schedule="cosine"), 100) is None


def test_a_time_limit_within_the_decay_does_not_raise_the_rate() -> None:
    config = PretrainConfig(learning_rate=1.0, lr_schedule="wsd", warmup_steps=0, decay_steps=50)
    rate = LearningRateSchedule(config, 100).at
    before, after = rate(79, None), [rate(step, (80, 85)) for step in range(80, 85)]
    assert before > after[0]
    assert after == sorted(after, reverse=True)


def test_a_fixed_number_of_steps_to_decay_counts_under_a_time_limit_too() -> None:
    due = {"steps_done": 1000, "decay_ratio": 0.2, "decay_steps": 40, "seconds_per_step": 1.0}
    assert decay_steps_due(seconds_left=41.5, **due) == 0
    assert decay_steps_due(seconds_left=40.5, **due) == 40


@given(done=st.integers(0, 10_000), ratio=st.floats(0.05, 0.5), per_step=st.floats(0.01, 5.0))
def test_a_timed_decay_begins_when_the_time_left_is_just_enough(
    done: int, ratio: float, per_step: float
) -> None:
    def due(seconds_left: float) -> int:
        return decay_steps_due(
            steps_done=done, decay_ratio=ratio, seconds_left=seconds_left, seconds_per_step=per_step
        )

    wanted = math.ceil(done * ratio / (1 - ratio))
    assert due(per_step * (wanted + 2)) == 0
    begun = due(per_step * (wanted + 0.5))
    assert begun == max(wanted, 1)
    # Those steps then are the share of all steps that was asked for.
    assert begun == pytest.approx(ratio * (done + begun), abs=1.1)
    # A run that comes late decays in what is left.
    assert due(per_step * (wanted // 2 + 0.5)) == max(wanted // 2, 1)


def test_a_moved_end_decays_from_the_peak_to_the_minimum() -> None:
    config = PretrainConfig(learning_rate=1.0, lr_schedule="wsd", min_lr_ratio=0.1, warmup_steps=10)
    rate = LearningRateSchedule(config, 1000).at
    assert rate(300, None) == 1.0
    assert rate(299, None) == 1.0
    falling = [rate(step, (300, 400)) for step in range(300, 400)]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] == pytest.approx(0.1)
    assert [rate(4, None), rate(5, (5, 20)), rate(19, (5, 20))] == pytest.approx([0.5, 0.6, 0.06], abs=0.16)
    assert rate(19, (5, 20)) == pytest.approx(0.06)


def resumed(total: int, step: int, window: tuple[int, int] | None = None, **saved: Any) -> ResumedSchedule:
    """The schedule of a run of 100 steps, resumed for `total` steps by the options `now`."""
    now = {"lr_schedule": "cosine", "learning_rate": 1.0, **saved.pop("now", {})}
    stored = {"warmup_steps": None, "total_steps": 100, **now, **saved}
    config = PretrainConfig(**now)
    return resume_schedule(config, total, saved=stored, step=step, decay_window=window)


@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_a_longer_run_keeps_the_warm_up_of_the_beginning(schedule: str) -> None:
    # 2% of 10,000 steps are 200, and the run was at its peak.
    found = resumed(10_000, 50, now={"lr_schedule": schedule}, chosen_warmup_steps=2)
    assert found.schedule.warmup_steps == 2
    assert found.schedule.at(50) == 1.0
    assert found.notes == ()
    # Older checkpoints have the number of steps only.
    assert resumed(10_000, 50).schedule.warmup_steps == 2
    assert resumed(10_000, 50, chosen_warmup_steps=7).schedule.warmup_steps == 7
    # A new number counts.
    assert resumed(10_000, 50, now={"warmup_steps": 60}, warmup_steps=None).schedule.warmup_steps == 60


def test_a_longer_run_says_the_rate_before_and_after() -> None:
    found = resumed(1000, 90)
    (note,) = found.notes
    before = LearningRateSchedule(PretrainConfig(learning_rate=1.0), 100).at(89)
    after = LearningRateSchedule(PretrainConfig(learning_rate=1.0, warmup_steps=2), 1000).at(90)
    assert f"from {before:.3g} before the resume to {after:.3g} after" in note
    assert before < 0.2 < 0.9 < after
    assert resumed(100, 90).notes == ()


@pytest.mark.parametrize(
    ("before", "now", "binds"),
    [
        ("20s", "20s", True),
        ("20s", "10s", True),
        ("20s", "1m", False),
        ("20s", None, False),
        (None, "1m", True),
    ],
)
def test_the_end_of_a_time_limit_does_not_bind_a_run_with_more_time(
    before: str | None, now: str | None, binds: bool
) -> None:
    options = {"lr_schedule": "wsd", "max_time": now}
    found = resumed(1000, 60, (50, 60), now=options, max_time=before, total_steps=1000)
    assert found.decay_window == ((50, 60) if binds else None)
    (note,) = found.notes
    assert ("--max-time none, trains on" if binds else "from 0.1 before the resume to 1 after") in note


def test_a_decay_never_begins_in_the_warm_up() -> None:
    run = {"total_steps": 10_000, "seconds_per_step": 1.0}
    given = PretrainConfig(lr_schedule="wsd", warmup_steps=200)
    assert fit_to_time(given, warmup=200, steps_done=199, seconds_left=5.0, **run) == 0
    assert fit_to_time(given, warmup=200, steps_done=200, seconds_left=5.0, **run) == 5
    # A default warm-up is shortened to 2% of the steps that the time allows.
    default = PretrainConfig(lr_schedule="wsd")
    assert fit_to_time(default, warmup=200, steps_done=10, seconds_left=990.0, **run) == -20
    assert fit_to_time(default, warmup=30, steps_done=10, seconds_left=990.0, **run) == 0
    assert fit_to_time(default, warmup=200, steps_done=10, seconds_left=1e9, **run) == 0
    assert fit_to_time(PretrainConfig(), warmup=200, steps_done=10, seconds_left=990.0, **run) == 0


def test_a_warm_up_that_the_time_does_not_allow_is_warned_of() -> None:
    run: dict[str, Any] = {"warmup": 200, "steps_done": 10, "seconds_per_step": 1.0}
    for schedule in ("cosine", "wsd"):
        given = PretrainConfig(lr_schedule=schedule, warmup_steps=200, max_time="1m")
        assert warmup_problem(given, seconds_left=190.0, **run) is None
        problem = warmup_problem(given, seconds_left=40.0, **run)
        assert problem is not None
        assert "allows about 50 steps, fewer than the 200 of the warm-up" in problem
        assert "only reaches 25.0% of its peak" in problem
        late = warmup_problem(given, seconds_left=-5.0, **{**run, "seconds_per_step": 0.1})
        assert "allows about 10 steps" in str(late)  # those done
    # A default warm-up of wsd is shortened instead.
    default = PretrainConfig(lr_schedule="wsd", max_time="1m")
    assert warmup_problem(default, seconds_left=40.0, **run) is None
