"""`--batch-size auto`: the search, what is remembered, and a run whose micro-batch was measured."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minimind.training.auto_batch_size as module
from minimind.config.options import PretrainConfig
from minimind.distributed.accelerator import start_accelerator
from minimind.errors import ConfigError
from minimind.runs.verify_resume import verify_resume
from minimind.tokenizer import load_tokenizer
from minimind.training.auto_batch_size import (
    FILE,
    SpeedTrial,
    load_size,
    resolve_batch_size,
    search_upwards,
    store_size,
)
from minimind.training.build_model import resolve_model_config
from support import topologies
from support.compiling import compile_blocks_without_inductor
from support.tiny_runs import pretrain_as_command as pretrain
from support.tiny_runs import reports, tiny, write_corpus

SIZES = [1, 2, 4, 8, 16, 32, 64]


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    topologies.forget_accelerator()
    yield
    topologies.forget_accelerator()


def searched(seconds: dict[int, float], first: int, *, look_below: bool = False) -> list[int]:
    """Return the sizes measured, in order; sizes without a time do not fit."""
    order: list[int] = []

    def measure(size: int) -> float:
        order.append(size)
        return seconds.get(size, math.inf)

    found = search_upwards(SIZES, first, measure, look_below=look_below)
    assert list(found) == order
    assert found == {size: seconds.get(size, math.inf) for size in order}
    return order


def test_the_search_goes_up_while_that_saves_time() -> None:
    assert searched({8: 1.0, 16: 0.8, 32: 0.7, 64: 0.69}, 8) == [8, 16, 32, 64]
    assert searched({8: 1.0, 16: 0.99, 32: 0.1}, 8) == [8, 16]


def test_the_search_ends_at_the_memory_of_the_device() -> None:
    assert searched({8: 1.0, 16: 0.8}, 8) == [8, 16, 32]


def test_what_does_not_fit_at_first_is_halved_until_it_does() -> None:
    assert searched({1: 1.0, 2: 0.9}, 32) == [32, 16, 8, 4, 2]
    assert searched({}, 8) == [8, 4, 2, 1]


def test_smaller_ones_are_tried_where_measuring_is_cheap() -> None:
    assert searched({2: 0.9, 4: 0.8, 8: 1.0, 16: 1.1}, 8, look_below=True) == [8, 16, 4, 2]
    assert searched({8: 1.0, 16: 0.8, 32: 0.8}, 8, look_below=True) == [8, 16, 32]


def test_no_further_one_is_tried_without_time_for_it() -> None:
    found = search_upwards(SIZES, 8, lambda size: 1 / size, look_below=False, time_for=lambda size: size < 32)
    assert list(found) == [8, 16]


@given(st.lists(st.floats(0.1, 10) | st.just(math.inf), min_size=7, max_size=7), st.sampled_from(SIZES))
def test_the_search_measures_nothing_twice_and_finds_a_size_that_fits(times: Any, first: int) -> None:
    by_size = dict(zip(SIZES, times, strict=True))
    order = searched(by_size, first, look_below=True)
    assert len(order) == len(set(order))
    if all(math.isinf(by_size[size]) for size in order):
        assert order[: SIZES.index(first) + 1] == SIZES[SIZES.index(first) :: -1]


def test_a_size_is_remembered_for_the_same_facts_only(tmp_path: Path) -> None:
    file = tmp_path / "cache" / FILE
    facts = {"devices": ["A"], "rows": 32}
    assert load_size(file, facts) is None
    store_size(file, facts, 8)
    store_size(file, {**facts, "devices": ["B"]}, 16)
    assert load_size(file, facts) == 8
    assert load_size(file, {**facts, "devices": ["B"]}) == 16
    assert load_size(file, {**facts, "rows": 64}) is None


@pytest.mark.parametrize("content", ["", "[1]", '{"a": '])
def test_a_damaged_memory_is_none_and_is_replaced(tmp_path: Path, content: str) -> None:
    file = tmp_path / FILE
    file.write_text(content)
    assert load_size(file, {"rows": 8}) is None
    store_size(file, {"rows": 8}, 4)
    assert load_size(file, {"rows": 8}) == 4


def test_a_size_that_does_not_make_up_the_step_is_not_taken(tmp_path: Path) -> None:
    store_size(tmp_path / FILE, {"rows": 8}, 3)
    assert load_size(tmp_path / FILE, {"rows": 8}) is None


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store_size(tmp_path / "file" / FILE, {"rows": 8}, 4)


def resolve(folder: Path, **changes: Any) -> tuple[PretrainConfig, list[str]]:
    """Resolve `--batch-size auto` of a tiny run; returns its configuration and the sentences printed."""
    base = tiny(write_corpus(folder / "corpus.jsonl"), folder / "out", accumulation_steps=None)
    config = dataclasses.replace(base, **{"batch_size": "auto", "global_batch_size": 8, **changes})
    config, model_config = resolve_model_config(config, load_tokenizer(None))
    printed: list[str] = []
    accelerator = start_accelerator(config)
    return resolve_batch_size(config, model_config, accelerator, printed.append), printed


def test_a_number_is_left_as_it_is(tmp_path: Path) -> None:
    config, said = resolve(tmp_path, batch_size=4)
    assert (config.batch_size, config.global_batch_size, said) == (4, 8, [])


def test_the_fastest_one_is_taken_and_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {1: 3.0, 2: 3.0, 4: 3.5, 8: math.inf}  # of a micro-batch: 4 sequences are the fastest
    monkeypatch.setattr(SpeedTrial, "seconds", lambda self, size: times[size])
    config, (sentence,) = resolve(tmp_path)
    assert (config.batch_size, config.global_batch_size, config.accumulation_steps) == (4, 8, None)
    assert sentence.startswith(
        "--batch-size auto: 4 sequences x accumulation 2 (tokens/s of one process measured:"
    )
    assert "8: too large" in sentence
    monkeypatch.setattr(SpeedTrial, "seconds", None)
    again, (sentence,) = resolve(tmp_path)
    assert again.batch_size == 4
    assert sentence == "--batch-size auto: 4 sequences x accumulation 2 (as measured before)."


def test_a_device_without_room_for_a_sequence_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SpeedTrial, "seconds", lambda self, size: math.inf)
    with pytest.raises(ConfigError, match=r"not even 1 sequence of --max-seq-len 32 fits"):
        resolve(tmp_path)


def test_the_device_running_out_of_memory_is_a_size_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(self: SpeedTrial, size: int) -> float:
        if size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return 1.0

    monkeypatch.setattr(SpeedTrial, "_seconds", measured)
    config, _ = resolve(tmp_path)
    assert config.batch_size == 2


@pytest.mark.slow
def test_more_sizes_than_dynamo_recompiles_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_blocks_without_inductor(monkeypatch)
    monkeypatch.setattr(
        module, "search_upwards", lambda sizes, first, measure, **_: {size: measure(size) for size in sizes}
    )
    with torch._dynamo.config.patch(recompile_limit=2):
        _, (sentence,) = resolve(tmp_path, compile=True)
    assert all(f" {size}: " in sentence for size in (1, 2, 4, 8)), sentence
    assert "too large" not in sentence


def test_other_errors_are_not_treated_as_a_lack_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: SpeedTrial, size: int) -> float:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(SpeedTrial, "_seconds", failing)
    with pytest.raises(RuntimeError, match="illegal memory"):
        resolve(tmp_path)


def test_a_run_measures_trains_the_same_and_keeps_its_step_when_resumed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    plain = tiny(corpus, tmp_path / "plain", max_steps=4, dropout=0.0)
    pretrain(plain)
    auto = dataclasses.replace(
        plain,
        batch_size="auto",
        accumulation_steps=None,
        global_batch_size=8,
        output_dir=str(tmp_path / "auto"),
    )
    # A real measurement whose result does not depend on the machine.
    monkeypatch.setattr(module, "search_upwards", lambda sizes, first, measure, **_: {2: measure(2)})
    pretrain(auto)
    assert "--batch-size auto: 2 sequences x accumulation 4" in capfd.readouterr().out
    # The look before the first step is at one micro-batch, whose sequences are fewer.
    ours, theirs = (reports(tmp_path / name)[1:] for name in ("auto", "plain"))
    assert [line.get("digest") for line in ours] == [line.get("digest") for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        key = "loss" if "loss" in mine else "val_loss"
        assert mine[key] == pytest.approx(other[key], rel=1e-5)
    written = (tmp_path / "auto" / "config.toml").read_text()
    assert 'batch_size = "auto"' in written
    assert "global_batch_size = 8" in written
    (known,) = json.loads((tmp_path / "cache" / FILE).read_text().replace("\n", "")).values()
    assert known == 2


def test_verify_resume_takes_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpeedTrial, "seconds", lambda self, size: 1.0)
    config = tiny(write_corpus(tmp_path / "corpus.jsonl"), tmp_path / "out", accumulation_steps=None)
    auto = dataclasses.replace(config, batch_size="auto", global_batch_size=8)
    assert verify_resume(auto, 2).first_difference is None


def test_a_measurement_leaves_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(2, 1)

    def out_of_memory(self: SpeedTrial, size: int) -> float:
        model(torch.ones(size, 2)).sum().backward()
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(SpeedTrial, "_seconds", out_of_memory)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config: Any = PretrainConfig()
    trial = SpeedTrial(config, config, start_accelerator(config), model, optimizer, compiled=False)
    assert trial.seconds(4) == math.inf
    assert [parameter.grad for parameter in model.parameters()] == [None, None]
