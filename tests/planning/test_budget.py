"""A budget from the command to the model: the choice, its screen, the end on time, and resuming."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from minimind import ConfigError, PretrainConfig, pretrain
from minimind.config.budget import BUDGET_OPTIONS
from minimind.planning import budget as budget_module
from minimind.planning.budget import plan_budget
from minimind.planning.text_sample import read_sample
from support.step_clock import StepClock
from support.tiny_runs import last_checkpoint, write_corpus

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_seq_len": 32,
    "batch_size": 4,
    "val_fraction": 0.1,
}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Put fake measurements in place of real ones; the list holds the widths that were measured."""
    widths: list[int] = []

    def measure(config: Any, candidate: Any, accelerator: Any, lengths: list[int]) -> float:
        assert lengths
        widths.append(candidate.shape.hidden_size)
        return 1e-3 * candidate.shape.hidden_size

    monkeypatch.setattr(budget_module, "matmul_flops", lambda device, precision: 1e12)
    monkeypatch.setattr(budget_module, "measure_candidate", measure)
    return widths


def config(tmp_path: Path, budget: str, **options: Any) -> PretrainConfig:
    corpus = tmp_path / "corpus.jsonl"
    if not corpus.exists():
        write_corpus(corpus)
    return PretrainConfig(
        budget=budget,
        data=(str(corpus),),
        cache_dir=str(tmp_path / "cache"),
        output_dir=str(tmp_path / "out"),
        tracker=("none",),
        **options,
    )


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_plan_is_one_screen_and_names_choice_expectation_and_alternatives(
    tmp_path: Path, measured: list[int]
) -> None:
    plan = plan_budget(config(tmp_path, "$1 at $60/h", max_seq_len=64), quiet=True)
    rows = dict(plan.rows())
    assert len(plan.rows()) <= 15
    assert rows["budget"].startswith("$1 at $60/h of training on CPU")
    for key in (
        "model",
        "tokenizer",
        "batch",
        "training",
        "expected",
        "time",
        "memory",
        "why",
        "next best",
        "then",
    ):
        assert rows[key]
    assert rows["kept"] == "--max-seq-len, as set"
    assert plan.config.max_seq_len == 64
    assert plan.config.budget_chooses == ()
    assert plan.config.hidden_size == plan.best.shape.hidden_size == measured[-1]
    assert json.loads(json.dumps(plan.to_dict()))["budget"]["seconds"] == 60
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [1.0, 0.01])
def test_a_run_ends_on_time_with_its_decay_finished_and_forecasts_its_end(
    tmp_path: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch, error: float
) -> None:
    """Also where the machine turns out to be a hundred times slower than measured."""
    monkeypatch.setattr(budget_module, "measure_candidate", lambda *_: 0.1 * error)
    clock = StepClock(monkeypatch, 0.1)
    intervals = {"log_interval": 1, "eval_interval": 30, "eval_batches": 1}
    options = config(tmp_path, "20s", **SMALL, global_batch_size=4, epochs=10_000, **intervals)
    result = pretrain(options)
    # Nothing but steps takes time here: what is reserved for the final model is left.
    assert 18.5 < clock.elapsed <= 19.0
    assert result.stopped is None
    lines = metrics(tmp_path / "out")
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert rates[-1] < 0.01 * max(rates)
    falling = sum(rate < max(rates) for rate in rates[20:])
    assert falling / len(rates) == pytest.approx(0.6, abs=0.05)
    forecasts = [line for line in lines if "val_forecast_bits_per_byte" in line]
    assert len(forecasts) >= 4
    assert all(line["val_forecast_low"] < line["val_forecast_bits_per_byte"] for line in forecasts)
    assert "val_forecast_bits_per_byte" not in [line for line in lines if "val_bits_per_byte" in line][-1]
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()


def test_a_resumed_run_keeps_its_choice_and_counts_the_time_of_all_attempts(
    tmp_path: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = config(tmp_path, "1h", **SMALL, global_batch_size=4, epochs=1)
    clock = StepClock(monkeypatch, 0.1)
    assert pretrain(options, stop_after=5).stopped is not None
    first = last_checkpoint(tmp_path / "out").trainer
    assert first["state"]["budget_seconds"] == pytest.approx(0.5)
    assert first["settings"]["budget"] == "1h"
    assert list(first["settings"]["budget_keeps"]) == list(BUDGET_OPTIONS)
    monkeypatch.setattr(budget_module, "plan_budget", lambda *_, **__: pytest.fail("chose again"))
    clock.elapsed = 0.0
    result = pretrain(dataclasses.replace(options, resume="auto"))
    assert result.stopped is None
    last = last_checkpoint(tmp_path / "out").trainer
    assert last["settings"]["learning_rate"] == first["settings"]["learning_rate"]
    assert last["state"]["budget_seconds"] == pytest.approx(0.1 * result.steps)


def test_tokens_of_a_budget_are_what_the_run_trains_on(tmp_path: Path, measured: list[int]) -> None:
    result = pretrain(config(tmp_path, "2k tokens", **SMALL, global_batch_size=4, epochs=10))
    assert result.tokens == pytest.approx(2000, abs=4 * 32)


@pytest.mark.parametrize("given", [True, False])
def test_the_text_is_measured_with_the_validation_share_of_the_run(
    tmp_path: Path, measured: list[int], *, given: bool
) -> None:
    options = {"val_fraction": 0.25} if given else {}
    plan = plan_budget(config(tmp_path, "60s", **options), quiet=True)
    assert plan.config.val_fraction == (0.25 if given else 0.05)
    whole = read_sample(plan.config).num_bytes
    assert plan.text.num_bytes == pytest.approx((1 - plan.config.val_fraction) * whole)


def test_a_folder_that_holds_a_run_is_refused_before_anything_is_measured_and_a_plan_warns_of_it(
    tmp_path: Path, measured: list[int]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.toml").write_text("")
    with pytest.raises(ConfigError, match="already holds a run"):
        pretrain(config(tmp_path, "1h"))
    assert not measured
    plan = plan_budget(config(tmp_path, "1h"), quiet=True)
    assert measured
    assert ["already holds a run" in problem for problem in plan.problems] == [True]
    assert plan.to_dict()["problems"] == list(plan.problems)
    assert plan_budget(config(tmp_path, "1h", resume="auto"), quiet=True).problems == ()


def test_a_launch_that_would_not_train_together_is_refused_before_anything_is_measured(
    tmp_path: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="mpirun started 4 processes that are not connected"):
        plan_budget(config(tmp_path, "1h"), quiet=True)
    assert not measured


def test_a_budget_chooses_no_custom_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="minimind's own model only"):
        pretrain(config(tmp_path, "1h"), model_factory=lambda model_config: None)  # type: ignore[arg-type, return-value]


def test_a_candidate_is_measured_with_its_real_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_module, "_MEASURE_SECONDS", 0.01)
    monkeypatch.setattr(budget_module, "matmul_flops", lambda device, precision: 1e12)
    plan = plan_budget(config(tmp_path, "60s", **SMALL, global_batch_size=8), quiet=True)
    assert plan.best.measured
    assert 1e-4 < plan.best.step_seconds < 10
    assert (plan.config.batch_size, plan.config.global_batch_size) == (4, 8)
