"""The optimizer step: exact weighting of tokens, skipped updates, dropout that can be drawn again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from minimind.checkpoint.train_state import TrainState
from minimind.config.options import PretrainConfig
from minimind.data.loader import MicroBatch, StepBatch
from minimind.distributed.shutdown import StopRequest
from minimind.errors import TrainingError
from minimind.evaluation.validation import Evaluation, evaluate
from minimind.modeling.config import MiniMindConfig
from minimind.modeling.transformer import MiniMindForCausalLM
from minimind.optim.build import build_optimizer
from minimind.training.reporting import StepRecord
from minimind.training.throughput import Meter
from minimind.training.trainer import MAX_SKIPPED_IN_A_ROW, Trainer

SEQUENCES, LENGTH, VOCAB = 8, 24, 97


def tiny_model(dropout: float = 0.0) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    return MiniMindForCausalLM(
        MiniMindConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            dropout=dropout,
        )
    )


def ragged_sequences(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose number of real targets differs widely, from all of them to one."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (SEQUENCES, LENGTH + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    for sequence in range(SEQUENCES):
        labels[sequence, max(1, LENGTH - 4 * sequence) :] = -100
    return tokens[:, :-1], labels


def step_batch(seed: int, micro_batch_size: int, sequences: int = SEQUENCES) -> StepBatch:
    """The same `rows` sequences as micro-batches; those beyond are masked, as at the end of an epoch."""
    inputs, labels = ragged_sequences(seed)
    labels[sequences:] = -100
    cut = zip(inputs.split(micro_batch_size), labels.split(micro_batch_size), strict=True)
    return StepBatch(
        micro_batches=tuple(MicroBatch(x, y, None, None) for x, y in cut),
        num_targets=int((labels >= 0).sum()),
        num_tokens=sequences * LENGTH,
        num_sequences=sequences,
        epoch=0,
        step_in_epoch=0,
        digest="",
    )


def record(step: int) -> StepRecord:
    """What is known of a step of one target."""
    return StepRecord(
        step,
        0.0,
        1,
        1,
        learning_rate=0.1,
        digest="",
        limit=math.inf,
        sequences=(0, 0, SEQUENCES),
        report=False,
    )


class Recorder:
    """Stands for progress and trackers: records its calls."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: {}


class BatchEvaluator:
    """Evaluates the batches that a function gives for a number of batches."""

    def __init__(self, trainer: Trainer, batches: Callable[[int | None], Iterable[MicroBatch]]) -> None:
        self.trainer, self.batches = trainer, batches

    def evaluate(self, max_batches: int | None, stop: StopRequest | None = None) -> Evaluation | None:
        return evaluate(
            self.trainer.model,
            self.batches(max_batches),
            torch.ones(VOCAB),
            self.trainer.accelerator,
            asked_to_stop=lambda: stop is not None and stop.reason is not None,
        )


def train_step(trainer: Trainer, batch: StepBatch, state: TrainState) -> torch.Tensor:
    trainer.state = state
    return trainer.train_step(batch, math.inf)


def drain_metrics(trainer: Trainer, state: TrainState, *, everything: bool = False) -> None:
    trainer.state = state
    trainer.drain_metrics(everything=everything)


def train(trainer: Trainer, state: TrainState) -> None:
    trainer.state = state
    trainer.train()


def make_trainer(model: MiniMindForCausalLM, accumulation_steps: int = 1, **options: Any) -> Trainer:
    config = PretrainConfig(**options)
    accelerator = Accelerator(cpu=True)
    accelerator.gradient_accumulation_steps = accumulation_steps
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bare = model
    model, optimizer = accelerator.prepare(model, optimizer)
    recorder: Any = Recorder()
    loader: Any = SimpleNamespace(sequences_per_epoch=1000)
    checkpointer: Any = SimpleNamespace(save=lambda state: None, mark_best=lambda state: None)
    schedule: Any = SimpleNamespace(at=lambda step, window: 0.1, warmup_steps=0, custom=None)
    outputs: Any = SimpleNamespace(trackers=recorder, probes_after=lambda *_, **__: False)
    return Trainer(
        config=config,
        model_config=dataclasses.replace(bare.config, router_aux_loss_coef=config.router_aux_loss_coef),
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        loader=loader,
        schedule=schedule,
        total_steps=10,
        checkpointer=checkpointer,
        outputs=outputs,
        meter=Meter(1.0, 1, None, 10),
        progress=recorder,
        stop=StopRequest(),
        state=TrainState(),
    )


def reference_steps(seeds: list[int], sequences: int = SEQUENCES) -> tuple[list[float], MiniMindForCausalLM]:
    """Plain float32 SGD on whole batches: mean cross-entropy over all real targets, clipped at 1."""
    model = tiny_model()
    losses = []
    for seed in seeds:
        inputs, labels = ragged_sequences(seed)
        labels[sequences:] = -100
        logits = model(inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize("micro_batch_size", [8, 4, 2, 1])
@pytest.mark.parametrize("sequences", [8, 5])
def test_a_step_equals_one_big_batch_however_it_is_cut(micro_batch_size: int, sequences: int) -> None:
    losses, reference = reference_steps([1, 2, 3], sequences)
    trainer = make_trainer(tiny_model(), accumulation_steps=SEQUENCES // micro_batch_size)
    for number, seed in enumerate([1, 2, 3]):
        batch = step_batch(seed, micro_batch_size, sequences)
        loss_sum, *_ = train_step(trainer, batch, TrainState()).tolist()
        assert loss_sum / batch.num_targets == pytest.approx(losses[number], rel=1e-5)
    for (name, ours), theirs in zip(trainer.model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_mean_of_micro_batch_means_would_differ() -> None:
    """The sequences are ragged enough that weighting micro-batches alike, a common fault, is seen."""
    inputs, labels = ragged_sequences(1)
    logits = tiny_model()(inputs).logits
    per_sequence = [
        torch.nn.functional.cross_entropy(logits[sequence], labels[sequence], ignore_index=-100)
        for sequence in range(SEQUENCES)
    ]
    assert abs(torch.stack(per_sequence).mean().item() - reference_steps([1])[0][0]) > 1e-3


def test_the_reported_norm_is_that_before_clipping() -> None:
    model = tiny_model()
    inputs, labels = ragged_sequences(1)
    loss = torch.nn.functional.cross_entropy(model(inputs).logits.flatten(0, 1), labels.flatten())
    loss.backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    trainer = make_trainer(tiny_model(), accumulation_steps=2, grad_clip=0.01)
    *_, norm = train_step(trainer, step_batch(1, 4), TrainState()).tolist()
    assert norm == pytest.approx(expected, rel=1e-4)


def test_without_clipping_the_gradient_is_left_alone() -> None:
    trainer = make_trainer(tiny_model(), grad_clip=0.0)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    *_, norm = train_step(trainer, step_batch(1, 8), TrainState()).tolist()
    pairs = zip(before, trainer.model.parameters(), strict=True)
    moved = math.sqrt(sum((old - new).square().sum().item() for old, new in pairs))
    assert moved == pytest.approx(0.1 * norm, rel=1e-4)


def test_a_non_finite_gradient_leaves_weights_and_moments_alone_and_is_counted() -> None:
    model = tiny_model()
    trainer = make_trainer(model)
    trainer.optimizer = trainer.accelerator.prepare(
        build_optimizer(model, trainer.config, torch.device("cpu"))
    )
    state = TrainState()
    train_step(trainer, step_batch(1, 8), state)
    weights = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    values = train_step(trainer, step_batch(2, 8), state)
    with torch.no_grad():
        model.model.norm.weight[0] = dict(model.named_parameters())["model.norm.weight"].new_tensor(1.0)
    for name_and_now, before in zip(model.named_parameters(), weights, strict=True):
        if name_and_now[0] != "model.norm.weight":
            torch.testing.assert_close(name_and_now[1].detach(), before, rtol=0, atol=0)
    states = trainer.optimizer.optimizer.state.values()
    moments = [value for state in states for name, value in state.items() if name != "step"]
    assert len(moments) > len(weights)
    assert all(torch.isfinite(moment).all() for moment in moments)
    trainer.metrics.enqueue(record(7), values)
    drain_metrics(trainer, state)
    assert state.skipped_steps == 1
    assert "step 7" in trainer.progress.warnings[0]


def test_many_non_finite_steps_in_a_row_stop_the_run_with_advice() -> None:
    trainer = make_trainer(tiny_model())
    state = TrainState()

    def drain_a_bad_step() -> None:
        trainer.metrics.enqueue(record(state.skipped_steps), torch.tensor([math.nan, 0.0, 0.0, 1.0]))
        drain_metrics(trainer, state)

    for _ in range(MAX_SKIPPED_IN_A_ROW - 1):
        drain_a_bad_step()
    with pytest.raises(TrainingError, match="--learning-rate"):
        drain_a_bad_step()
    assert state.skipped_steps == MAX_SKIPPED_IN_A_ROW


def test_dropout_is_drawn_from_seed_and_step_alone() -> None:
    def loss(step: int, seed: int = 42) -> float:
        torch.rand(17)  # whatever was drawn before must not matter
        trainer = make_trainer(tiny_model(dropout=0.3), dropout=0.3, seed=seed)
        trainer.model.train()
        return train_step(trainer, step_batch(1, 8), TrainState(step=step))[0].item()

    assert loss(3) == loss(3)
    assert loss(3) != loss(4)
    assert loss(3) != loss(3, seed=43)


def test_the_loop_saves_evaluates_and_reports_when_due() -> None:
    trainer = make_trainer(tiny_model(), log_interval=2, save_interval=4, eval_interval=3)
    saved: list[int] = []
    trainer.checkpointer.save = lambda state: saved.append(state.step)
    evaluated: list[int] = []
    trainer.evaluator = BatchEvaluator(
        trainer, lambda limit: evaluated.append(limit) or [step_batch(5, 8).micro_batches[0]]
    )
    trainer.loader = SimpleNamespace(
        sequences_per_epoch=4 * SEQUENCES,
        steps=lambda epoch, sequence, epochs: (
            dataclasses.replace(step_batch(10 * (k // 4) + k % 4, 8), epoch=k // 4)
            for k in count(4 * epoch + sequence // SEQUENCES)
        ),
    )
    state = TrainState()
    train(trainer, state)
    assert saved == [4, 8, 10]
    assert len(evaluated) == 4  # after steps 3, 6, 9 and the last
    reports = [(step, values) for step, values in trainer.outputs.trackers.logged if "loss" in values]
    assert [step for step, _ in reports] == [2, 4, 6, 8, 10]
    assert (state.step, state.epoch, state.sequence) == (10, 2, 2 * SEQUENCES)
    assert state.tokens == 10 * SEQUENCES * LENGTH


def test_a_report_is_the_mean_over_all_targets_since_the_last_one() -> None:
    trainer = make_trainer(tiny_model(), log_interval=3)
    trainer.total_steps = 3
    batches = [step_batch(seed, 8) for seed in (1, 2, 3)]
    trainer.loader = SimpleNamespace(
        sequences_per_epoch=1000, steps=lambda epoch, sequence, epochs: iter(batches)
    )
    train(trainer, TrainState())
    losses, _ = reference_steps([1, 2, 3])
    targets = [batch.num_targets for batch in batches]
    expected = sum(loss * n for loss, n in zip(losses, targets, strict=True)) / sum(targets)
    (report,) = [values for _, values in trainer.outputs.trackers.logged if "loss" in values]
    assert report["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_report_covers_the_steps_before_a_checkpoint_that_fell_between_two_reports() -> None:
    def losses(*parts: int) -> list[float]:
        """Train four steps in parts, the state alone carried over."""
        trainer = make_trainer(tiny_model(), log_interval=4)
        state, seeds = TrainState(), iter((1, 2, 3, 4))
        for part in parts:
            trainer.total_steps, trainer.stop_after = 4, state.step + part
            trainer.loader = SimpleNamespace(
                sequences_per_epoch=1000,
                steps=lambda epoch, sequence, epochs: (step_batch(seed, 8) for seed in seeds),
            )
            train(trainer, state)
            state = TrainState.from_dict(json.loads(json.dumps(state.to_dict())))
            state.stopping = False
            trainer.metrics = type(trainer.metrics)(trainer.accelerator.device)
        return [values["loss"] for _, values in trainer.outputs.trackers.logged if "loss" in values]

    assert losses(4) == losses(1, 2, 1)
    assert len(losses(4)) == 1


def test_the_digest_tells_all_steps_so_far_in_their_order() -> None:
    def digest(*steps: str) -> str:
        state = TrainState()
        for step in steps:
            state.advance(dataclasses.replace(step_batch(1, 8), digest=step), sequences_per_epoch=1000)
        return state.digest

    assert digest("a", "b") == digest("a", "b")
    assert len({digest("a"), digest("b"), digest("a", "b"), digest("b", "a"), digest("a", "a")}) == 5
    expected = hashlib.blake2b(b"a", digest_size=16).hexdigest()
    assert digest("a") == expected
    assert digest("a", "b") == hashlib.blake2b((expected + "b").encode(), digest_size=16).hexdigest()


def test_a_requested_to_stop_ends_the_loop_after_a_save() -> None:
    trainer = make_trainer(tiny_model(), save_interval=100)
    trainer.total_steps = 1000
    saved: list[int] = []
    trainer.checkpointer.save = lambda state: saved.append(state.step)
    now = [0.0]
    trainer.stop = StopRequest(5, started=0.0, clock=lambda: now[0])

    def batches(epoch: int, sequence: int, epochs: None) -> Any:
        while True:
            now[0] += 1.0
            yield step_batch(int(now[0]), 8)

    trainer.loader = SimpleNamespace(sequences_per_epoch=10**6, steps=batches)
    state = TrainState()
    train(trainer, state)
    assert state.stopping
    assert saved == [state.step] == [5]


def test_an_evaluation_is_left_when_a_stop_is_requesteded_and_the_state_is_saved_once() -> None:
    trainer = make_trainer(tiny_model(), save_interval=2, eval_interval=2)
    saved: list[int] = []
    trainer.checkpointer.save = lambda state: saved.append(state.step)
    requested = [False]

    def validation(limit: int | None) -> Any:
        for number in range(100):
            if number == 9:
                trainer.stop.request("a test")
            requested[0] = number
            yield step_batch(5, 8).micro_batches[0]

    trainer.evaluator = BatchEvaluator(trainer, validation)
    trainer.loader = SimpleNamespace(
        sequences_per_epoch=1000, steps=lambda epoch, sequence, epochs: (step_batch(k, 8) for k in range(100))
    )
    state = TrainState()
    train(trainer, state)
    assert saved == [2]
    assert requested[0] < 20
    assert trainer.reports.last_evaluation is None
