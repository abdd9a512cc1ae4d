"""Processes hear of each other through the launcher's store; a stuck one ends when another is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import distributed as dist

import minimind.distributed.heartbeat as module
from minimind.distributed.heartbeat import (
    Heartbeat,
    Watchdog,
    begun_before,
    first_choice,
    format_error,
    launcher_store,
    note_begun,
    post_error,
)
from minimind.distributed.main_process_first import main_process_first
from minimind.errors import DataError, RankError

PLACE = "minimind/test"


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """The store that a launcher keeps, and quick beats."""
    kept = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(kept.port))
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.05)
    return kept


def soon(holds: Callable[[], object]) -> bool:
    deadline = time.monotonic() + 10
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_a_process_that_goes_falls_silent_and_the_others_do_not() -> None:
    with Heartbeat(PLACE, 0, 3) as ours, Heartbeat(PLACE, 1, 3):
        with Heartbeat(PLACE, 2, 3):
            time.sleep(1.2)
            assert ours.silent(1.0) == []
        assert soon(lambda: ours.silent(0.5) == [2])
    assert ours.failed() == {}


def test_beats_of_earlier_processes_are_not_taken_for_life(store: dist.TCPStore) -> None:
    store.add(f"{PLACE}/beat/1", 1000)
    with Heartbeat(PLACE, 0, 2) as ours:
        assert soon(lambda: ours.silent(0.5) == [1])


def test_everyone_is_silent_where_the_store_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "1")
    with Heartbeat(PLACE, 1, 3) as ours:
        assert soon(lambda: ours.silent(0.3) == [0, 2])


def test_a_reason_is_heard_and_lost_touch_is_none() -> None:
    with Heartbeat(PLACE, 0, 3) as ours:
        post_error(PLACE, 1, format_error(ValueError("a fault\nwith details")))
        post_error(PLACE, 2, "")
        assert soon(lambda: ours.failed() == {1: "ValueError: a fault"})
        assert ours.failed(seconds=60) == {}


def test_waiting_lasts_as_long_as_the_other_lives() -> None:
    with Heartbeat(PLACE, 0, 2) as ours, Heartbeat(PLACE, 1, 2):
        # The patience is far shorter than what is waited for.
        threading.Timer(2.0, lambda: launcher_store().set("done", "here")).start()
        assert ours.wait_for("done", [1], patience=1.0) == b"here"


def test_waiting_ends_with_the_one_that_is_waited_for() -> None:
    with Heartbeat(PLACE, 0, 3) as ours:
        with pytest.raises(RankError, match=r"^rank 2 no longer answers.*; rank 0 went on no further\.$"):
            ours.wait_for("done", [2], patience=0.3)
        post_error(PLACE, 1, "DataError: no text")
        with pytest.raises(RankError, match=r"^rank 1 failed with DataError: no text; rank 0"):
            ours.wait_for("done", [2], patience=60)


def watched(roll: Heartbeat, patience: float, *, shutting_down: bool = False, grace: float = 0.2) -> str:
    """What a watch says within a second, and an empty text where it says nothing."""
    said: list[str] = []
    watch = Watchdog(roll, patience, said.append, shutting_down=lambda: shutting_down)
    watch.GRACE_SECONDS, watch.HURRY_SECONDS = grace, 0.3
    with watch:
        time.sleep(1.0)
    return "".join(said)


def test_a_watch_ends_a_process_whose_peer_is_lost() -> None:
    with Heartbeat(PLACE, 0, 2) as ours:
        assert watched(ours, 0.4).startswith("rank 1 no longer answers: it was killed")


def test_a_watch_waits_less_for_others_when_asked_to_stop() -> None:
    with Heartbeat(PLACE, 0, 2) as ours:
        assert watched(ours, 60.0) == ""
        assert watched(ours, 60.0, shutting_down=True).startswith("rank 1 no longer answers")


def test_a_watch_gives_the_main_thread_time_to_speak_first() -> None:
    with Heartbeat(PLACE, 0, 2) as ours, Heartbeat(PLACE, 1, 2):
        post_error(PLACE, 1, "ValueError: a fault")
        assert watched(ours, 60.0, grace=30.0) == ""
        assert watched(ours, 60.0) == "rank 1 failed with ValueError: a fault; rank 0 went on no further."


def test_a_watch_is_quiet_while_all_is_well() -> None:
    with Heartbeat(PLACE, 0, 2) as ours, Heartbeat(PLACE, 1, 2):
        assert watched(ours, 0.9) == ""


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make this process the one of a rank, of two machines."""
    for name, value in {
        "WORLD_SIZE": "2",
        "GROUP_WORLD_SIZE": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "test",
    }.items():
        monkeypatch.setenv(name, value)
    return lambda rank: monkeypatch.setenv("RANK", str(rank))


def test_a_main_process_that_fails_to_prepare_ends_the_others(
    machines: Callable[[int], None], tmp_path: Path
) -> None:
    machines(0)
    with pytest.raises(DataError):
        with main_process_first(tmp_path, 60.0, print):
            raise DataError("--data holds no text.")
    machines(1)
    with pytest.raises(RankError, match=r"^rank 0 failed with DataError: --data holds no text; rank"):
        with main_process_first(tmp_path, 60.0, print):
            pytest.fail("it was not its turn")


def test_others_hear_why_a_process_failed_before_the_store_goes_with_its_launcher(
    machines: Callable[[int], None], tmp_path: Path
) -> None:
    machines(0)
    with Heartbeat("minimind/test/data", 1, 2) as others:
        with pytest.raises(DataError), main_process_first(tmp_path, 60.0, print):
            raise DataError("--data holds no text.")
        assert others.failed() == {0: "DataError: --data holds no text"}


def test_a_launch_knows_whether_its_earlier_processes_began_the_run(
    machines: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machines(0)
    assert not begun_before()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    # Those before were refused.
    assert not begun_before()
    note_begun()
    assert begun_before()
    # A launcher that keeps no store cannot tell.
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    assert begun_before()


def test_processes_keep_to_what_the_first_one_chose(
    machines: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machines(1)
    assert first_choice("step", "8") == "8"
    machines(0)
    assert (first_choice("step", "9"), first_choice("other", "9")) == ("8", "9")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert first_choice("step", "10") == "10"


def test_one_machine_waits_for_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MASTER_PORT", "1")
    with main_process_first(tmp_path, 0.1, print):
        pass
    assert not list(tmp_path.iterdir())
