"""The choice of `--budget`: compare shapes, tokenizers and batches by what they would reach in the budget.

Plain arithmetic on measured numbers, so that it can be tested for any machine. `budget.py` measures.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config import recipe
from ..config.budget import Budget
from ..config.recipe import ModelShape
from ..errors import ConfigError
from ..evaluation.scaling_law import Forecast, ScalingLaw
from ..modeling.config import MiniMindConfig
from .candidates import BatchChoice, Candidate, Machine, TextSize, TokenizerChoice
from .memory import estimate_memory

# Share of a time budget for evaluations and checkpoints.
BESIDES = 0.06
# Share of a device's available memory that a run may take by the estimate; the rest is for fragmentation of
# the allocator. On a GPU, kernels and workspaces that are loaded later come on top; the CUDA context does
# not, because it exists when memory is measured.
USABLE = 0.8
LOADED_BYTES = 1 << 28
# Tokens of a micro-batch on a GPU at most: it is near its best there.
MOST_TOKENS = {"cuda": 65536}
MOST_TOKENS_ELSEWHERE = 8192
# Before a shape is measured: the share of the matmul speed that training reaches, by width on a GPU, and the
# time to launch a layer's kernels.
_GPU_EFFICIENCY, _GPU_EFFICIENCY_WIDTH = 0.75, 150
_CPU_EFFICIENCY = 0.6
_LAUNCH_SECONDS = {"cuda": 4e-4}
_LAUNCH_SECONDS_ELSEWHERE = 2e-4
# Batches to compare, as multiples of that of the rule.
BATCHES = (1, 2, 4)
# FLOPs of Newton-Schulz per weight and hidden size, between those of a square matrix and of one three times
# as wide: 36 and 17, or 20 and 11 where half of each symmetric product is computed.
_ORTHOGONALIZE = 20
# A trained tokenizer must lower the expected bits per byte by this much.
WORTHWHILE = 0.003
# Candidates that are worse by no more than this are measured, too.
_CLOSE = 0.05


@dataclass
class Chooser:
    """Ranks candidates; learns speeds from measurements.

    Attributes:
        budget: of the run.
        text: its text.
        machine: where it trains.
        law: forecasts the result.
        kept: options that are set, by name.
        optimizer: name.
        speeds: measured seconds over expected seconds, by shape, vocabulary and batch.
        too_large: shapes, vocabularies and micro-batches that did not fit into memory.
    """

    budget: Budget
    text: TextSize
    machine: Machine
    law: ScalingLaw
    kept: Mapping[str, Any]
    optimizer: str = "normuon"
    recompute: bool = False
    speeds: dict[tuple[ModelShape, int, int], float] = field(default_factory=dict)
    too_large: set[tuple[ModelShape, int, int]] = field(default_factory=set)

    def ranked(self) -> list[Candidate]:
        """Return the best candidate of each shape and tokenizer, the best first.

        Raises:
            ConfigError: where nothing fits into memory.
        """
        best: dict[Any, Candidate] = {}
        for candidate in self._candidates():
            key = candidate.shape, candidate.tokenizer
            if key not in best or _badness(candidate) < _badness(best[key]):
                best[key] = candidate
        if not best:
            raise ConfigError(
                "--budget: no model fits into the memory of the device with the options that are set; lower "
                "--max-seq-len, or give --activation-checkpointing."
            )
        ordered = sorted(best.values(), key=_badness)
        if self.budget.tokens is not None:
            ordered = self._compute_optimal(ordered)
        return self._prefer_packaged(ordered)

    def next_to_measure(self) -> Candidate | None:
        """Return the best candidate until it is measured, then close ones of other shapes or another batch.

        The expected speeds are wrong by different factors, so that a close candidate may be the best.
        """
        ranked = self.ranked()
        best = ranked[0]
        if not best.measured:
            return best
        if self.budget.seconds is None:
            return None  # speed decides nothing
        shapes = {shape for shape, _, _ in self.speeds}
        batches = (c for c in self._candidates() if (c.shape, c.tokenizer) == (best.shape, best.tokenizer))
        contenders = [*(c for c in ranked if c.shape not in shapes), *sorted(batches, key=_badness)]
        limit = (1 + _CLOSE) * _badness(best)
        return next((c for c in contenders if not c.measured and _badness(c) <= limit), None)

    def learn(self, candidate: Candidate, step_seconds: float) -> None:
        """Note the measured time of a step of a candidate, with the batch that the candidate has."""
        expected = self._expected_step_seconds(candidate.shape, candidate.tokenizer, candidate)
        self.speeds[candidate.key] = step_seconds / expected

    def _prefer_packaged(self, ordered: list[Candidate]) -> list[Candidate]:
        """Move a candidate without a new tokenizer to the front, unless one with it is clearly better."""
        plain = next((c for c in ordered if not c.tokenizer.trained), None)
        if plain is None or not ordered[0].tokenizer.trained:
            return ordered
        if _badness(plain) > (1 + WORTHWHILE) * _badness(ordered[0]):
            return ordered
        return [plain, *(c for c in ordered if c is not plain)]

    def _compute_optimal(self, ordered: list[Candidate]) -> list[Candidate]:
        """Order candidates of equal tokens: the largest for whose FLOPs no other shape is better, first.

        With a number of tokens a larger model is always better, and only slower.
        """

        def distance(candidate: Candidate) -> float:
            flops = candidate.tokens * self._flops_per_token(candidate)
            others = []
            for other in ordered:
                if other.tokenizer == candidate.tokenizer:
                    tokens = flops / self._flops_per_token(other)
                    others.append((self._relative(other.shape, other.tokenizer, tokens), other.shape))
            optimum = min(others, key=lambda pair: pair[0])[1]
            return abs(math.log(optimum.block_parameters / candidate.shape.block_parameters))

        return sorted(ordered, key=lambda c: (round(distance(c), 6), _badness(c)))

    def _candidates(self) -> Iterator[Candidate]:
        shapes = self._shapes()
        given = self.kept.get("global_batch_size") or self.kept.get("accumulation_steps")
        for shape, tokenizer in itertools.product(shapes, self.text.tokenizers):
            most = recipe.MOST_PARAMETERS_PER_TOKEN * self._unique_tokens(tokenizer)
            if shape in shapes[:3] or shape.block_parameters <= most:
                rule, epochs = self._rule_batch(shape, tokenizer)
                for multiple in (1,) if given else BATCHES:
                    candidate = self._candidate(shape, tokenizer, multiple * rule, epochs)
                    if candidate is not None:
                        yield candidate

    def _shapes(self) -> list[ModelShape]:
        """Return the shapes of the ladder with the sizes that are set."""
        names = [f.name for f in dataclasses.fields(ModelShape)]
        fixed = {name: self.kept[name] for name in names if self.kept.get(name) is not None}
        ladder = recipe.LADDER
        if (width := fixed.get("hidden_size")) is not None:
            ladder = tuple(ModelShape.of(width, layers) for layers in (2, 4, 6, 8, 12, 16, 24, 32))
        shapes = [dataclasses.replace(shape, **fixed) for shape in ladder]
        head_dim = self.kept.get("head_dim")
        valid = [
            s
            for s in shapes
            if s.num_attention_heads % s.num_key_value_heads == 0
            and (head_dim or s.hidden_size % s.num_attention_heads == 0)
        ]
        return list(dict.fromkeys(valid or shapes))

    def _rule_batch(self, shape: ModelShape, tokenizer: TokenizerChoice) -> tuple[int, float]:
        """Return the tokens of a batch by the rule, for the horizon of the budget, and its epochs."""
        unique = self._unique_tokens(tokenizer)
        tokens = min(unique, 1e6)
        # The batch follows from the tokens, and with the speed the tokens from the batch.
        for _ in range(4):
            batch_tokens = recipe.global_batch_tokens(tokens, unique)
            plan = self._batch(shape, tokenizer, batch_tokens, tokens / unique)
            if plan is None:
                break
            tokens = self._horizon(shape, tokenizer, plan)
        return batch_tokens, tokens / unique

    def _horizon(self, shape: ModelShape, tokenizer: TokenizerChoice, plan: BatchChoice) -> float:
        """Return the tokens that the budget and the limit of epochs allow."""
        affordable = self._affordable_tokens(
            shape, tokenizer, plan, self._step_seconds(shape, tokenizer, plan)
        )
        return min(affordable, self._most_tokens(shape, tokenizer))

    def _most_tokens(self, shape: ModelShape, tokenizer: TokenizerChoice) -> float:
        unique = self._unique_tokens(tokenizer)
        return unique * (self.kept.get("epochs") or recipe.most_epochs(shape.block_parameters, unique))

    def _candidate(
        self, shape: ModelShape, tokenizer: TokenizerChoice, batch_tokens: int, epochs: float
    ) -> Candidate | None:
        """Return a candidate; None where it does not fit into memory, or into the budget."""
        plan = self._batch(shape, tokenizer, batch_tokens, epochs)
        if plan is None:
            return None
        tokens = self._horizon(shape, tokenizer, plan)
        steps = int(tokens / plan.batch_tokens)
        if steps < 1:
            return None
        done = steps * plan.batch_tokens
        return Candidate(
            **plan._asdict(),
            shape=shape,
            tokenizer=tokenizer,
            global_batch_size=plan.batch_tokens // plan.seq_len,
            steps=steps,
            epochs=done / self._unique_tokens(tokenizer),
            step_seconds=self._step_seconds(shape, tokenizer, plan),
            forecast=self._forecast(shape, tokenizer, done, plan.batch_tokens),
            measured=(shape, tokenizer.vocab_size, plan.batch_tokens) in self.speeds,
            limited=tokens >= self._most_tokens(shape, tokenizer),
        )

    def _unique_tokens(self, tokenizer: TokenizerChoice) -> float:
        return max(self.text.num_bytes / tokenizer.bytes_per_token, 1.0)

    def _affordable_tokens(
        self, shape: ModelShape, tokenizer: TokenizerChoice, plan: BatchChoice, step_seconds: float
    ) -> float:
        if self.budget.tokens is not None:
            return self.budget.tokens
        if self.budget.flops is not None:
            return self.budget.flops / self._model(shape, tokenizer).flops_per_token(plan.seq_len)
        assert self.budget.seconds is not None
        return (1 - BESIDES) * self.budget.seconds / step_seconds * plan.batch_tokens

    def _model(self, shape: ModelShape, tokenizer: TokenizerChoice) -> MiniMindConfig:
        known = {f.name for f in dataclasses.fields(MiniMindConfig)}
        others = {k: v for k, v in self.kept.items() if k in known and v is not None}
        vocab_size = max(self.kept.get("vocab_size") or 0, tokenizer.vocab_size)
        return MiniMindConfig(**{**others, **shape.options(), "vocab_size": vocab_size})

    def _flops_per_token(self, candidate: Candidate) -> int:
        return self._model(candidate.shape, candidate.tokenizer).flops_per_token(candidate.seq_len)

    def _parameters(self, shape: ModelShape, tokenizer: TokenizerChoice) -> float:
        return recipe.effective_parameters(shape.block_parameters, self._unique_tokens(tokenizer))

    def _relative(self, shape: ModelShape, tokenizer: TokenizerChoice, tokens: float) -> float:
        worth = recipe.effective_tokens(tokens, self._unique_tokens(tokenizer))
        num_bytes = worth * tokenizer.bytes_per_token
        return self.law.relative(self._parameters(shape, tokenizer), num_bytes, tokenizer.vocab_size)

    def _forecast(
        self, shape: ModelShape, tokenizer: TokenizerChoice, tokens: float, batch_tokens: int
    ) -> Forecast:
        unique = self._unique_tokens(tokenizer)
        worth = recipe.effective_tokens(recipe.useful_tokens(tokens, batch_tokens, unique), unique)
        num_bytes = worth * tokenizer.bytes_per_token
        return self.law.before_start(
            self._parameters(shape, tokenizer), num_bytes, tokenizer.vocab_size, self.text.difficulty
        )

    def _batch(
        self, shape: ModelShape, tokenizer: TokenizerChoice, batch_tokens: int, epochs: float
    ) -> BatchChoice | None:
        """Return the sizes of a step of so many tokens; None where not one sequence fits into memory."""
        seq_len = self.kept.get("max_seq_len") or recipe.sequence_length(
            batch_tokens,
            epochs=epochs,
            parameters_per_token=shape.block_parameters / self._unique_tokens(tokenizer),
        )
        processes = self.machine.processes
        micro, accumulation = self.kept.get("batch_size"), self.kept.get("accumulation_steps")
        sequences = self.kept.get("global_batch_size")
        if sequences is None and accumulation and isinstance(micro, int):
            sequences = micro * accumulation * processes
        if sequences is None:
            of_one = max(round(batch_tokens / seq_len / processes), 1)
            step = (micro if isinstance(micro, int) else 1) * (accumulation or 1)
            sequences = max(round(of_one / step), 1) * step * processes
        share = max(sequences // processes, 1)
        most = MOST_TOKENS.get(self.machine.device, MOST_TOKENS_ELSEWHERE)
        sizes = [micro] if isinstance(micro, int) else [n for n in range(share, 0, -1) if share % n == 0]
        for size in sizes:
            if size > 1 and size * seq_len > most and not isinstance(micro, int):
                continue
            if (shape, tokenizer.vocab_size, size) in self.too_large:
                continue
            memory = self._memory(shape, tokenizer, size, seq_len, max(share // size, 1))
            if memory + LOADED_BYTES * (self.machine.device == "cuda") <= USABLE * self.machine.memory:
                return BatchChoice(sequences * seq_len, seq_len, size, memory)
        return None

    def _memory(
        self, shape: ModelShape, tokenizer: TokenizerChoice, micro: int, seq_len: int, accumulation: int
    ) -> int:
        return estimate_memory(
            self._model(shape, tokenizer),
            sequences=micro,
            seq_len=seq_len,
            precision=self.machine.precision,
            compiled="no",
            optimizer=self.optimizer,
            accumulation_steps=accumulation,
            num_processes=self.machine.processes,
            recompute=self.recompute,
            fused=self.machine.fused,
        ).peak

    def _step_seconds(self, shape: ModelShape, tokenizer: TokenizerChoice, plan: BatchChoice) -> float:
        expected = self._expected_step_seconds(shape, tokenizer, plan)
        if not self.speeds:
            return expected
        size = math.log(shape.parameters(tokenizer.vocab_size))

        def distance(key: tuple[ModelShape, int, int]) -> tuple[bool, float, float]:
            other, vocab_size, batch_tokens = key
            apart = abs(math.log(other.parameters(vocab_size)) - size)
            return other != shape, apart, abs(math.log(batch_tokens / plan.batch_tokens))

        # What was not measured is off by as much as what was measured nearest to it.
        return expected * self.speeds[min(self.speeds, key=distance)]

    def _expected_step_seconds(
        self, shape: ModelShape, tokenizer: TokenizerChoice, plan: BatchChoice | Candidate
    ) -> float:
        """Return the time of a step from FLOPs and matmul speed, before anything is measured."""
        machine = self.machine
        on_gpu = machine.device == "cuda"
        width = shape.hidden_size
        efficiency = _GPU_EFFICIENCY * width / (width + _GPU_EFFICIENCY_WIDTH) if on_gpu else _CPU_EFFICIENCY
        work = plan.batch_tokens / machine.processes
        flops = work * self._model(shape, tokenizer).flops_per_token(plan.seq_len)
        if self.optimizer != "adamw":
            flops += _ORTHOGONALIZE * shape.hidden_size * shape.block_parameters
        micro_batches = max(work / (plan.micro_batch_size * plan.seq_len), 1)
        launch = _LAUNCH_SECONDS.get(machine.device, _LAUNCH_SECONDS_ELSEWHERE)
        return flops / (machine.matmul_flops * efficiency) + launch * shape.num_hidden_layers * micro_batches


def _badness(candidate: Candidate) -> float:
    return candidate.forecast.bits_per_byte


def search(
    chooser: Chooser, time_left: Callable[[], float]
) -> Generator[Candidate, float | None, list[Candidate]]:
    """Yield the best and close candidates one after another to be measured, and return all, ranked.

    Send the seconds of a step for each; None for one that does not fit into memory.

    Args:
        chooser: learns the speeds.
        time_left: seconds left for measuring. One candidate is measured whatever it takes.
    """
    longest = 0.0
    while (candidate := chooser.next_to_measure()) is not None:
        before = time_left()
        if chooser.speeds and before < longest:
            break
        seconds = yield candidate
        longest = max(longest, before - time_left())
        if seconds is None:
            key = (candidate.shape, candidate.tokenizer.vocab_size, candidate.micro_batch_size)
            chooser.too_large.add(key)
        else:
            chooser.learn(candidate, seconds)
    return chooser.ranked()
