"""The choice of a budget as values and as one screen of lines."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..config.budget import Budget
from ..config.options import PretrainConfig
from ..config.schema import flag_of
from ..formatting import count, duration, size
from .candidates import Candidate, Machine, TextSize


@dataclass(frozen=True)
class BudgetPlan:
    """What `--budget` chose.

    Attributes:
        config: all options, chosen or kept.
        budget: of the run.
        text: its text.
        machine: where it trains.
        ranked: the choice, then the next best alternatives.
        kept: options that were set and therefore not chosen.
        problems: sentences about what would go wrong.
    """

    config: PretrainConfig
    budget: Budget
    text: TextSize
    machine: Machine
    ranked: tuple[Candidate, ...]
    kept: tuple[str, ...]
    problems: tuple[str, ...] = ()

    @property
    def best(self) -> Candidate:
        """The choice."""
        return self.ranked[0]

    @property
    def seconds(self) -> float:
        """Expected seconds of training, evaluations and checkpoints included."""
        whole = self.budget.seconds
        return self.best.seconds if whole is None or self.best.limited else whole

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "budget": dataclasses.asdict(self.budget),
            "options": {
                name: getattr(self.config, name) for name in self.config.budget_keeps if name not in self.kept
            },
            "kept": list(self.kept),
            "machine": dataclasses.asdict(self.machine),
            "text": dataclasses.asdict(self.text),
            "seconds": self.seconds,
            "candidates": [_values(candidate) for candidate in self.ranked],
            "problems": list(self.problems),
        }

    def rows(self) -> list[tuple[str, str]]:
        """Return the plan as pairs of a key and a value."""
        return [*self._choice(), *self._expectation(), *self._alternatives()]

    def _choice(self) -> Iterator[tuple[str, str]]:
        best, machine, config = self.best, self.machine, self.config
        processes = f" x {machine.processes}" if machine.processes > 1 else ""
        yield "budget", f"{config.budget} of training on {machine.name}{processes}"
        yield "model", _model(best)
        how = "trained on a sample of the text" if best.tokenizer.trained else "given, or of the package"
        yield (
            "tokenizer",
            f"{best.tokenizer.vocab_size:,} entries, {how}; {best.tokenizer.bytes_per_token:.2f} bytes each",
        )
        accumulation = best.global_batch_size // best.micro_batch_size // machine.processes
        parts = f"{best.micro_batch_size} sequences x {best.seq_len} tokens"
        parts += f" x accumulation {accumulation}" if accumulation > 1 else ""
        yield "batch", f"{count(best.batch_tokens)} tokens ({parts}{processes})"
        decay = (
            f", linear decay over the last {config.decay_ratio:.0%}" if config.lr_schedule == "wsd" else ""
        )
        yield (
            "training",
            f"{best.steps:,} steps, {count(best.tokens)} tokens, {best.epochs:.3g} epochs of "
            f"{size(self.text.num_bytes)}; {config.optimizer} at {config.learning_rate:g}, weight decay "
            f"{config.weight_decay:g}{decay}",
        )
        if self.kept:
            yield "kept", ", ".join(flag_of(name) for name in self.kept) + ", as set"

    def _expectation(self) -> Iterator[tuple[str, str]]:
        best, machine = self.best, self.machine
        yield "expected", f"{best.forecast.text} bits/byte on held-out text, with 90% probability"
        speed = f"{count(best.batch_tokens / best.step_seconds)} tokens/s"
        measured = "measured" if best.measured else "estimated"
        time = f"{duration(self.seconds)} of training ({speed} {measured}), plus preparing the data"
        if best.limited and self.budget.seconds is not None:
            time += "; the text is too small for more: further epochs would add nothing"
        yield "time", time
        yield "memory", f"{size(best.memory)} estimated, of {size(machine.memory)} free"
        yield "why", self._why()

    def _why(self) -> str:
        best = self.best
        reasons = []
        for other in self.ranked[1:]:
            if other.shape.block_parameters > best.shape.block_parameters:
                reasons.append(f"a larger model would see only {count(other.tokens)} tokens")
            elif other.shape.block_parameters < best.shape.block_parameters:
                reasons.append(f"a smaller one would learn less from its {count(other.tokens)}")
        return "; ".join(dict.fromkeys(reasons)) or "no other choice comes near"

    def _alternatives(self) -> Iterator[tuple[str, str]]:
        for number, other in enumerate(self.ranked[1:3]):
            # More digits would suggest that the law knows them.
            difference = other.forecast.bits_per_byte - self.best.forecast.bits_per_byte
            yield (
                "then" if number else "next best",
                f"{_model(other)}, vocabulary {other.tokenizer.vocab_size:,}: {count(other.tokens)} tokens, "
                f"{difference:+.3f} bits/byte",
            )


def _model(candidate: Candidate) -> str:
    shape = candidate.shape
    return (
        f"{count(shape.parameters(candidate.tokenizer.vocab_size))} parameters: {shape.num_hidden_layers} "
        f"layers, hidden size {shape.hidden_size}, {shape.num_attention_heads} heads"
    )


def _values(candidate: Candidate) -> dict[str, Any]:
    values = dataclasses.asdict(candidate)
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
