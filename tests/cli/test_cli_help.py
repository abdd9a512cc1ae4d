"""What `--help`, the tab key and a terminal show."""

from __future__ import annotations

import os
import pty
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import typer

from minimind.config.presets import PRESETS
from minimind_cli.app import app
from minimind_cli.examples import EXAMPLES, examples

Command = Callable[..., Any]
COLOUR = re.compile(r"\x1b\[[\d;]*\b(3[0-7]|38|9[0-7])[\d;]*m")
PROGRAMS = ("minimind-train", "accelerate launch -m minimind_cli")


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    yield " ".join(path), command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(app)))


def test_every_command_has_examples_and_there_are_no_others() -> None:
    assert COMMANDS.keys() == EXAMPLES.keys()
    for name, command in COMMANDS.items():
        assert command.epilog == examples(name), f"register {name} with epilog=examples({name!r})"


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines])
def test_an_example_names_a_command_and_its_options(line: str) -> None:
    assert len(line) <= 92
    program = next(program for program in PROGRAMS if line.startswith(program))
    words = shlex.split(line.removeprefix(program))
    command = COMMANDS[""]
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    known = {"--help", *(flag for param in command.params for flag in (*param.opts, *param.secondary_opts))}
    assert command is not COMMANDS[""]
    assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("name", EXAMPLES)
def test_help_fits_a_hundred_columns_with_its_examples_whole(
    run: Command, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 100)
    done = run(*name.split(), "--help")
    assert done.code == 0
    lines = [line.rstrip() for line in done.out.splitlines()]
    assert max(map(len, lines)) <= 100
    for example in EXAMPLES[name]:
        assert f"   {example}" in lines


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("pretrain --preset mini", ["minimind2-small", "minimind-3", "minimind-3-moe", "minimind2"]),
        ("bench --preset ", list(PRESETS)),
        ("pretrain --lr-schedule w", ["wsd"]),
        ("pretrain --tracker ", ["tensorboard", "wandb", "swanlab", "none"]),
        ("pretrain --learning", ["--learning-rate"]),
        ("tokenizer ", ["train", "inspect"]),
        # Nothing: then the shell offers files.
        ("pretrain --data ", []),
    ],
)
def test_the_tab_key_offers_commands_options_and_values(
    run: Command, words: str, offered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = f"minimind-train {words}"
    monkeypatch.setenv("_MINIMIND_TRAIN_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split(" ")) - 1))
    assert run("").out.split() == offered


def in_a_terminal(**variables: str) -> str:
    """Return what `minimind-train --help` writes to a terminal."""
    forcing = ("NO_COLOR", "FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TTY_COMPATIBLE")
    environment = {name: value for name, value in os.environ.items() if name not in forcing}
    terminal, end = pty.openpty()
    words = [sys.executable, "-m", "minimind_cli", "--help"]
    # Linux reports the end of a terminal's other side as an error.
    with subprocess.Popen(
        words, stdout=end, stderr=end, env={**environment, "TERM": "xterm-256color", **variables}
    ):
        os.close(end)
        shown = b""
        while True:
            try:
                part = os.read(terminal, 4096)
            except OSError:
                break
            if not part:
                break
            shown += part
    os.close(terminal)
    return shown.decode()


def test_colours_are_for_terminals_that_want_them(run: Command) -> None:
    assert COLOUR.search(in_a_terminal())
    plain = in_a_terminal(NO_COLOR="1")
    assert "Usage" in plain
    assert not COLOUR.search(plain)
    assert "\x1b" not in run("--help").out
