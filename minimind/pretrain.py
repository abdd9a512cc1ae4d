"""One call from a configuration to a trained model."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .batch_plan import BatchPlan, count_steps, plan_batches
from .config import PretrainConfig
from .environment import describe_environment
from .launch import is_main_process, start_accelerator, wants_compile
from .run_folder import RunFolder
from .tokenizer import Tokenizer, load_tokenizer
from .train import Run, TrainState, train, validate
from .trackers import Trackers, check_trackers


@dataclass(frozen=True)
class PretrainResult:
    """What a finished run has to show.

    Attributes:
        model_dir: folder that Hugging Face transformers loads.
        steps: optimizer steps done.
        tokens: real input tokens trained.
        loss: mean training loss of the last report, in nats per token.
        val_loss: last validation loss, None without validation text.
        bits_per_byte: last validation bits per byte, None without validation text.
        tokens_per_second: speed after warm-up.
        seconds: wall time of the whole run.
        sample: a short text written by the model.
    """

    model_dir: Path
    steps: int
    tokens: int
    loss: float
    val_loss: float | None
    bits_per_byte: float | None
    tokens_per_second: float
    seconds: float
    sample: str
