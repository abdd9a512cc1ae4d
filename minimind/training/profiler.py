"""Profiler traces of a few training steps, for Perfetto or TensorBoard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

# After compilation and allocator warm-up; few, because a trace grows by megabytes per step.
FIRST_STEP, LAST_STEP = 10, 14


class ProfileTrace:
    """Records steps 10 to 14 of this rank, counted from the first one after start or resume.

    As a context manager around the training loop, which calls `step` after each optimizer step. The file is
    `FOLDER/process0-steps-10-14.pt.trace.json`: open it at ui.perfetto.dev, in chrome://tracing, or with
    TensorBoard's profiler. A run that ends within these steps writes those recorded.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        *,
        process_index: int = 0,
        start_step: int = 0,
        note: Callable[[str], None] = print,
    ) -> None:
        """Record nothing yet.

        Args:
            folder: of the file; created with it.
            device: recorded besides the host.
            process_index: part of the file's name.
            start_step: steps done before, on a resume.
            note: gets one sentence with the file's path, or why there is none.
        """
        self._folder, self._process, self._start, self._note = folder, process_index, start_step, note
        self._steps = 0
        self._written = False
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        recorded = LAST_STEP - FIRST_STEP + 1
        self._profiler = profile(
            activities=activities,
            # One step of warm-up before the first: starting to record is slow.
            schedule=schedule(wait=FIRST_STEP - 2, warmup=1, active=recorded, repeat=1),
            on_trace_ready=self._write,
        )

    def step(self) -> None:
        """Count an optimizer step that has been launched."""
        self._steps += 1
        self._profiler.step()

    def __enter__(self) -> ProfileTrace:
        self._profiler.start()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._profiler.stop()
        if not self._written and error is None:
            self._note(
                f"--profile: no trace, because the run ended before step {FIRST_STEP} of this process."
            )

    def _write(self, profiler: torch.profiler.profile) -> None:
        # Nothing was recorded before the first of these steps.
        if self._written or self._steps < FIRST_STEP:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        first, last = (self._start + step for step in (FIRST_STEP, min(self._steps, LAST_STEP)))
        path = self._folder / f"process{self._process}-steps-{first}-{last}.pt.trace.json"
        profiler.export_chrome_trace(str(path))
        self._written = True
        self._note(f"the trace of steps {first} to {last} is in {path}; open it at ui.perfetto.dev.")
