"""The program: commands, exit codes, and which process speaks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

import minimind
from minimind.config import PretrainConfig
from minimind.errors import ConfigError, TrainingError
from minimind.settings import settings_of

Command = Callable[..., Any]


def fail_with(error: BaseException) -> SimpleNamespace:
    def pretrain(config: PretrainConfig) -> None:
        raise error

    return SimpleNamespace(pretrain=pretrain)


def test_help_lists_the_commands(run: Command) -> None:
    done = run("--help")
    assert done.code == 0
    assert all(command in done.out for command in ("pretrain", "tokenize", "tokenizer"))


@pytest.mark.parametrize("command", ["", "pretrain ", "info ", "tokenizer ", "tokenizer train "])
def test_the_short_word_for_help_is_understood(run: Command, command: str) -> None:
    short, long = run(f"{command}-h"), run(f"{command}--help")
    assert (short.code, short.out) == (0, long.out)
    assert "Usage" in short.out


def test_without_a_command_the_help_appears(run: Command) -> None:
    done = run()
    assert (done.code, done.err) == (2, "")
    assert "Commands" in done.out


def test_the_version_is_printed(run: Command) -> None:
    done = run("--version")
    assert (done.code, done.out) == (0, f"minimind {minimind.__version__}\n")


def test_an_unknown_command_suggests_the_nearest(run: Command) -> None:
    done = run("pretrian")
    assert (done.code, done.err) == (2, "error: No such command 'pretrian'. Did you mean 'pretrain'?\n")


def test_help_shows_every_option_with_its_default(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 300)
    out = run("pretrain --help").out
    for setting in settings_of(PretrainConfig).values():
        line = next(line for line in out.splitlines() if line.startswith(f"│ {setting.flag}"))
        assert setting.option.help in line
        assert "[default: " in line
        if setting.kind is not bool:
            assert setting.metavar in line
            assert setting.default_text in line
    for panel in ("Data", "Model", "Optimization", "Run"):
        assert f"─ {panel} ─" in out
    assert "--num-workers" not in out


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (ConfigError(["one.", "two."]), 2, ["error: one.", "error: two."]),
        (TrainingError("the loss is not finite."), 2, ["error: the loss is not finite."]),
        (KeyboardInterrupt(), 130, ["error: interrupted."]),
    ],
)
@pytest.mark.parametrize("rank", [None, "0", "1"])
def test_one_process_speaks_for_all(
    run: Command,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    lines: list[str],
    rank: str | None,
) -> None:
    monkeypatch.setitem(sys.modules, "minimind.pretrain", fail_with(error))  # type: ignore[arg-type]
    monkeypatch.setattr("minimind_cli.app.SECONDS_TO_SPEAK", 0)
    if rank is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", rank)
    done = run("pretrain --preset tiny")
    assert done.code == code
    # Rank 1 gives the first one time to speak, after which a launcher ends it; left alive, it speaks too.
    signed = [f"rank 1: {line}" for line in lines if "interrupted" not in line]
    assert done.err.splitlines() == (signed if rank == "1" else lines)


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from minimind_cli.app import main

    monkeypatch.setitem(sys.modules, "minimind.pretrain", fail_with(ZeroDivisionError()))  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        main(["pretrain", "--preset", "tiny"])
