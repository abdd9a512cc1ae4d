"""Cyclic garbage collection while it is disabled, and after."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import minimind.training.trainer as module
from minimind.training.garbage_collection import manual_gc
from minimind.training.pretrain import pretrain
from support.tiny_runs import tiny, write_corpus


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def a_cycle() -> weakref.ref[Cycle]:
    return weakref.ref(Cycle())


COUNT = gc.get_freeze_count


@pytest.fixture(autouse=True)
def _collector_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gc, "get_freeze_count", COUNT)
    gc.enable()
    gc.unfreeze()
    yield
    gc.unfreeze()
    gc.enable()


def test_garbage_stays_until_it_is_asked_for() -> None:
    with manual_gc():
        cycle = a_cycle()
        # Many times what makes the collector run by itself.
        objects = [[number] for number in range(100_000)]
        assert cycle() is not None
        gc.collect()
        assert cycle() is None
    assert len(objects) == 100_000


def test_what_was_there_before_is_not_looked_at() -> None:
    before = Cycle()
    with manual_gc():
        assert not any(one is before for one in gc.get_objects())
    assert any(one is before for one in gc.get_objects())


def test_the_collector_is_put_back_after_an_error() -> None:
    def fail() -> None:
        with manual_gc():
            assert not gc.isenabled()
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with manual_gc():
        pass
    assert not gc.isenabled()


def test_objects_that_others_froze_stay_frozen() -> None:
    gc.freeze()
    with manual_gc():
        pass
    assert gc.get_freeze_count() > 0


def test_a_run_trains_without_the_collector_and_gives_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(module, "COLLECT_INTERVAL", 2)
    seen: list[bool] = []
    cycles: list[weakref.ref[Cycle]] = []
    collected: list[tuple[int, int]] = []
    train_step = module.train_step

    def watched(*args: Any, **options: Any) -> Any:
        seen.append(gc.isenabled())
        cycles.append(a_cycle())
        return train_step(*args, **options)

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            collected.append((len(seen), info["generation"]))

    monkeypatch.setattr(module, "train_step", watched)
    gc.callbacks.append(note)
    try:
        pretrain(tiny(write_corpus(tmp_path / "corpus.jsonl"), tmp_path / "out", max_steps=5))
    finally:
        gc.callbacks.remove(note)
    assert seen == [False] * 5
    # The objects that survived an earlier collection are not looked at.
    assert [one for one in collected if 0 < one[0] < 5] == [(2, 1), (4, 1)]
    assert [cycle() is None for cycle in cycles[:4]] == [True] * 4
    assert gc.isenabled()
