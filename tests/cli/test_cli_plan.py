"""`minimind-train pretrain --plan`: what it prints, alone and under a launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minimind.planning.scaled_run import ScaleRequest

Command = Callable[..., Any]

TINY = (
    *("pretrain", "--plan", "--hidden-size", "32", "--num-hidden-layers", "1", "--num-attention-heads", "2"),
    *("--num-key-value-heads", "1", "--max-seq-len", "64", "--batch-size", "4", "--no-compile"),
)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Put a fake plan in place of the real one; the list holds what it was asked for."""
    calls: list[tuple[Any, ...]] = []

    def plan_run(config: Any, *, price_per_hour: float | None, scale: Any, quiet: bool) -> SimpleNamespace:
        calls.append((config, price_per_hour, quiet, scale))
        return SimpleNamespace(
            rows=lambda: [("model", "small"), ("", "indeed")],
            problems=("no room.",),
            to_dict=lambda: {"parameters": 1},
        )

    monkeypatch.setitem(sys.modules, "minimind.planning.plan", SimpleNamespace(plan_run=plan_run))  # type: ignore[arg-type]
    return calls


def test_rows_and_warnings_are_printed_and_nothing_is_trained(
    run: Command, planned: list[Any], trained: list[Any]
) -> None:
    done = run(*TINY, "--price-per-hour", "2.5")
    assert done.code == 0, done.err
    assert done.out.splitlines() == ["model:       small", "             indeed", "warning: no room."]
    assert planned[0][0].hidden_size == 32
    assert planned[0][1:] == (2.5, False, None)
    assert trained == []


def test_json_is_all_there_is_on_standard_output(run: Command, planned: list[Any]) -> None:
    done = run(*TINY, "--json")
    assert json.loads(done.out) == {"parameters": 1}
    assert planned[0][2] is True


@pytest.mark.parametrize(
    "args",
    [("--json",), ("--price-per-hour", "1"), ("--num-processes", "8"), ("--nodes", "2")],
)
def test_options_of_a_plan_are_refused_without_it(run: Command, trained: list[Any], args: Any) -> None:
    done = run("pretrain", "--hidden-size", "32", *args)
    assert done.code == 2
    assert "--plan" in done.err
    assert trained == []


def test_more_gpus_may_be_asked_for_as_of_accelerate(run: Command, planned: list[Any]) -> None:
    args = ("--num_processes", "64", "--num_machines", "4", "--network-bandwidth", "800")
    assert run(*TINY, *args).code == 0
    assert run(*TINY, "--num-processes", "64", "--nodes", "4", "--network-bandwidth", "800").code == 0
    assert planned[0][3] == planned[1][3] == ScaleRequest(64, 4, 800.0)


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (("--nodes", "2"), "--nodes and --network-bandwidth need --num-processes"),
        (("--num-processes", "0"), "--num-processes"),
        (("--num-processes", "16", "--network-bandwidth", "nan"), "--network-bandwidth nan is not"),
        (("--num-processes", "16", "--network-bandwidth", "0"), "--network-bandwidth 0 is not"),
    ],
)
def test_what_is_no_number_of_gpus_is_refused(
    run: Command, planned: list[Any], args: tuple[str, ...], problem: str
) -> None:
    done = run(*TINY, *args)
    assert (done.code, planned) == (2, [])
    assert problem in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize("price", ["-1", "nan", "inf", "abc"])
def test_what_is_no_price_is_refused_before_anything_is_measured(
    run: Command, planned: list[Any], price: str
) -> None:
    done = run(*TINY, f"--price-per-hour={price}")
    assert (done.code, done.out, planned) == (2, "", [])
    assert "--price-per-hour" in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.alone
@pytest.mark.slow
def test_two_processes_make_one_plan(tmp_path: Path) -> None:
    # Processes never take the same time; here one believes to take three times as long.
    code = """import os, sys, time, types, minimind.planning.benchmark
from minimind_cli.app import main
if os.environ["RANK"] == "1":
    minimind.planning.benchmark.time = types.SimpleNamespace(perf_counter=lambda: 3 * time.perf_counter())
main(sys.argv[1:])"""
    args = [*TINY, "--json", "--cache-dir", str(tmp_path / "cache"), "--output-dir", str(tmp_path / "out")]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *("--no_python", sys.executable, "-c", code, *args),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["processes"], plan["measured"]["processes"]) == (2, 2)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def budgets(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Put a fake choice in place of the real one; the list holds the configurations it was asked for."""
    configs: list[Any] = []

    def plan_budget(config: Any, *, quiet: bool) -> SimpleNamespace:
        configs.append(config)
        return SimpleNamespace(
            rows=lambda: [("model", "small")],
            to_dict=lambda: {"seconds": 1800},
            problems=("the disk is full",),
        )

    fake = SimpleNamespace(plan_budget=plan_budget)
    monkeypatch.setitem(sys.modules, "minimind.planning.budget", fake)  # type: ignore[arg-type]
    return configs


def test_the_plan_of_a_budget_is_its_choice(run: Command, budgets: list[Any], trained: list[Any]) -> None:
    done = run("pretrain", "--budget", "30m", "--plan", "--max_seq_len", "512")
    assert done.code == 0, done.err
    assert done.out == "model:       small\nwarning: the disk is full\n"
    assert "--preset tiny" not in done.err
    assert budgets[0].budget_keeps == ("max_seq_len",)
    assert json.loads(run("pretrain", "--budget", "$3 at $2/h", "--plan", "--json").out) == {"seconds": 1800}
    assert trained == []


def test_the_price_of_a_budget_is_part_of_it(run: Command, budgets: list[Any]) -> None:
    done = run("pretrain", "--budget", "30m", "--plan", "--price-per-hour", "2")
    assert done.code == 2
    assert "$3 at $2.50/h" in done.err
    done = run("pretrain", "--budget", "30m", "--plan", "--num-processes", "2")
    assert done.code == 2
    assert "does not go with --budget" in done.err
    assert not budgets


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (("--budget", "soon"), "--budget 'soon' is not a budget such as 30m, 2h"),
        (("--budget", "30m", "--max-steps", "9"), "--budget and --max-steps both set the length of the run"),
        (("--budget-keeps", "epochs"), "--budget-keeps needs --budget"),
    ],
)
def test_a_contradictory_budget_is_refused(run: Command, args: tuple[str, ...], problem: str) -> None:
    done = run("pretrain", *args)
    assert done.code == 2
    assert problem in done.err
