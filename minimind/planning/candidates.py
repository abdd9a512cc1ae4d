"""What `--budget` compares: tokenizers, machines and candidates, and the options of a candidate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..config import recipe
from ..config.budget import Budget
from ..config.recipe import ModelShape
from ..evaluation.scaling_law import Difficulty, Forecast

# Evaluations of a run, and the share of the budget that one may take.
EVALUATIONS = 6
EVALUATION_SHARE = 0.007
# Text held out for validation, in bytes.
HELD_OUT_BYTES = 500e3


def chosen_val_fraction(num_bytes: float) -> float:
    """Return the share of a text to hold out for validation."""
    return min(max(HELD_OUT_BYTES / num_bytes, 0.001), 0.05)


@dataclass(frozen=True)
class TokenizerChoice:
    """A tokenizer to choose.

    Attributes:
        vocab_size: V.
        bytes_per_token: of the text of the run.
        trained: trained on the text; otherwise it is given, or that of the package.
    """

    vocab_size: int
    bytes_per_token: float
    trained: bool = False


@dataclass(frozen=True)
class TextSize:
    """The text of a run.

    Attributes:
        num_bytes: UTF-8 bytes, about.
        difficulty: None where unknown.
        tokenizers: at least one.
    """

    num_bytes: float
    difficulty: Difficulty | None
    tokenizers: tuple[TokenizerChoice, ...]


@dataclass(frozen=True)
class Machine:
    """What a run trains on.

    Attributes:
        device: `cuda`, `mps` or `cpu`.
        name: of the device.
        processes: world size.
        matmul_flops: measured FLOP/s of a large product on one device.
        memory: usable bytes of one device.
        precision: of matrix products.
        fused: fused kernels are used.
    """

    device: str
    name: str
    processes: int
    matmul_flops: float
    memory: float
    precision: str
    fused: bool = False


@dataclass(frozen=True)
class Candidate:
    """A way to spend the budget.

    Attributes:
        shape: of the model.
        tokenizer: of the run.
        batch_tokens: B, of the global batch.
        seq_len: T.
        micro_batch_size: sequences of one process per forward pass.
        global_batch_size: sequences per step.
        steps: optimizer steps.
        epochs: over the training text, a fraction.
        step_seconds: of a step.
        memory: estimated bytes.
        forecast: final validation bits per byte.
        measured: whether the speed of the shape was measured.
        limited: the limit of epochs ends the run before the budget.
    """

    shape: ModelShape
    tokenizer: TokenizerChoice
    batch_tokens: int
    seq_len: int
    micro_batch_size: int
    global_batch_size: int
    steps: int
    epochs: float
    step_seconds: float
    memory: int
    forecast: Forecast
    measured: bool
    limited: bool

    @property
    def tokens(self) -> int:
        """Training tokens of the run."""
        return self.steps * self.batch_tokens

    @property
    def seconds(self) -> float:
        """Seconds of the run's training steps."""
        return self.steps * self.step_seconds

    @property
    def key(self) -> tuple[ModelShape, int, int]:
        """What the time of a step depends on."""
        return self.shape, self.tokenizer.vocab_size, self.batch_tokens


class BatchChoice(NamedTuple):
    """Sizes of a step, named as in `Candidate`."""

    batch_tokens: int
    seq_len: int
    micro_batch_size: int
    memory: int


def chosen_options(
    candidate: Candidate,
    text: TextSize,
    budget: Budget,
    kept: Mapping[str, Any],
    *,
    optimizer: str = "normuon",
    processes: int = 1,
    trained: bool = False,
) -> dict[str, Any]:
    """Return the options of a candidate, without those in `kept`; a trained tokenizer is added later.

    `trained`: the run begins with trained weights.
    """
    rate, decay = recipe.learning_rate_and_decay(
        optimizer,
        width=candidate.shape.hidden_size,
        batch_tokens=candidate.batch_tokens,
        unique_tokens=candidate.tokens / candidate.epochs,
        epochs=candidate.epochs,
        rate=kept.get("learning_rate"),
        trained=trained,
    )
    steps = candidate.steps
    held_out = chosen_val_fraction(text.num_bytes)
    total = budget.seconds or candidate.seconds
    evaluation_tokens = held_out * text.num_bytes / candidate.tokenizer.bytes_per_token
    per_batch = candidate.micro_batch_size * candidate.seq_len
    # A forward pass is a third of a step.
    forward = candidate.step_seconds / 3 / candidate.batch_tokens
    evaluation_batches = None
    if evaluation_tokens * forward > EVALUATION_SHARE * total:
        evaluation_batches = max(int(EVALUATION_SHARE * total / forward / per_batch / processes), 4)
    most = recipe.most_epochs(candidate.shape.block_parameters, candidate.tokens / candidate.epochs)
    options = {
        **candidate.shape.options(),
        "max_seq_len": candidate.seq_len,
        "batch_size": candidate.micro_batch_size,
        # A limit: the clock ends a time budget, also on a machine that turns out faster.
        "epochs": most if budget.seconds else min(math.ceil(candidate.epochs), most),
        "learning_rate": rate,
        "lr_schedule": "wsd",
        "warmup_steps": min(max(round(0.02 * steps), 1), 1000),
        "min_lr_ratio": recipe.FINAL_RATE,
        "decay_ratio": recipe.DECAY_RATIO,
        "decay_shape": "linear",
        "weight_decay": decay,
        "val_fraction": float(f"{held_out:.2g}"),
        "log_interval": _every(min(max(total / 200, 1.5), 30.0), candidate, steps),
        "eval_interval": max(steps // EVALUATIONS, 1),
        "eval_batches": evaluation_batches,
        "save_interval": _every(min(max(total / 10, 20.0), 600.0), candidate, steps),
    }
    if kept.get("accumulation_steps") is None:
        options["global_batch_size"] = candidate.global_batch_size
    return {name: value for name, value in options.items() if name not in kept}


def _every(seconds: float, candidate: Candidate, steps: int) -> int:
    """Return the steps of an interval of so many seconds."""
    return min(max(round(seconds / candidate.step_seconds), 1), max(steps, 1))
