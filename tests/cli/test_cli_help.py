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

from minimind.config.options import CONFIG_SECTIONS, PretrainConfig
from minimind.config.presets import PRESETS
from minimind.config.schema import schema_of
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
    args = shlex.split(line.removeprefix(program))
    command = COMMANDS[""]
    while args and args[0] in getattr(command, "commands", {}):
        command = command.commands[args.pop(0)]
    known = {"--help", *(flag for param in command.params for flag in (*param.opts, *param.secondary_opts))}
    assert command is not COMMANDS[""]
    assert {word for word in args if word.startswith("--")} <= known


# Every help that can be printed: a command, and the options of the command line that print it.
LONG = ("pretrain", "bench", "tokenize", "verify-resume")
PAGES = [(name, "--help") for name in COMMANDS] + [(name, "--help-all") for name in LONG]
COMMON = {field.flag for field in schema_of(PretrainConfig).values() if field.info.common}


@pytest.fixture(params=[50, 80, 120])
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("COLUMNS", str(request.param))
    return int(request.param)


def shown_options(out: str) -> set[str]:
    """Return the first name of every option that a help has an entry for."""
    return set(re.findall(r"^  (?:-h, )?(--[\w-]+)", out.split("Examples:")[0], re.M))


def shown_examples(out: str) -> list[str]:
    """Return the example command lines as a shell reads them."""
    return out.split("\nExamples:\n")[1].replace("\\\n", "").splitlines()


@pytest.mark.parametrize(("name", "flag"), PAGES)
def test_help_fits_the_terminal_in_ascii(run: Command, width: int, name: str, flag: str) -> None:
    done = run(*name.split(), flag)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert [line for line in lines if len(line) > width or line.endswith("[default:")] == []
    assert done.out.isascii()


@pytest.mark.parametrize(("name", "flag"), PAGES)
def test_names_and_values_stand_whole_on_lines_without_text(
    run: Command, width: int, name: str, flag: str
) -> None:
    lines = run(*name.split(), flag).out.splitlines()
    for param in COMMANDS[name].params:
        if param.param_type_name == "argument" or param.opts[0] not in shown_options("\n".join(lines)):
            continue
        start = next(
            i
            for i, line in enumerate(lines)
            if line.split()[:1] == [param.opts[0].rstrip(",")] or line.startswith(f"  {param.opts[0]}")
        )
        # A name line that is too long continues below, with another name or with the values.
        end = next(i for i in range(start + 1, len(lines)) if not re.match(r"      (--|\w+\|)", lines[i]))
        entry = " ".join(lines[start:end]).split()
        values = [] if param.is_flag else [param.metavar]
        separators = {"/"} if param.secondary_opts else set()
        assert [word.rstrip(",") for word in entry if word not in separators] == [
            *param.opts,
            *param.secondary_opts,
            *values,
        ]
        assert lines[end].startswith("      ")


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_can_be_copied(run: Command, width: int, name: str) -> None:
    printed = shown_examples(run(*name.split(), "--help").out)
    assert [shlex.split(line) for line in printed] == [shlex.split(line) for line in EXAMPLES[name]]
    assert all(line.strip().startswith(PROGRAMS) for line in printed)


@pytest.mark.parametrize("name", LONG)
def test_help_shows_the_common_options_and_help_all_the_others(run: Command, name: str) -> None:
    known = {param.opts[0] for param in COMMANDS[name].params if not param.hidden} | {"--help"}
    of_runs = {field.flag for field in schema_of(PretrainConfig).values()} & known
    short, full = run(f"{name} --help").out, run(f"{name} --help-all").out
    assert shown_options(short) == known - of_runs | (COMMON & known)
    assert shown_options(full) == known
    assert f"{len(of_runs - COMMON)} more options:\n  minimind-train {name} --help-all\n" in short
    assert "more options" not in full


def test_help_all_shows_every_option_of_a_run_with_its_help_and_default(run: Command) -> None:
    out = run("pretrain --help_all").out
    sections = re.findall(r"^(\S.*):$", out, re.M)
    assert sections == ["Options", *(section.__doc__ for section in CONFIG_SECTIONS), "Examples"]
    entries = {
        entry.split()[0].rstrip(","): " ".join(entry.split()) for entry in re.split(r"\n(?=  --)", out)
    }
    for field in schema_of(PretrainConfig).values():
        entry = entries[field.flag]
        assert field.info.help in entry
        default = field.default_text
        if isinstance(field.fallback, bool):
            default = field.flag if field.fallback else field.flag.replace("--", "--no-", 1)
        assert (f"[default: {default}]" in entry) is (default != "none")
    assert "--num-workers" not in out


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in LONG])
def test_a_command_with_few_options_shows_them_all(run: Command, name: str) -> None:
    known = {param.opts[0] for param in COMMANDS[name].params if param.param_type_name == "option"}
    out = run(*name.split(), "--help").out
    assert shown_options(out) == known | {"--help"}
    assert "--help-all" not in out


def test_arguments_stand_in_the_usage_as_in_their_list(run: Command) -> None:
    out = run("generate --help").out
    assert out.startswith("Usage: minimind-train generate [OPTIONS] MODEL [PROMPT]...\n")
    assert re.search(r"^Arguments:\n  MODEL\n      \w", out, re.M)
    assert re.search(r"^  \[PROMPT\]\.\.\.\n      \w", out, re.M)


def test_help_is_written_to_a_plain_ascii_terminal() -> None:
    shown = in_a_terminal(TERM="dumb", PYTHONIOENCODING="ascii", LANG="C", LC_ALL="C", COLUMNS="50")
    assert "Usage: minimind-train" in shown
    assert "\x1b" not in shown
    assert shown.isascii()


HELP_IN_A_CHILD = """
import sys, time
from minimind_cli.app import main
try:
    main(["pretrain", "--help-all"])
except SystemExit as stop:
    assert not stop.code
assert not {"torch", "numpy", "accelerate", "tokenizers"} & sys.modules.keys()
print(time.process_time())
"""


IMPORT_IN_A_CHILD = """
import time
import rich.console, typer.main
print(time.process_time())
"""


def test_help_takes_little_time_and_no_torch() -> None:
    def seconds(program: str) -> float:
        command = [sys.executable, "-c", program]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])

    # Processor time, the least of three: other programs may use the cores too. It was 3.5 times.
    imports = min(seconds(IMPORT_IN_A_CHILD) for _ in range(3))
    assert min(seconds(HELP_IN_A_CHILD) for _ in range(3)) <= 7 * imports


@pytest.mark.parametrize(
    ("args", "offered"),
    [
        ("pretrain --preset mini", ["minimind2-small", "minimind-3", "minimind-3-moe", "minimind2"]),
        ("bench --preset ", list(PRESETS)),
        ("pretrain --lr-schedule w", ["wsd"]),
        ("pretrain --tracker ", ["tensorboard", "wandb", "swanlab", "mlflow", "csv", "none"]),
        ("pretrain --learning", ["--learning-rate"]),
        ("pretrain --help", ["--help-all", "--help"]),
        # Less common options too, which only --help-all shows.
        ("pretrain --keep", ["--keep-checkpoints", "--keep-every"]),
        ("tokenizer ", ["train", "inspect"]),
        # Nothing: then the shell offers files.
        ("pretrain --data ", []),
    ],
)
def test_the_tab_key_offers_commands_options_and_values(
    run: Command, args: str, offered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = f"minimind-train {args}"
    monkeypatch.setenv("_MINIMIND_TRAIN_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split(" ")) - 1))
    assert run("").out.split() == offered


def in_a_terminal(**variables: str) -> str:
    """Return what `minimind-train --help` writes to a terminal."""
    forcing = ("NO_COLOR", "FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TTY_COMPATIBLE")
    environment = {name: value for name, value in os.environ.items() if name not in forcing}
    terminal, end = pty.openpty()
    args = [sys.executable, "-m", "minimind_cli", "--help"]
    # Linux reports the end of a terminal's other side as an error.
    with subprocess.Popen(
        args, stdout=end, stderr=end, env={**environment, "TERM": "xterm-256color", **variables}
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
