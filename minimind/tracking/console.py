"""Console output of a run: a progress bar in a terminal, plain lines in a pipe or a file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task
from rich.progress import Progress as Bar
from rich.text import Text

from ..formatting import count, format_evaluation_metrics, format_train_metrics

# Shortest interval between lines about data preparation, in a pipe.
SECONDS_BETWEEN_LINES = 10.0

BAR_WIDTH = 20
# Values to drop in a narrow terminal, in this order.
DROP_WHEN_NARROW = ("memory_gb", "learning_rate", "mfu", "tokens_per_second")

Rows = Sequence[tuple[str, str]]

_log = logging.getLogger("minimind")


class Progress:
    """Shows a run on a stream; in a terminal, with a progress bar that a thread of rich redraws.

    A closed stream or an unencodable character never stops a run: output is dropped or replaced.
    """

    def __init__(
        self,
        total_steps: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
        *,
        quiet: bool = False,
    ) -> None:
        """Write nothing yet.

        Args:
            total_steps: steps of the whole run; `start` may set it later.
            enabled: False on all ranks but one: nothing is written.
            stream: output stream, by default standard output.
            quiet: write nothing; warnings and notes go to the logger `minimind`.
        """
        self.total_steps = total_steps
        stream = sys.stdout if stream is None else stream
        shown = enabled and not quiet and stream is not None
        self._stream = _ForgivingStream(stream) if shown else None
        self.quiet = quiet
        self._logs = enabled and quiet
        self._console: Console | None = None
        self._bar: Bar | None = None
        self._last_line = 0.0
        self._data_done = False
        if self._stream is not None and self._stream.isatty():
            console = Console(file=self._stream, highlight=False)  # type: ignore[arg-type]
            # A dumb terminal cannot redraw a line.
            self._console = None if console.is_dumb_terminal else console

    def start(self, total_steps: int, step: int = 0) -> None:
        """Set the length of the run and, in a terminal, show the bar before the first report."""
        self.total_steps = total_steps
        if self._console is not None:
            self._show("train", step, total_steps, {})

    def step(self, step: int, values: Mapping[str, Any]) -> None:
        """Show training metrics; the remaining time counts down until the next report."""
        if self._console is not None:
            self._show("train", step, self.total_steps, values)
        else:
            self._line(" | ".join([f"step {step}/{self.total_steps}", *format_train_metrics(values)]))

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Show the result of an evaluation in a permanent line."""
        self._line(" | ".join([f"step {step}/{self.total_steps}", *format_evaluation_metrics(values)]))

    def warn(self, text: str) -> None:
        """Show a warning."""
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
        width = max((len(key) for key, _ in rows), default=0)
        for key, value in rows:
            self._line(f"{key + ':':<{width + 1}} {value}")

    def data_build(self, done: int, total: int) -> None:
        """Show how many bytes of the data are prepared; call it as often as convenient.

        If the total is unknown, `total` is 0, and a single line is shown.
        """
        if self._data_done:
            return
        self._data_done = done >= total
        if not total:
            self._line("preparing data")
            return
        if self._console is not None:
            self._show("data", done, total, {})
            if self._data_done:
                self.close()
            return
        now = time.monotonic()
        if self._data_done or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._line(f"preparing data: {count(done)}B of {count(total)}B ({done / total:.0%})")

    def summary(self, rows: Rows) -> None:
        """Remove the bar and show a table of results."""
        self.close()
        self._line("")
        self.banner(rows)

    def close(self) -> None:
        """Remove the bar; safe to repeat. A later report shows it again."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, kind: str, done: int, total: int, values: Mapping[str, Any]) -> None:
        """Draw the bar; start a new one if there is none, or if it shows something else."""
        if self._bar is not None and self._bar.tasks[0].fields["kind"] != kind:
            self.close()
        shown: dict[str, Any] = {"completed": done, "total": total or None}
        shown |= {"values": dict(values), "since": time.monotonic()}
        if self._bar is not None:
            self._bar.update(self._bar.tasks[0].id, **shown)
            return
        assert self._console is not None
        columns = (BarColumn(bar_width=BAR_WIDTH), _Numbers(self._console))
        self._bar = Bar(*columns, console=self._console, refresh_per_second=2, transient=True)
        self._bar.add_task("", kind=kind, **shown)
        self._bar.start()

    def _line(self, text: str, style: str | None = None) -> None:
        if self._console is not None:
            self._console.print(Text(text, style=style or ""), soft_wrap=True)
        elif self._stream is not None:
            self._stream.write(text + "\n")
            self._stream.flush()


class _Numbers(ProgressColumn):
    """The numbers after the bar, rendered at each redraw."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def render(self, task: Task) -> Text:
        done, total = int(task.completed), int(task.total or 0)
        if task.fields["kind"] == "data":
            return Text(f"preparing data: {count(done)}B of {count(total)}B")
        values = dict(task.fields["values"])
        if "eta_seconds" in values:
            passed = time.monotonic() - task.fields["since"]
            values["eta_seconds"] = max(values["eta_seconds"] - passed, 0.0)
        room = self._console.width - BAR_WIDTH - 1
        for name in ("", *DROP_WHEN_NARROW):
            values.pop(name, None)
            line = " | ".join([f"step {done}/{total}", *format_train_metrics(values)])
            if len(line) <= room:
                break
        return Text(line, no_wrap=True)


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
