"""What a person sees, in a terminal and in a pipe."""

from __future__ import annotations

import io
import math
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from rich.console import Console

import minimind.tracking.console as module
from minimind.formatting import count, duration, paint
from minimind.launch_env import resume_command
from minimind.tracking.console import Progress
from minimind.training.summary import PretrainResult, summary_rows

REPORT = {
    "loss": 3.21,
    "learning_rate": 5e-4,
    "tokens_per_second": 123_456.0,
    "mfu": 0.41,
    "memory_gb": 5.2,
    "eta_seconds": 192.0,
    "grad_norm": 1.0,
}
LINE = "step 100/2000 | loss 3.2100 | lr 5.0e-04 | 123k tok/s | mfu 41% | 5.2 GB | eta 3m12s"
EVALUATION = {"val_loss": 3.1, "val_perplexity": 22.2, "val_bits_per_byte": 1.25, "val_tokens": 5}


class Terminal(io.StringIO):
    """A stream that says it is a terminal; `text` is what was written without control sequences."""

    def isatty(self) -> bool:
        return True

    def text(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "\n", self.getvalue())


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def test_a_terminal_that_wants_no_colours_gets_none(terminal, monkeypatch):
    Progress(10, stream=terminal).warn("look")
    assert "\x1b[33m" in terminal.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal()
    Progress(10, stream=plain).warn("look")
    assert plain.getvalue() == "warning: look\n"


def test_pipe_gets_a_plain_line_for_each_report():
    out = io.StringIO()
    progress = Progress(2000, stream=out)
    progress.step(100, REPORT)
    progress.evaluation(100, EVALUATION)
    progress.warn("step 7: the gradient is not finite")
    progress.note("the model is in out/model")
    progress.close()
    assert out.getvalue().splitlines() == [
        LINE,
        "step 100/2000 | val loss 3.1000 | perplexity 22.2 | 1.2500 bits/byte",
        "warning: step 7: the gradient is not finite",
        "the model is in out/model",
    ]


def test_what_is_not_known_is_skipped():
    out = io.StringIO()
    Progress(2000, stream=out).step(1, {"loss": float("nan"), "memory_gb": 1.0})
    assert out.getvalue() == "step 1/2000 | loss nan | 1.0 GB\n"


def test_banner_and_summary_are_aligned():
    out = io.StringIO()
    progress = Progress(10, stream=out)
    progress.banner([("model", "26M parameters"), ("learning rate", "5e-4")])
    progress.summary([("loss", "3.2")])
    assert out.getvalue().splitlines() == [
        "model:         26M parameters",
        "learning rate: 5e-4",
        "",
        "loss: 3.2",
    ]


def test_terminal_shows_one_line_that_is_redrawn_and_taken_away(terminal):
    progress = Progress(2000, stream=terminal)
    progress.step(100, REPORT)
    progress.evaluation(100, EVALUATION)
    progress.step(200, REPORT | {"loss": 3.0})
    progress.summary([("loss", "3.0")])
    lines = [line for line in terminal.text().splitlines() if "step" in line or line.startswith("loss")]
    assert any(line.endswith(LINE) for line in lines)
    assert any("step 200/2000 | loss 3.0000" in line for line in lines)
    # The evaluation and the summary stay; what was drawn last under them was erased.
    assert "step 100/2000 | val loss 3.1000 | perplexity 22.2 | 1.2500 bits/byte" in lines
    assert terminal.getvalue().endswith("\x1b[2K\nloss: 3.0\n")


def test_bar_is_there_before_the_first_report(terminal):
    progress = Progress(stream=terminal)
    progress.start(2000, step=50)
    progress.close()
    assert "step 50/2000" in terminal.text()


def test_time_left_runs_down_between_reports(terminal, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    progress = Progress(2000, stream=terminal)
    progress.step(100, REPORT)
    assert "eta 3m12s" in terminal.text()
    now[0] += 2.0
    # Closing draws once more.
    progress.close()
    assert "eta 3m10s" in terminal.text()


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (50, "step 100/2000 | loss 3.2100 | eta 3m12s"),
        (80, "step 100/2000 | loss 3.2100 | lr 5.0e-04 | 123k tok/s | mfu 41% | eta 3m12s"),
        (120, LINE),
    ],
)
def test_no_line_is_wider_than_the_terminal(terminal, monkeypatch, width, line):
    monkeypatch.setenv("COLUMNS", str(width))
    progress = Progress(stream=terminal)
    progress.start(2000)
    for step in (98, 99, 100):
        progress.advance(step, 3.5)
    progress.banner(
        [("steps", "2,000 of up to 2.05k tokens (micro-batch 16 x accumulation 1 x processes 1)")]
    )
    forecast = {"val_forecast_bits_per_byte": 1.1, "val_forecast_low": 1.0, "val_forecast_high": 1.2}
    progress.step(100, REPORT)
    progress.evaluation(100, EVALUATION | forecast)
    progress.step(100, REPORT | forecast)
    progress.close()
    lines = terminal.text().splitlines()
    assert line in lines
    assert max(map(len, lines)) <= width
    assert any(one.startswith("step 100/2000 | val loss 3.1000") for one in lines)


@pytest.mark.parametrize(("width", "cells"), [(80, 20), (30, 18), (16, 4), (15, 0)])
def test_the_bar_fills_the_line_up_to_20_cells(terminal, monkeypatch, width, cells):
    monkeypatch.setenv("COLUMNS", str(width))
    progress = Progress(stream=terminal)
    progress.start(2000)
    drawn = io.StringIO()
    Console(file=drawn, width=width, force_terminal=True).print(progress._render())
    progress.close()
    assert re.sub(r"\x1b\[[\d;]*m", "", drawn.getvalue()).strip() == ("━" * cells + " step 0/2000").strip()


def test_report_lines_stay_above_the_bar(terminal):
    progress = Progress(2000, stream=terminal)
    progress.step(100, REPORT)
    progress.step(200, REPORT)
    progress.close()
    screen = shown_at_the_end(terminal.getvalue())
    assert screen == [LINE, LINE.replace("step 100", "step 200")]


def shown_at_the_end(written: str) -> list[str]:
    """Return the lines that are left on a screen: carriage returns, erased lines, cursor up."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[a-zA-Z]|\r|\n|[^\x1b\r\n]+", written):
        if part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row == len(lines))
        elif part == "\r":
            column = 0
        elif part.endswith("A"):
            row -= int(part[2:-1])
        elif part.endswith("K"):
            lines[row] = ""
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column] + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines if line.strip()]


def test_the_bar_moves_at_each_step_and_knows_the_time_left_from_the_second(terminal, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    progress = Progress(stream=terminal)
    progress.start(12)
    texts = []
    for step in (1, 2):
        now[0] += 3.0
        progress.advance(step, 5.0 - step)
        texts.append(progress._bar_text(120))
    now[0] += 1.0
    texts.append(progress._bar_text(120))
    progress.close()
    assert texts == [
        "step 1/12 | loss 4.0000",
        "step 2/12 | loss 3.0000 | eta 30s",
        "step 2/12 | loss 3.0000 | eta 29s",
    ]


def test_a_step_writes_nothing_itself(terminal):
    out = io.StringIO()
    progress = Progress(10, stream=out)
    progress.start(10)
    progress.advance(1, 2.0)
    assert out.getvalue() == ""
    progress = Progress(10, stream=terminal)
    progress.start(10)
    progress._bar.stop()  # the thread that draws
    before = terminal.getvalue()
    progress.advance(1, 2.0)
    assert terminal.getvalue() == before


def test_the_cursor_is_never_hidden(terminal):
    progress = Progress(10, stream=terminal)
    progress.step(1, REPORT)
    progress.close()
    assert "\x1b[?25l" not in terminal.getvalue()


class Handle:
    """Stands in for the display handle of IPython."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def update(self, shown, raw) -> None:
        assert raw is True
        self.shown.append(shown["text/html"])


def test_a_notebook_has_a_bar_that_is_updated_in_place_and_lines_as_text(monkeypatch, capsys):
    handles: list[Handle] = []

    def display(shown, raw, display_id):
        assert display_id is True
        handles.append(Handle())
        handles[-1].update(shown, raw)
        return handles[-1]

    ipython = ModuleType("IPython")
    ipython.get_ipython = lambda: SimpleNamespace(kernel=object())
    ipython.display = ModuleType("IPython.display")
    ipython.display.display = display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", ipython.display)
    now = [100.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    progress = Progress(10)
    progress.start(10)
    for step in range(1, 5):
        now[0] += 0.2  # twice as often as it is drawn
        progress.advance(step, 2.0)
    progress.step(4, {"loss": 2.0})
    progress.warn("<look>")
    progress.close()
    (handle,) = handles
    assert [re.findall('value="([^"]+)"', shown) for shown in handle.shown] == [
        ["0.0000"], ["0.2000"], ["0.4000"], [],
    ]  # fmt: skip
    assert "step 2/10 | loss 2.0000" in handle.shown[1]
    assert capsys.readouterr().out == "step 4/10 | loss 2.0000\nwarning: <look>\n"


def test_ipython_in_a_terminal_is_no_notebook(monkeypatch):
    ipython = SimpleNamespace(get_ipython=lambda: SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    assert module._notebook_display() is None


def test_colours_are_for_terminals_without_no_color(terminal, monkeypatch):
    assert paint("error:", "31", terminal) == "\x1b[31merror:\x1b[0m"
    assert paint("error:", "31", io.StringIO()) == "error:"
    monkeypatch.setenv("NO_COLOR", "1")
    assert paint("error:", "31", terminal) == "error:"


def test_the_command_that_resumes_is_quoted_and_has_the_launcher(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    alone = resume_command(Path("my run"), {"processes": 1, "on_cpu": True})
    assert alone == "minimind-train pretrain --resume --output-dir 'my run'"
    launch = {"processes": 2, "on_cpu": False, "kind": "FSDP2", "machines": 1}
    assert resume_command(Path("out"), launch) == (
        "accelerate launch --use_fsdp --fsdp_version 2 --num_processes 2 -m minimind_cli pretrain --resume "
        "--output-dir out"
    )


def test_what_was_not_measured_is_not_in_the_summary():
    result = PretrainResult(Path("out/model"), 3, 100, math.nan, None, None, 10.0, 1.0, "", "SIGINT")
    rows = dict(summary_rows(result, {}, None, 0))
    assert rows.keys() == {"end", "trained", "speed", "time"}
    assert rows["end"] == "stopped by SIGINT after step 3, checkpoint saved"


def test_dumb_terminal_gets_plain_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    Progress(2000, stream=terminal).step(100, REPORT)
    assert terminal.getvalue() == LINE + "\n"


def test_text_in_brackets_is_not_treated_as_markup(terminal):
    Progress(10, stream=terminal).warn("use 'swanlab[dashboard]'")
    assert "use 'swanlab[dashboard]'" in terminal.text()


def test_data_preparation_in_a_pipe_is_reported_seldom_and_at_its_end():
    out = io.StringIO()
    progress = Progress(stream=out)
    for done in range(0, 4_000_000_001, 40_000_000):
        progress.data_build(done, 4_000_000_000)
    first, last = out.getvalue().splitlines()
    assert first.startswith("preparing data: 0B of 4.00GB")
    assert last == "preparing data: 4.00GB of 4.00GB (100%)"


def test_the_end_of_data_preparation_is_reported_once():
    """What was read last is still being tokenized while no more is read."""
    out = io.StringIO()
    progress = Progress(stream=out)
    for done in (10, 99, 100, 100, 100):
        progress.data_build(done, 100)
    assert out.getvalue().splitlines() == [
        "preparing data: 10B of 100B (10%)",
        "preparing data: 100B of 100B (100%)",
    ]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_data_of_unknown_size_is_reported_in_one_line_without_numbers(terminal, is_terminal):
    out = terminal if is_terminal else io.StringIO()
    progress = Progress(stream=out)
    for _ in range(5):
        progress.data_build(0, 0)
    assert out.getvalue() == "preparing data\n"


def test_data_preparation_in_a_terminal_gives_way_to_training(terminal):
    progress = Progress(2000, stream=terminal)
    progress.data_build(1_000_000, 4_000_000)
    progress.data_build(4_000_000, 4_000_000)
    progress.step(100, REPORT)
    progress.close()
    assert "preparing data: 1.00MB of 4.00MB" in terminal.text()
    assert LINE in terminal.text()


def use(progress: Progress) -> None:
    progress.banner([("model", "small")])
    progress.data_build(1, 2)
    progress.data_build(2, 2)
    progress.step(1, REPORT)
    progress.evaluation(1, EVALUATION)
    progress.warn("w")
    progress.note("n")
    progress.summary([("loss", "1")])


@pytest.mark.parametrize("is_terminal", [False, True])
def test_other_processes_write_nothing(terminal, is_terminal):
    out = terminal if is_terminal else io.StringIO()
    use(Progress(10, enabled=False, stream=out))
    assert out.getvalue() == ""


@pytest.mark.parametrize("is_terminal", [False, True])
def test_closed_output_does_not_stop_a_run(terminal, is_terminal):
    out = terminal if is_terminal else io.StringIO()
    progress = Progress(10, stream=out)
    progress.step(1, REPORT)
    out.close()
    use(progress)
    use(Progress(10, stream=out))


@pytest.mark.parametrize("is_terminal", [False, True])
def test_reader_that_goes_away_does_not_stop_a_run(terminal, is_terminal):
    class Gone(Terminal):
        def isatty(self) -> bool:
            return is_terminal

        def write(self, text: str) -> int:
            raise BrokenPipeError

    use(Progress(10, stream=Gone()))


@pytest.mark.parametrize("method", ["write", "flush"])
def test_a_stream_that_failed_is_not_used_again(method):
    calls = []

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            calls.append("write")
            raise BrokenPipeError

        def flush(self) -> None:
            calls.append("flush")
            raise ValueError("closed")

    stream = module._ForgivingStream(Gone())
    for _ in range(3):
        getattr(stream, method)(*(["text"] if method == "write" else []))
    assert calls == [method]


def test_process_without_standard_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    use(Progress(10))


@pytest.mark.parametrize("is_terminal", [False, True])
def test_output_in_ascii_replaces_what_it_cannot_show(terminal, is_terminal):
    class Ascii(io.TextIOWrapper):
        def isatty(self) -> bool:
            return is_terminal

    raw = io.BytesIO()
    progress = Progress(10, stream=Ascii(raw, encoding="ascii"))
    progress.note("naïve 模型")
    use(progress)
    assert b"na?ve ??" in raw.getvalue()
    assert b"loss: 1" in raw.getvalue()


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"), (950, "950"), (999.6, "1.00k"), (12_345, "12.3k"), (123_456, "123k"), (999_999, "1.00M"),
        (26_000_000, "26.0M"), (1_250_000_000, "1.25G"), (3e12, "3.00T"),
    ],
)  # fmt: skip
def test_counts_read_well(number, text):
    assert count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (192, "3m12s"), (7500, "2h05m"), (100_800, "1d04h"),
        (float("inf"), "?"), (float("nan"), "?"),
    ],
)  # fmt: skip
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


def test_control_characters_are_escaped():
    """A sample, a path and a warning may contain what others wrote."""
    stream = io.StringIO()
    progress = Progress(stream=stream)
    progress.note("a\x1b[2J")
    progress.warn("b\x9b")
    progress.banner([("data", "c\u202e\nerror: forged")])
    progress.summary([("sample", "d\x0f")])
    assert stream.getvalue() == (
        "a\\x1b[2J\nwarning: b\\x9b\ndata: c\\u202e\\x0aerror: forged\n\nsample: d\\x0f\n"
    )
