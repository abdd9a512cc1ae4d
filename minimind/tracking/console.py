"""Console output of a run: a live bar in a terminal or a notebook, plain lines in a pipe or a file."""

from __future__ import annotations

import html
import logging
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..formatting import count, format_evaluation_metrics, format_train_metrics, printable

# Shortest interval between lines about data preparation, in a pipe.
SECONDS_BETWEEN_LINES = 10.0
REDRAWS_PER_SECOND = 4.0
BAR_WIDTH, MIN_BAR_WIDTH = 20, 4
# Values to drop in a narrow terminal, in this order.
DROP_WHEN_NARROW = (
    *("memory_gb", "learning_rate", "mfu", "tokens_per_second"),
    *("val_perplexity", "val_forecast_bits_per_byte", "val_bits_per_byte"),
)

Rows = Sequence[tuple[str, str]]

_log = logging.getLogger("minimind")


class Progress:
    """Shows a run on a stream: permanent lines and, below them, a bar in a terminal or a notebook.

    A thread redraws the bar, so that a step only stores its number. A closed stream or an unencodable
    character never stops a run: output is dropped or replaced.

    Attributes:
        total_steps: steps of the whole run.
        warnings: all warnings shown, oldest first.
    """

    def __init__(
        self, total_steps: int = 0, enabled: bool = True, stream: TextIO | None = None, *, quiet: bool = False
    ) -> None:
        """Write nothing yet.

        Args:
            total_steps: steps of the whole run; `start` may set it later.
            enabled: False on all ranks but one: nothing is written.
            stream: output stream, by default standard output.
            quiet: write nothing; warnings and notes go to the logger `minimind`.
        """
        self.total_steps = total_steps
        self.warnings: list[str] = []
        display = _notebook_display() if enabled and not quiet and stream is None else None
        stream = sys.stdout if stream is None else stream
        shown = enabled and not quiet and stream is not None
        self._stream = _ForgivingStream(stream) if shown else None
        self.quiet = quiet
        self._logs = enabled and quiet
        self._console: Console | None = None
        self._bar: Live | _NotebookBar | None = None
        self._notebook = None if display is None else _NotebookBar(display)
        self._task = ""
        self._done, self._total = 0, 0
        self._values: dict[str, Any] = {}
        # Step and time of the first step seen, and of the last.
        self._first: tuple[int, float] | None = None
        self._last = (0, 0.0)
        self._reported = 0.0
        self._last_line = 0.0
        self._data_done = False
        if self._stream is not None and self._stream.isatty() and display is None:
            console = _VisibleCursorConsole(file=self._stream, highlight=False)  # type: ignore[arg-type]
            # A dumb terminal cannot redraw a line.
            self._console = None if console.is_dumb_terminal else console

    def start(self, total_steps: int, step: int = 0) -> None:
        """Set the length of the run and show the bar before the first step."""
        self.total_steps = total_steps
        self._first, self._values = None, {}
        self._show("train", step, total_steps)

    def advance(self, step: int, loss: float) -> None:
        """Move the bar to a step whose loss has arrived on the host; costs next to nothing."""
        self._last = step, time.monotonic()
        self._first = self._first or self._last
        self._done, self._values["loss"] = step, loss
        if self._notebook is not None and self._bar is self._notebook:
            self._notebook.redraw(self._fraction(), self._bar_text(sys.maxsize))

    def step(self, step: int, values: Mapping[str, Any]) -> None:
        """Show training metrics in a permanent line; the bar counts down the remaining time."""
        self._values, self._reported = dict(values), time.monotonic()
        self._report(step, format_train_metrics, values)
        self._show("train", step, self.total_steps)

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Show the result of an evaluation in a permanent line."""
        self._report(step, format_evaluation_metrics, values)

    def warn(self, text: str) -> None:
        """Show a warning."""
        self.warnings.append(text)
        if self._logs:
            _log.warning(text)
        self._line(f"warning: {text}", style="yellow")

    def note(self, text: str) -> None:
        """Show a sentence."""
        if self._logs:
            _log.info(text)
        self._line(text)

    def banner(self, rows: Rows) -> None:
        """Show a table with one row per key and value."""
        width = max((len(key) for key, _ in rows), default=0) + 2
        for key, value in rows:
            line = f"{key + ':':<{width}}{printable(value)}"
            if self._console is not None and len(line) > self._console.width > 2 * width:
                line = textwrap.fill(
                    line,
                    self._console.width,
                    subsequent_indent=" " * width,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            self._line(line)

    def data_build(self, done: int, total: int) -> None:
        """Show how many bytes of the data are prepared; call it as often as convenient.

        If the total is unknown, `total` is 0, and a single line is shown.
        """
        if self._data_done:
            return
        self._data_done = done >= total
        if not total:
            self._line("preparing data")
        elif self._console is not None or self._notebook is not None:
            self._show("data", done, total)
            if self._data_done:
                self.close()
        elif self._data_done or time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._line(f"preparing data: {count(done)}B of {count(total)}B ({done / total:.0%})")

    def summary(self, rows: Rows) -> None:
        """Remove the bar and show a table of results."""
        self.close()
        self._line("")
        self.banner(rows)

    def close(self) -> None:
        """Remove the bar; safe to repeat. A later report shows it again."""
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.stop()

    def _show(self, task: str, done: int, total: int) -> None:
        """Draw the bar."""
        self._task, self._done, self._total = task, done, total
        if self._notebook is not None:
            self._bar = self._notebook
            self._notebook.redraw(self._fraction(), self._bar_text(sys.maxsize))
        elif self._console is not None and self._bar is None:
            self._bar = Live(
                console=self._console,
                get_renderable=self._render,
                refresh_per_second=REDRAWS_PER_SECOND,
                transient=True,
            )
            self._bar.start(refresh=True)

    def _render(self) -> RenderableType:
        assert self._console is not None
        width = self._console.width
        text = self._bar_text(width)
        bar_width = min(width - len(text) - 1, BAR_WIDTH)
        line = Text(text, no_wrap=True, overflow="crop")
        if bar_width < MIN_BAR_WIDTH:
            return line
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_row(ProgressBar(total=self._total or None, completed=self._done, width=bar_width), line)
        return grid

    def _fraction(self) -> float:
        return self._done / self._total if self._total else 0.0

    def _bar_text(self, width: int) -> str:
        if self._task == "data":
            return f"preparing data: {count(self._done)}B of {count(self._total)}B"
        values = dict(self._values)
        values.pop("eta_seconds", None)
        if (left := self._time_left()) is not None:
            values["eta_seconds"] = left
        room = width if width < 50 else width - MIN_BAR_WIDTH - 1
        return _fitting(f"step {self._done}/{self._total}", format_train_metrics, values, room)

    def _time_left(self) -> float | None:
        """Return the seconds left: by the last report, before it by the steps so far, from the second on."""
        step, at = self._last
        left = self._values.get("eta_seconds")
        if left is not None:
            return max(left - (time.monotonic() - self._reported), 0.0)
        if self._first is None or step <= self._first[0]:
            return None
        per_step = (at - self._first[1]) / (step - self._first[0])
        return max(per_step * (self._total - step) - (time.monotonic() - at), 0.0)

    def _report(
        self, step: int, form: Callable[[Mapping[str, Any]], list[str]], values: Mapping[str, Any]
    ) -> None:
        room = sys.maxsize if self._console is None else self._console.width
        self._line(_fitting(f"step {step}/{self.total_steps}", form, values, room))

    def _line(self, text: str, style: str | None = None) -> None:
        text = printable(text, keep="\n")
        if self._console is not None:
            self._console.print(Text(text, style=style or ""), soft_wrap=True)
        elif self._stream is not None:
            self._stream.write(text + "\n")
            self._stream.flush()


def _fitting(
    head: str, form: Callable[[Mapping[str, Any]], list[str]], values: Mapping[str, Any], room: int
) -> str:
    """Return a line of values that fits into `room` characters, without the less important ones if needed."""
    left = dict(values)
    line = " | ".join([head, *form(left)])
    for name in DROP_WHEN_NARROW:
        if len(line) <= room:
            break
        left.pop(name, None)
        line = " | ".join([head, *form(left)])
    return line


class _VisibleCursorConsole(Console):
    """A console that never hides the cursor, which a killed process could not show again."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


class _NotebookBar:
    """A bar in the output of a notebook cell, redrawn in place; needs IPython only."""

    def __init__(self, display: Callable[..., Any]) -> None:
        self._display = display
        self._handle: Any = None
        self._drawn = 0.0

    def redraw(self, fraction: float, text: str) -> None:
        """Draw the bar, at most a few times per second."""
        now = time.monotonic()
        if self._handle is not None and now - self._drawn < 1 / REDRAWS_PER_SECOND:
            return
        self._drawn = now
        bar = f'<progress value="{fraction:.4f}" style="width:20em;vertical-align:middle"></progress>'
        # For front ends with and without HTML.
        shown = {"text/html": f"{bar} <code>{html.escape(text)}</code>", "text/plain": text}
        if self._handle is None:
            self._handle = self._display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)

    def stop(self) -> None:
        """Remove the bar."""
        if self._handle is not None:
            self._handle.update({"text/html": "", "text/plain": ""}, raw=True)
        self._handle = None


def _notebook_display() -> Callable[..., Any] | None:
    """Return IPython's `display` in the kernel of a notebook, else None; never imports IPython."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None or not hasattr(shell, "kernel"):
        return None
    from IPython.display import display

    return display


class _ForgivingStream:
    """A text stream that accepts any text and ignores a closed reader.

    A closed pipe (`| head`) or terminal must not end a run after hours of training.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._broken = False

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        if not self._broken:
            try:
                try:
                    self._stream.write(text)
                except UnicodeEncodeError:
                    self._stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
            except (OSError, ValueError):  # ValueError: written to after it was closed
                self._broken = True
        return len(text)

    def flush(self) -> None:
        if not self._broken:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._broken = True

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except ValueError:  # closed
            return False

    def fileno(self) -> int:
        return self._stream.fileno()
