"""What the training loop does between steps, in which order, and what it counts."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_trainer import (
    SEQUENCES,
    VOCAB,
    BatchEvaluator,
    drain_metrics,
    make_trainer,
    record,
    step_batch,
    tiny_model,
    train,
    train_step,
)

from minimind.checkpoint.train_state import TrainState
from minimind.distributed.shutdown import StopRequest
from minimind.errors import TrainingError
from minimind.evaluation.validation import Evaluation, evaluate
from minimind.training.time_limits import END_SECONDS
from minimind.training.trainer import MAX_SKIPPED_IN_A_ROW, Trainer

BAD, GOOD = [math.nan, 0.0, 0.0, 1.0], [3.0, 0.0, 0.0, 1.0]


def validate(trainer: Trainer, state: TrainState) -> None:
    trainer.state = state
    trainer.validate()


def decay_steps(trainer: Trainer, state: TrainState) -> int:
    trainer.state = state
    return trainer._decay_steps()


def looped(total_steps: int, **options: Any) -> tuple[Trainer, list[str]]:
    """A run of so many steps, and the list of what it will have done."""
    trainer, done = make_trainer(tiny_model(), **options), []
    trainer.total_steps = total_steps
    trainer.checkpointer = SimpleNamespace(
        save=lambda state: done.append(f"save {state.step}"),
        mark_best=lambda state: done.append(f"best {state.step}"),
    )
    trainer.evaluator = BatchEvaluator(
        trainer, lambda limit: done.append("evaluate") or [step_batch(5, 8).micro_batches[0]]
    )
    trainer.loader = SimpleNamespace(
        sequences_per_epoch=1000, steps=lambda epoch, first, epochs: (step_batch(k, 8) for k in range(100))
    )
    return trainer, done


def test_a_good_step_ends_a_series_of_skipped_ones() -> None:
    run, state = make_trainer(tiny_model()), TrainState()
    series = [*[BAD] * (MAX_SKIPPED_IN_A_ROW - 1), GOOD, *[BAD] * (MAX_SKIPPED_IN_A_ROW - 1)]
    for number, values in enumerate(series):
        run.metrics.enqueue(record(number), torch.tensor(values))
        drain_metrics(run, state)
        expected = number % MAX_SKIPPED_IN_A_ROW + 1 if values is BAD else 0
        assert state.skipped_in_a_row == expected
    assert state.skipped_steps == len(series) - 1
    run.metrics.enqueue(record(99), torch.tensor(BAD))
    with pytest.raises(TrainingError, match="in a row"):
        drain_metrics(run, state)


@pytest.mark.parametrize("save_interval", [2, 100])
def test_every_step_is_saved_before_it_is_evaluated_the_last_one_too(save_interval: int) -> None:
    run, done = looped(3, save_interval=save_interval, eval_interval=2)
    train(run, TrainState())
    saved = [] if save_interval == 100 else ["save 2"]
    assert [what for what in done if "best" not in what] == [*saved, "evaluate", "save 3", "evaluate"]
    # Only a step with a checkpoint can be the best.
    assert ("best 2" in done) == bool(saved)


def test_a_worse_evaluation_is_not_marked_best() -> None:
    run, done = looped(3)
    run.saved_step = 2
    validate(run, TrainState(step=2, best_val_loss=0.0))
    assert done == ["evaluate"]
    state = TrainState(step=2, best_val_loss=99.0)
    validate(run, state)
    assert done == ["evaluate", "evaluate", "best 2"]
    assert state.best_val_loss == run.reports.last_evaluation.loss < 99.0


def test_a_checkpoint_is_due_at_either_of_its_two_intervals() -> None:
    run, done = looped(13, save_interval=6, keep_every=4, eval_interval=100)
    train(run, TrainState())
    assert [what for what in done if what.startswith("save")] == [f"save {n}" for n in (4, 6, 8, 12, 13)]


def test_processes_and_steps_draw_different_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(process: int, step: int) -> float:
        run = make_trainer(tiny_model(dropout=0.3), dropout=0.3)
        monkeypatch.setattr(type(run.accelerator), "process_index", property(lambda _: process))
        run.model.train()
        return train_step(run, step_batch(1, 8), TrainState(step=step))[0].item()

    drawn = [loss(process, step) for process in (0, 1, 2) for step in (3, 4)]
    assert len(set(drawn)) == len(drawn)
    assert drawn == [loss(process, step) for process in (0, 1, 2) for step in (3, 4)]


def test_targets_of_id_0_are_trained_and_evaluated_like_any_other() -> None:
    run, state = make_trainer(tiny_model()), TrainState()
    batch = step_batch(1, 8)
    batch.micro_batches[0].shift_labels.fill_(0)
    sizes = torch.arange(1.0, VOCAB + 1)

    def evaluated(*_: Any) -> Evaluation | None:
        return evaluate(run.model, batch.micro_batches, sizes, run.accelerator)

    run.evaluator = SimpleNamespace(evaluate=evaluated)
    inputs, labels = batch.micro_batches[0].input_ids, batch.micro_batches[0].shift_labels
    logits = run.model(inputs).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    validate(run, state)
    assert run.reports.last_evaluation.tokens == labels.numel() == SEQUENCES * labels.shape[1]
    assert run.reports.last_evaluation.loss == pytest.approx(expected, rel=1e-5)
    assert run.reports.last_evaluation.bits_per_byte == pytest.approx(expected / math.log(2), rel=1e-5)
    loss_sum = train_step(run, batch, state)[0].item()
    assert loss_sum == pytest.approx(expected * labels.numel(), rel=1e-5)


def test_the_loss_of_a_step_is_summed_in_float32_beside_autocast() -> None:
    run = make_trainer(tiny_model(), accumulation_steps=8)
    with torch.autocast("cpu", torch.bfloat16):
        values = train_step(run, step_batch(1, 1), TrainState())
    assert values.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        parts = [
            tiny_model()(input_ids=one.input_ids, shift_labels=one.shift_labels, num_items_in_batch=1).loss
            for one in step_batch(1, 1).micro_batches
        ]
    assert {part.dtype for part in parts} == {torch.float32}
    assert values[0].item() == pytest.approx(sum(part.double().item() for part in parts), rel=1e-3)
    assert values[0].item() != values[0].bfloat16().item()


def timed(left: float, *, evaluation: float = 3.0, saving: float = 2.0, **options: Any) -> int:
    """Steps to decay where so many seconds are left, a step takes one and 10 are to decay."""
    options = {"lr_schedule": "wsd", "decay_steps": 10} | options
    run = make_trainer(tiny_model(), **options)
    run.total_steps = 10_000
    run.stop = StopRequest(left, started=0.0, clock=lambda: 0.0)
    seconds = {"evaluation": evaluation, "saving": saving}
    run.meter = SimpleNamespace(seconds_per_step=lambda: 1.0, seconds_of=seconds.__getitem__)
    return decay_steps(run, TrainState(step=100))


def test_the_decay_begins_when_its_steps_and_the_end_of_the_run_only_just_fit() -> None:
    """Kept back: twice an evaluation and a save, the time to write the model, a tenth of the rest."""
    reserve = 2 * (3.0 + 2.0) + END_SECONDS
    assert timed(reserve + 11.1 / 0.9) == 0
    assert timed(reserve + 10.9 / 0.9) == 10
    assert timed(reserve + 5.5 / 0.9) == 5
    assert timed(END_SECONDS + 11.1 / 0.9, evaluation=0, saving=0) == 0
    assert timed(END_SECONDS + 10.9 / 0.9, evaluation=0, saving=0) == 10


def test_the_decay_is_left_to_the_schedule_where_nothing_limits_the_time() -> None:
    assert timed(20.0) == 4
    assert timed(20.0, lr_schedule="cosine") == 0
    run = make_trainer(tiny_model(), lr_schedule="wsd", decay_steps=10)
    run.total_steps = 10_000
    run.meter = SimpleNamespace(seconds_per_step=lambda: 1.0, seconds_of=lambda _: 0.0)
    assert decay_steps(run, TrainState(step=100)) == 0
    run.stop = StopRequest(20.0, started=0.0, clock=lambda: 0.0)
    assert decay_steps(run, TrainState(step=100, decay_window=(90, 120))) == 0
    # The schedule's own decay ends the run sooner.
    run.total_steps = 105
    assert decay_steps(run, TrainState(step=100)) == 0


def test_a_decay_by_the_clock_must_end_before_the_schedule_does() -> None:
    def steps(total_steps: int) -> int:
        run = make_trainer(tiny_model(), lr_schedule="wsd", decay_steps=10)
        run.total_steps = total_steps
        run.stop = StopRequest(END_SECONDS + 10.9 / 0.9, started=0.0, clock=lambda: 0.0)
        run.meter = SimpleNamespace(seconds_per_step=lambda: 1.0, seconds_of=lambda _: 0.0)
        return decay_steps(run, TrainState(step=100))

    assert [steps(110), steps(111)] == [0, 10]


@pytest.mark.parametrize(("asked", "end"), [(12.0, 52), (200.0, 100)])
def test_a_decay_by_the_clock_moves_the_end_of_the_run_once(asked: float, end: int) -> None:
    run, state, calls = make_trainer(tiny_model()), TrainState(step=40), []
    run.total_steps = 100
    run.progress = SimpleNamespace(
        advance=lambda step, loss: None,
        start=lambda *steps: calls.append(steps),
        note=lambda text: calls.append("--max-time" in text),
    )
    run.meter = SimpleNamespace(end_at=calls.append)
    for decay in (asked, 5.0):
        run.metrics.enqueue(record(40), torch.tensor([3.0, 0.0, decay, 1.0]))
        drain_metrics(run, state, everything=True)
    assert state.decay_window == (40, end)
    assert run.last_step == end
    assert sorted(map(str, calls)) == sorted(map(str, [end, (end, 40), True]))


def test_a_report_tells_the_share_of_the_epoch_that_is_done() -> None:
    run, _ = looped(4, log_interval=1)
    run.loader.sequences_per_epoch = 4 * SEQUENCES
    train(run, TrainState())
    epochs = [values["epoch"] for _, values in run.outputs.trackers.logged if "epoch" in values]
    assert epochs == [0.25, 0.5, 0.75, 1.0]


def test_a_rewind_resumes_with_the_counts_of_the_checkpoint_and_saves_at_once() -> None:
    run, done = make_trainer(tiny_model(), on_spike="rewind"), []
    run.state = TrainState(step=9, stopping=True)
    trackers = run.outputs.trackers
    run.meter.rewind = lambda step: done.append(("meter", step))
    run.outputs = SimpleNamespace(
        trackers=trackers,
        close=lambda: done.append(("closed",)),
        open=lambda step, ids: done.append(("opened", step, ids)),
    )
    run.reports.outputs = run.outputs
    run.checkpointer = SimpleNamespace(
        resume=lambda source: (TrainState(step=4), 4, {"board": "chart 7"}),
        save=lambda state: done.append(("save", state.step)),
    )
    run.rewind(SimpleNamespace(step=8, what="a spike", epoch=1, sequence=16, num_sequences=8))
    state = run.state
    assert (state.step, state.rewinds, state.excluded_sequences, state.stopping) == (4, 1, [[1, 16, 8]], True)
    assert done == [("closed",), ("opened", 4, {"board": "chart 7"}), ("meter", 4), ("save", 4)]
    assert run.checkpointer.trackers is trackers
    ((step, values),) = trackers.logged
    assert step == 4
    assert values == {
        "rewound_from": 8, "left_out_epoch": 1, "left_out_row": 16, "left_out_rows": 8, "rewinds": 1,
    }  # fmt: skip
