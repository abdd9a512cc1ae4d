"""Signals, the time limit and the end of the launcher request a stop; a second signal exits at once."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time

import pytest

from minimind.distributed import launcher
from minimind.distributed.shutdown import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_is_recorded_and_handlers_are_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        assert stop.reason == number.name
    assert signal.getsignal(number) is before


def test_a_second_signal_exits_with_the_shell_s_code() -> None:
    script = (
        "import os, signal, time\n"
        "from minimind.distributed.shutdown import StopRequest\n"
        "with StopRequest():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('noted', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(20)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=15)
    assert (done.stdout, done.returncode) == ("noted\n", 128 + signal.SIGTERM)


def test_a_signal_forwarded_by_the_launcher_is_not_a_second_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    now = [0.0]
    with StopRequest(clock=lambda: now[0]):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert left == []
        now[0] = 10.0
        os.kill(os.getpid(), signal.SIGINT)
    assert left == [128 + signal.SIGINT]


def test_the_default_handlers_end_the_process_at_once() -> None:
    script = (
        "import os, signal\n"
        "from minimind.distributed.shutdown import StopRequest\n"
        "with StopRequest() as stop:\n"
        "    with stop.default_handlers():\n"
        "        pass\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(stop.reason, flush=True)\n"
        "    try:\n"
        "        with stop.default_handlers():\n"
        "            print('unreachable')\n"
        "    except KeyboardInterrupt:\n"
        "        print('ended', flush=True)\n"
        "with StopRequest() as stop, stop.default_handlers():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('unreachable')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=15)
    assert (done.stdout, done.returncode) == ("SIGTERM\nended\n", -signal.SIGTERM)


def test_the_time_limit_counts_from_the_start_given() -> None:
    now = [100.0]
    stop = StopRequest(60, started=90.0, clock=lambda: now[0])
    assert stop.reason is None
    assert stop.seconds_left() == 50.0
    now[0] = 150.0
    assert stop.reason == "--max-time"


def test_the_end_of_the_launcher_is_a_request_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setattr(launcher, "PARENT_SECONDS", 0.01)
    stop = StopRequest()
    with launcher.watch_launcher(stop):
        time.sleep(0.2)
        assert stop.reason is None
        monkeypatch.setattr(os, "getppid", lambda: 1)
        deadline = time.monotonic() + 10
        while stop.reason is None and time.monotonic() < deadline:
            time.sleep(0.01)
    assert stop.reason == "the end of its launcher"
    with pytest.raises(KeyboardInterrupt):
        stop.exit_if_signalled()


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_a_process_without_a_launcher_survives_its_parent(
    monkeypatch: pytest.MonkeyPatch, precision: str | None
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if precision is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    before = threading.active_count()
    with launcher.watch_launcher(StopRequest()):
        assert threading.active_count() == before


def test_a_signal_is_answered_at_once_and_once() -> None:
    shown: queue.Queue[str] = queue.Queue()
    with StopRequest() as stop, stop.announced(shown.put):
        os.kill(os.getpid(), signal.SIGINT)
        sentence = "Stopping after this step and saving; press Ctrl-C again to quit without saving."
        assert shown.get(timeout=5) == sentence
    with StopRequest() as stop, stop.announced(shown.put):
        pass
    assert shown.empty()
    assert "signals" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_signal_after_the_last_step_is_not_announced() -> None:
    shown: list[str] = []
    with StopRequest() as stop, stop.announced(shown.append):
        stop.finish()
        signal.raise_signal(signal.SIGTERM)
        assert stop.reason == "SIGTERM"
    assert shown == []


def test_other_threads_do_not_set_handlers() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with StopRequest() as stop:
            seen.append((signal.getsignal(signal.SIGTERM), stop.reason))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, None)]
