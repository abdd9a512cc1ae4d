"""The files and trackers that a run appends to: opened at a step, and again after a rewind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from ..evaluation.cloze import cloze_scores
from ..generation.text import continue_texts
from ..run_folder import RunFolder
from ..tracking.console import Progress
from ..tracking.live_report import LiveReport
from ..tracking.metrics_file import MetricsFile
from ..tracking.plugins import Tracker
from ..tracking.trackers import Trackers
from .samples import SAMPLE_TOKENS, gathered_model
from .setup import RunInputs


class Outputs:
    """Metrics, trackers and samples of a run. Opening them at a step drops what was written of later steps.

    Attributes:
        trackers: metrics.jsonl and the trackers of --tracker.
        report: of the main process; set when training begins.
    """

    trackers: Trackers

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
        self._samples: MetricsFile | None = None
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
        if config.sample_interval is not None and self._accelerator.is_main_process:
            self._samples = MetricsFile(self._folder.samples, keep_to_step=step)

    def probes_after(self, step: int, *, last: bool) -> bool:
        """Return whether samples or scores are due after `step`; scores are also after the last one."""
        return self._samples_after(step) or self._scores_after(step, last=last)

    def probe(self, step: int, *, last: bool) -> dict[str, float]:
        """Write the samples and log the scores that are due after `step`; every rank must call this.

        Returns the scores, on the main process only.
        """
        inputs = self._inputs
        model = gathered_model(self._accelerator, inputs.model_config, self._model)
        if model is None:
            return {}
        if self._samples_after(step):
            assert self._samples is not None
            # Always the same seed.
            prompts, seed = inputs.config.sample_prompt or ("",), inputs.config.seed
            samples = continue_texts(
                model, inputs.tokenizer, prompts, max_new_tokens=SAMPLE_TOKENS, seed=seed
            )
            for number, sample in enumerate(samples):
                self._samples.write({"prompt": sample.prompt, "text": sample.text}, step)
                self.trackers.log_text(f"sample_{number}", sample.prompt + sample.text, step)
        if not self._scores_after(step, last=last):
            return {}
        length = inputs.model_config.max_position_embeddings
        found = cloze_scores(model, inputs.tokenizer, max_length=length)
        scores = {score.name: score.accuracy for score in found}
        self.trackers.log(scores, step)
        return scores

    def _samples_after(self, step: int) -> bool:
        interval = self._inputs.config.sample_interval
        return interval is not None and step % interval == 0

    def _scores_after(self, step: int, *, last: bool) -> bool:
        interval = self._inputs.config.score_interval
        return interval is not None and (last or step % interval == 0)

    def close(self) -> None:
        """Write what is queued and close everything; safe to repeat."""
        if self._samples is not None:
            self._samples.close()
        self.trackers.close()
