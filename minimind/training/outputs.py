"""The files and trackers that a run appends to: opened at a step, and again after a rewind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from ..evaluation.cloze import cloze_scores
from ..run_folder import RunFolder
from ..tracking.console import Progress
from ..tracking.live_report import LiveReport
from ..tracking.plugins import Tracker
from ..tracking.trackers import Trackers
from .samples import Samples, gathered_model
from .setup import RunInputs


class Outputs:
    """Metrics, trackers and samples of a run. Opening them at a step drops what was written of later steps.

    Attributes:
        trackers: metrics.jsonl and the trackers of --tracker.
        samples: None without --sample-interval.
        report: of the main process; set when training begins.
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
        self.report: LiveReport | None = None

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
        if self.report is not None:
            self.report.reread()
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

    def probes_after(self, step: int, *, last: bool) -> bool:
        """Return whether samples or scores are due after `step`; scores are also after the last one."""
        return self._samples_after(step) or self._scores_after(step, last=last)

    def probe(self, step: int, *, last: bool) -> dict[str, float]:
        """Write the samples and log the scores that are due after `step`; every rank must call this.

        Returns the scores, on the main process only.
        """
        if self._samples_after(step):
            assert self.samples is not None
            self.samples.write(step)
        scores: dict[str, float] = {}
        if self._scores_after(step, last=last):
            inputs = self._inputs
            model = gathered_model(self._accelerator, inputs.model_config, self._model)
            if model is not None:
                length = inputs.model_config.max_position_embeddings
                found = cloze_scores(model, inputs.tokenizer, max_length=length)
                scores = {score.name: score.accuracy for score in found}
                self.trackers.log(scores, step)
        return scores

    def _samples_after(self, step: int) -> bool:
        return self.samples is not None and step % (self._inputs.config.sample_interval or 1) == 0

    def _scores_after(self, step: int, *, last: bool) -> bool:
        interval = self._inputs.config.score_interval
        return interval is not None and (last or step % interval == 0)

    def close(self) -> None:
        """Write what is queued and close everything; safe to repeat."""
        if self.samples is not None:
            self.samples.close()
        self.trackers.close()
