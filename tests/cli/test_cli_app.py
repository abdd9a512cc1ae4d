"""The program: commands, exit codes, and which process prints."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

import minimind
from minimind.config.options import PretrainConfig
from minimind.errors import ConfigError, TrainingError
from minimind_cli.app import DISTRIBUTED, app
from support.made_runs import make_run

Command = Callable[..., Any]


def fail_with(error: BaseException) -> SimpleNamespace:
    def pretrain(config: PretrainConfig, **options: bool) -> None:
        raise error

    return SimpleNamespace(pretrain=pretrain)


def test_help_lists_the_commands(run: Command) -> None:
    done = run("--help")
    assert done.code == 0
    assert all(command in done.out for command in ("pretrain", "tokenize", "tokenizer"))


@pytest.mark.parametrize("command", ["", "pretrain ", "info ", "tokenizer ", "tokenizer train "])
def test_the_short_flag_for_help_is_understood(run: Command, command: str) -> None:
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


@pytest.mark.parametrize("args", [["generate", "x"], ["eval", "--data", "x"], ["export", "--output", "x"]])
def test_text_in_the_place_of_a_path_is_refused(run: Command, args: list[str]) -> None:
    done = run(args[0], "Once upon a time " * 20, *args[1:])
    assert done.code == 2
    assert done.err == (
        "error: Once upon a time Once upon a time Once u... is too long for a file name; give a path.\n"
    )


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (ConfigError(["one.", "two."]), 2, ["error: one.", "error: two."]),
        (TrainingError("the loss is not finite."), 2, ["error: the loss is not finite."]),
        (KeyboardInterrupt(), 130, ["error: interrupted."]),
    ],
)
@pytest.mark.parametrize("rank", [None, "0", "1"])
def test_only_the_main_process_prints(
    run: Command,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    lines: list[str],
    rank: str | None,
) -> None:
    monkeypatch.setitem(sys.modules, "minimind.training.pretrain", fail_with(error))  # type: ignore[arg-type]
    monkeypatch.setattr("minimind_cli.app.REPORT_DELAY_SECONDS", 0)
    if rank is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", rank)
    done = run("pretrain --preset tiny")
    assert done.code == code
    # Rank 1 gives rank 0 time to print, after which a launcher ends it; if still running, it prints too.
    signed = [f"rank 1: {line}" for line in lines if "interrupted" not in line]
    assert done.err.splitlines() == (signed if rank == "1" else lines)


@pytest.mark.parametrize("command", sorted(typer.main.get_command(app).commands.keys() - DISTRIBUTED))  # type: ignore[attr-defined]
def test_a_command_that_processes_would_all_repeat_is_refused_under_a_launcher(
    run: Command, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = run(command, "out")
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        f"error: {command} runs in a single process, but 2 were launched (WORLD_SIZE); run it without "
        f"a launcher: minimind-train {command} ...\n"
    )


@pytest.mark.parametrize(
    "args", ["--help", "--version", "pretrain --help", "bench --help-all", "generate --help", ""]
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_help_and_version_are_printed_by_one_process(
    run: Command, monkeypatch: pytest.MonkeyPatch, args: str, rank: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    done = run(*args.split())
    assert bool(done.out) == (rank == "0")
    assert done.err == ""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_options_are_printed_by_one_process(run: Command, monkeypatch: pytest.MonkeyPatch, rank: str) -> None:
    monkeypatch.setenv("RANK", rank)
    done = run("pretrain --preset tiny --print-config")
    assert (done.code, done.err, bool(done.out)) == (0, "", rank == "0")


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from minimind_cli.app import main

    monkeypatch.setitem(sys.modules, "minimind.training.pretrain", fail_with(ZeroDivisionError()))  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        main(["pretrain", "--preset", "tiny"])


def test_control_characters_of_a_command_line_are_escaped(run: Command) -> None:
    done = run("pretrain", "--lr-schedule", "a\x1b[2Jb\x9bc\u202ed\ne", "\x1bfg", "--\x07hi")
    assert done.code == 2
    assert done.err.isascii()
    assert [c for c in done.err if c < " " and c != "\n"] == []
    lines = done.err.splitlines()
    assert len(lines) == 3
    assert "--lr-schedule a\\x1b[2Jb\\x9bc\\u202ed\\x0ae is not known" in lines[2]
    assert "\\x07" in lines[0] + lines[1]


@pytest.mark.parametrize(
    "args",
    [
        ["info", "~/x"],
        ["checkpoints", "~/x"],
        ["compare", "~/x", "~/y"],
        ["reproduce", "~/x"],
        ["decay", "~/x", "--tokens", "5"],
        ["pretrain", "--config", "~/x"],
        ["tokenize", "--config=~/x"],
        ["bench", "--config=~/x"],
        ["export", "~/x", "--output", "y"],
        ["generate", "~/x", "y"],
        ["tokenizer", "inspect", "~/x"],
    ],
)
def test_every_path_of_a_command_line_may_begin_with_the_home_folder(
    run: Command, monkeypatch: pytest.MonkeyPatch, args: list[str]
) -> None:
    monkeypatch.setenv("HOME", "/nowhere/me")
    done = run(*args)
    assert done.code == 2
    assert "/nowhere/me/x" in done.err
    assert "~" not in done.err
    assert "~someone" in run(*[arg.replace("~", "~someone") for arg in args]).err


@pytest.mark.parametrize(
    "args",
    [
        ["info", "secret/model"],
        ["generate", "secret", "x"],
        ["eval", "secret", "--data", "a.jsonl"],
        ["export", "secret", "--output", "y"],
        ["reproduce", "secret"],
        ["tokenizer", "inspect", "secret/x"],
        ["pretrain", "--resume", "secret"],
        ["pretrain", "--resume", "--output-dir", "secret"],
        ["pretrain", "--preset", "tiny", "--from-weight", "secret"],
    ],
)
def test_a_path_without_permission_is_an_error_of_the_user(
    run: Command, monkeypatch: pytest.MonkeyPatch, args: list[str]
) -> None:
    """As root, every folder can be read, so the system is asked in another way."""
    stat = os.stat

    def refuse(path: Any, *args: Any, **options: Any) -> os.stat_result:
        if "secret" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", refuse)
    done = run(*args)
    assert (done.code, done.err.count("error:")) == (2, 1)
    assert "secret" in done.err


@pytest.mark.parametrize("path", ["loop", "loop/x"])
@pytest.mark.parametrize(
    "args",
    [
        ["pretrain", "--preset", "tiny", "--resume"],
        ["pretrain", "--resume", "--output-dir"],
        ["eval", "--data", "a.jsonl", "--"],
        ["info"],
        ["decay", "--tokens", "5"],
    ],
)
def test_a_link_to_itself_is_an_error_of_the_user(run: Command, args: list[str], path: str) -> None:
    os.symlink("loop", "loop")
    done = run(*args, path)
    assert (done.code, done.err.count("error:")) == (2, 1)


@pytest.mark.parametrize("option", ["--resume", "--output-dir"])
def test_the_home_folder_of_nobody_is_no_run_to_resume(run: Command, option: str) -> None:
    done = run("pretrain", "--resume", "--preset", "tiny", option, "~nobody_there/x")
    assert done.code == 2
    assert f"error: {option} ~nobody_there/x is not the home folder of a user" in done.err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_an_output_file_that_is_a_pipe_does_not_block(run: Command, tmp_path: Path) -> None:
    os.mkfifo("pipe")
    make_run(tmp_path / "run")
    done = run("compare", "run", "--html", "pipe")
    assert done.code == 2
    assert "pipe cannot be written (No such device or address); choose another file." in done.err
    assert run("compare", "run", "--html", "/dev/null").code == 0


@pytest.mark.parametrize(("world_size", "level"), [("1", None), ("2", "ERROR")])
def test_stack_traces_of_a_lost_launcher_are_not_printed(
    run: Command, monkeypatch: pytest.MonkeyPatch, world_size: str, level: str | None
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CPP_LOG_LEVEL"}
    monkeypatch.setattr(os, "environ", {**environment, "WORLD_SIZE": world_size})
    run("--version")
    assert os.environ.get("TORCH_CPP_LOG_LEVEL") == level
