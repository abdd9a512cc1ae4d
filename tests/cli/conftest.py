"""Running the command line inside the test process."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer.main

from minimind.config.options import PretrainConfig
from minimind_cli.app import main


@dataclass(frozen=True)
class Finished:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


Command = Callable[..., Finished]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave no file in the checkout, and read none of an earlier run there."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def plain_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take back that a process other than the first signs its warnings."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)


# Typer builds every command again for each command line.
_get_command = functools.cache(typer.main.get_command)


@pytest.fixture(autouse=True)
def commands_that_are_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what typer makes of the commands from one test to the next."""
    monkeypatch.setattr(typer.main, "get_command", _get_command)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the arguments of a command line; a string is split at spaces."""

    def command(*args: str) -> Finished:
        with pytest.raises(SystemExit) as stop:
            main(args[0].split() if len(args) == 1 else list(args))
        captured = capsys.readouterr()
        code = stop.value.code
        assert isinstance(code, int)
        return Finished(code, captured.out, captured.err)

    return command


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[PretrainConfig]:
    """Put a recorder in place of the training; the list holds the configurations it was called with."""
    configs: list[PretrainConfig] = []

    def pretrain(config: PretrainConfig, *, quiet: bool, handle_signals: bool) -> SimpleNamespace:
        assert (quiet, handle_signals) == (False, True)
        configs.append(config)
        return SimpleNamespace(stopped=None)

    monkeypatch.setitem(sys.modules, "minimind.training.pretrain", SimpleNamespace(pretrain=pretrain))  # type: ignore[arg-type]
    return configs


@pytest.fixture(params=[False, True], ids=["no gpu", "gpu"])
def has_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Pretend that there is a GPU, or none."""
    monkeypatch.setattr("minimind_cli.config_options.has_gpu", lambda: request.param)
    return request.param
