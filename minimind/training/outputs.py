"""The files and trackers that a run appends to: opened at a step, and again after a rewind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from ..run_folder import RunFolder
from ..tracking.console import Progress
from ..tracking.plugins import Tracker
from ..tracking.trackers import Trackers
from .samples import Samples
from .setup import RunInputs


class Outputs:
    """Metrics, trackers and samples of a run. Opening them at a step drops what was written of later steps.

    Attributes:
        trackers: metrics.jsonl and the trackers of --tracker.
        samples: None without --sample-interval.
    """

    trackers: Trackers
    samples: Samples | None

    def __init__(
        self,
        inputs: RunInputs,
        folder: RunFolder,
        accelerator: Accelerator,
        model: nn.Module,
        environment: Mapping[str, Any],
        progress: Progress,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        """Open nothing yet; see `open`."""
        self._inputs, self._folder = inputs, folder
        self._accelerator, self._model = accelerator, model
        self._environment, self._progress, self._custom = environment, progress, trackers

    @property
    def metrics_path(self) -> Path:
        """The file of metrics."""
        return self._folder.metrics

    def open(self, step: int, tracker_ids: Mapping[str, str]) -> None:
        """Open everything to continue after `step` in the charts of these run ids."""
        config = self._inputs.config
        self.trackers = Trackers(
            config,
            self._folder,
            self._accelerator,
            tracker_ids,
            start_step=step,
            environment=self._environment,
            trackers=self._custom,
            warn=self._progress.warn,
        )
        self.samples = None
        if config.sample_interval is not None:
            self.samples = Samples(
                config.sample_prompt or ("",),
                config.seed,
                self._inputs.model_config,
                self._model,
                self._inputs.tokenizer,
                self._accelerator,
                self._folder,
                start_step=step,
                trackers=self.trackers,
            )

    def close(self) -> None:
        """Write what is queued and close everything; safe to repeat."""
        if self.samples is not None:
            self.samples.close()
        self.trackers.close()
