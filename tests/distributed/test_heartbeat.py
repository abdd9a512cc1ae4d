"""Heartbeats over the launcher's store; the watchdog ends a blocked process when another is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import distributed as dist

import minimind.distributed.heartbeat as module
from minimind.distributed.failures import watch_peers
from minimind.distributed.heartbeat import (
    Heartbeat,
    first_choice,
    format_error,
    launcher_store,
    post_error,
    record_start,
    started_before,
    watchdog,
)
from minimind.distributed.main_process_first import main_process_first
from minimind.distributed.shutdown import StopRequest
from minimind.errors import DataError, RankError

PREFIX = "minimind/test"


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """A launcher's store, and frequent heartbeats."""
    kept = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(kept.port))
    monkeypatch.setattr(module, "INTERVAL_SECONDS", 0.05)
    return kept


def soon(holds: Callable[[], object]) -> bool:
    deadline = time.monotonic() + 10
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_only_a_process_that_ends_misses_heartbeats() -> None:
    with Heartbeat(PREFIX, 0, 3) as ours, Heartbeat(PREFIX, 1, 3):
        with Heartbeat(PREFIX, 2, 3):
            time.sleep(1.2)
            assert ours.missed(1.0) == []
        assert soon(lambda: ours.missed(0.5) == [2])
    assert ours.failed() == {}


def test_heartbeats_of_earlier_processes_do_not_count(store: dist.TCPStore) -> None:
    store.add(f"{PREFIX}/heartbeat/1", 1000)
    with Heartbeat(PREFIX, 0, 2) as ours:
        assert soon(lambda: ours.missed(0.5) == [1])


def test_all_heartbeats_are_missed_without_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "1")
    with Heartbeat(PREFIX, 1, 3) as ours:
        assert soon(lambda: ours.missed(0.3) == [0, 2])


def test_posted_errors_are_read_and_lost_connections_are_no_errors() -> None:
    with Heartbeat(PREFIX, 0, 3) as ours:
        post_error(PREFIX, 1, format_error(ValueError("a fault\nwith details")))
        post_error(PREFIX, 2, "")
        assert soon(lambda: ours.failed() == {1: "ValueError: a fault"})
        assert ours.failed(seconds=60) == {}


def test_waiting_lasts_while_the_other_sends_heartbeats() -> None:
    with Heartbeat(PREFIX, 0, 2) as ours, Heartbeat(PREFIX, 1, 2):
        # The timeout is far shorter than the wait.
        threading.Timer(2.0, lambda: launcher_store().set("done", "here")).start()
        assert ours.wait_for("done", [1], timeout=1.0) == b"here"


def test_waiting_ends_when_the_awaited_process_is_lost() -> None:
    with Heartbeat(PREFIX, 0, 3) as ours:
        with pytest.raises(RankError, match=r"^rank 2 no longer answers.*; rank 0 stopped\.$"):
            ours.wait_for("done", [2], timeout=0.3)
        post_error(PREFIX, 1, "DataError: no text")
        with pytest.raises(RankError, match=r"^rank 1 failed with DataError: no text; rank 0"):
            ours.wait_for("done", [2], timeout=60)


def watched(heartbeat: Heartbeat, timeout: float, *, shutting_down: bool = False, grace: float = 0.2) -> str:
    """Return what a watchdog reports within a second, empty for nothing."""
    said: list[str] = []
    module = "minimind.distributed.heartbeat"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{module}.GRACE_SECONDS", grace)
        patch.setattr(f"{module}.SHUTDOWN_SECONDS", 0.3)
        with watchdog(heartbeat, timeout, said.append, shutting_down=lambda: shutting_down):
            time.sleep(1.0)
    return "".join(said)


def test_the_watchdog_ends_a_process_whose_peer_is_lost() -> None:
    with Heartbeat(PREFIX, 0, 2) as ours:
        assert watched(ours, 0.4).startswith("rank 1 no longer answers: it was killed")


def test_the_watchdog_waits_less_during_shutdown() -> None:
    with Heartbeat(PREFIX, 0, 2) as ours:
        assert watched(ours, 60.0) == ""
        assert watched(ours, 60.0, shutting_down=True).startswith("rank 1 no longer answers")


def test_the_watchdog_lets_the_main_thread_report_first() -> None:
    with Heartbeat(PREFIX, 0, 2) as ours, Heartbeat(PREFIX, 1, 2):
        post_error(PREFIX, 1, "ValueError: a fault")
        assert watched(ours, 60.0, grace=30.0) == ""
        assert watched(ours, 60.0) == "rank 1 failed with ValueError: a fault; rank 0 stopped."


def test_the_watchdog_reports_nothing_while_all_heartbeats_arrive() -> None:
    with Heartbeat(PREFIX, 0, 2) as ours, Heartbeat(PREFIX, 1, 2):
        assert watched(ours, 0.9) == ""


@pytest.mark.parametrize("killed", [False, True])
def test_without_a_launcher_missing_heartbeats_do_not_end_a_process_that_saves(
    monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    ended: list[int] = []
    monkeypatch.setattr("os._exit", ended.append)
    monkeypatch.setattr("minimind.distributed.heartbeat.SHUTDOWN_SECONDS", 0.3)
    accelerator: Any = SimpleNamespace(num_processes=2, process_index=0, is_main_process=True)
    stop = StopRequest()
    with watch_peers(accelerator, PREFIX, 60.0, stop, lambda: None):
        if killed:
            stop.launcher_lost()
        else:
            stop.request("SIGTERM")
        time.sleep(1.5)
    assert ended == ([] if killed else [1])


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
            pytest.fail("it did not wait for the main process")


def test_a_process_tells_when_its_data_is_prepared_and_waits_for_that_of_the_others(
    machines: Callable[[int], None], store: dist.TCPStore, tmp_path: Path
) -> None:
    machines(0)
    launcher_store(1.0).set("minimind/test/data/done/1", "")
    with main_process_first(tmp_path, 60.0, print):
        assert not launcher_store(1.0).check(["minimind/test/data/done/0"])
    assert launcher_store(1.0).check(["minimind/test/data/done/0"])


def test_others_read_why_a_process_failed_before_its_launcher_ends(
    machines: Callable[[int], None], tmp_path: Path
) -> None:
    machines(0)
    with Heartbeat("minimind/test/data", 1, 2) as others:
        with pytest.raises(DataError), main_process_first(tmp_path, 60.0, print):
            raise DataError("--data holds no text.")
        assert others.failed() == {0: "DataError: --data holds no text"}


def test_restarted_processes_know_whether_earlier_ones_started_the_run(
    machines: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machines(0)
    assert not started_before()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    # Those before were refused.
    assert not started_before()
    record_start()
    assert started_before()
    # A launcher that keeps no store cannot tell.
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    assert started_before()


def test_processes_use_the_choice_of_the_first_one(
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


def test_a_key_that_exists_is_read_although_its_writer_is_lost(store: dist.TCPStore) -> None:
    store.set("done", "here")
    with Heartbeat(PREFIX, 0, 2) as ours:
        assert soon(lambda: ours.missed(0.1) == [1])
        assert ours.wait_for("done", [1], timeout=0.1) == b"here"
