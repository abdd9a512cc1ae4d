"""`minimind-train verify-resume`: the table, the verdict and the exit code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from minimind.config.options import PretrainConfig
from minimind.runs.verify_resume import ComparedStep, ResumeCheck

Command = Callable[..., Any]


def check(*, tolerance: float = 0.0, processes: int = 1, **changed: Any) -> ResumeCheck:
    """Forty equal steps, stopped after 20; one of them changed."""
    steps = [
        ComparedStep(
            number,
            "loss",
            4.0,
            changed.get("resumed", 4.0) if number == 31 else 4.0,
            number < changed.get("other_rows_from", 99),
        )
        for number in range(1, 41)
    ]
    return ResumeCheck(tuple(steps), stopped_after=20, processes=processes, tolerance=tolerance)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the library was asked; the first entry is what it answers."""
    calls: list[Any] = [check()]

    def verify(config: PretrainConfig, steps: int, **options: Any) -> ResumeCheck:
        calls.append((config, steps, options["processes"]))
        options["note"]("training")
        return calls[0]

    monkeypatch.setattr("minimind.runs.verify_resume.verify_resume", verify)
    return calls


def test_the_options_are_those_of_pretrain(run: Command, asked: list[Any]) -> None:
    done = run("verify-resume --hidden_size 64 --batch-size 4 --steps 6 --processes 2")
    assert done.code == 0
    assert asked[1] == (PretrainConfig(hidden_size=64, batch_size=4), 6, 2)
    assert done.err == "training ...\n"


@pytest.mark.parametrize(
    ("result", "code", "verdict"),
    [
        (
            check(),
            0,
            "equal: 40 steps, stopped after step 20 and resumed: same data, losses equal to the last bit.",
        ),
        (
            check(resumed=4.00001, tolerance=1e-4, processes=2),
            0,
            "resumed on 2 processes: same data",
        ),
        (check(resumed=4.5), 1, "NOT equal: stopped after step 20 and resumed, loss "),
        (check(other_rows_from=25), 1, "the run trains on different data from step 25."),
    ],
)
def test_the_last_line_says_whether_they_are_equal(
    run: Command, asked: list[Any], result: ResumeCheck, code: int, verdict: str
) -> None:
    asked[0] = result
    done = run("verify-resume --preset tiny")
    assert done.code == code
    assert verdict in done.out.splitlines()[-1]


def test_the_table_shows_the_ends_the_stop_and_the_first_difference(run: Command, asked: list[Any]) -> None:
    asked[0] = check(resumed=4.5)
    out = run("verify-resume --preset tiny").out
    steps = [line.split()[0] for line in out.splitlines()[1:-1]]
    assert steps == ["1", "2", "...", *map(str, range(18, 23)), "...", *map(str, range(29, 34)), "...",
                     "38", "39", "40"]  # fmt: skip
    assert "31 loss 4.000000 4.500000 1.1e-01 same" in " ".join(out.split())


def test_checkpoints_is_a_command(run: Command) -> None:
    done = run("checkpoints", "nowhere")
    assert (done.code, done.err) == (
        2, "error: there is no checkpoint in nowhere; name the --output-dir of a run.\n"
    )  # fmt: skip
