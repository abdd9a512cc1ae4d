"""`minimind-train decay`: from arguments to a call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

Command = Callable[..., Any]
Call = tuple[tuple[Any, ...], dict[str, Any]]

AS_COMMAND = {"quiet": False, "handle_signals": True}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    calls: list[Call] = []

    def decay(*args: Any, **options: Any) -> SimpleNamespace:
        calls.append((args, options))
        return SimpleNamespace(stopped=None)

    monkeypatch.setitem(sys.modules, "minimind.runs.decay", SimpleNamespace(decay=decay))  # type: ignore[arg-type]
    return calls


def test_a_run_and_a_number_of_tokens_are_enough(run: Command, calls: list[Call]) -> None:
    done = run("decay out --tokens 1e8")
    assert (done.code, done.err) == (0, "")
    defaults = {"from_step": None, "output_dir": None, "shape": "linear", "min_lr_ratio": None} | AS_COMMAND
    assert calls == [((Path("out"), 10**8), defaults)]


def test_every_option_is_passed_on(run: Command, calls: list[Call]) -> None:
    done = run("decay out --tokens 5 --from_step 7 --output-dir o --decay-shape sqrt --min-lr-ratio 0")
    assert (done.code, done.err) == (0, "")
    chosen = {"from_step": 7, "output_dir": Path("o"), "shape": "sqrt", "min_lr_ratio": 0.0} | AS_COMMAND
    assert calls == [((Path("out"), 5), chosen)]


def test_user_errors_are_reported_together(run: Command, calls: list[Call]) -> None:
    done = run("decay out --tokens 0 --from-stp 7 --decay-shape round")
    assert done.code == 2
    assert done.err.splitlines() == [
        "error: unknown option --from-stp; did you mean '--from-step'?",
        "error: --tokens 0 is out of range; it must be at least 1.",
        "error: --decay-shape round is not known; choose linear or sqrt.",
    ]
    assert calls == []


def test_an_extra_argument_is_reported_without_an_option_that_there_is_not(
    run: Command, calls: list[Call]
) -> None:
    done = run("decay trunk another --tokens 5")
    assert (done.code, calls) == (2, [])
    assert done.err == (
        "error: unexpected argument 'another'; values follow an option; see minimind-train decay --help.\n"
    )


def test_without_tokens_it_says_what_to_give(run: Command, calls: list[Call]) -> None:
    done = run("decay out")
    assert done.code == 2
    assert done.err.startswith("error: --tokens is missing; give the length of the decay")
    assert calls == []


def test_a_folder_without_a_run_is_refused(run: Command) -> None:
    done = run("decay nowhere --tokens 5")
    assert done.code == 2
    assert done.err == (
        "error: there is no checkpoint in nowhere/checkpoints; name the --output-dir of a run.\n"
    )
