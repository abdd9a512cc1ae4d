"""`import minimind` and `--help` cost nothing: no torch, no numpy, names on first use."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import minimind

CHILD = """
import sys, time
import minimind
assert not {"torch", "numpy", "typer"} & sys.modules.keys(), "import minimind"
from minimind import PRESETS, ConfigError, PretrainConfig, preset_config
preset_config("tiny")
from minimind_cli.app import main
for args in (["--help"], ["pretrain", "--help"], ["pretrain", "--print-config", "--preset", "tiny"]):
    try:
        main(args)
    except SystemExit as stop:
        assert not stop.code, args
    loaded = {"torch", "numpy", "accelerate", "tokenizers", "click"} & sys.modules.keys()
    assert not loaded, (args, loaded)
print(time.process_time())
"""


def test_help_is_immediate_and_loads_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Processor time of three commands in one process; one takes about 0.2 s.
    assert float(done.stdout.splitlines()[-1]) < 2.0


@pytest.mark.parametrize("name", minimind.__all__)
def test_every_public_name_loads(name: str) -> None:
    assert getattr(minimind, name) is not None
    assert name in dir(minimind)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'pretrian'"):
        _ = minimind.pretrian


def test_pretrain_stays_the_function_when_its_module_is_imported() -> None:
    module = importlib.import_module("minimind.planning.budget")
    assert minimind.pretrain is module.pretrain
