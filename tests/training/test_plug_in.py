"""Parts of the caller in a run: when they are called, what they may change, and what a resume needs."""

from __future__ import annotations

import dataclasses
import logging
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from minimind import CheckpointError, ConfigError, PretrainConfig, pretrain
from minimind.checkpoint.compatibility import compare_settings
from minimind.data.documents import CustomDocuments
from minimind.data.readers import Reading
from minimind.errors import DataError
from minimind.optim.build import build_custom_optimizer
from minimind.schedule import LearningRateSchedule
from minimind.tracking.metrics_file import read_metrics
from minimind.training.callbacks import Callbacks
from minimind.training.custom_parts import CustomParts
from support.tiny_runs import assert_same_end, last_checkpoint, tiny, write_corpus

STEPS = 10
# A step is saved before it is evaluated: a stop after step 8 falls between two of each.
OPTIONS: dict[str, Any] = {"max_steps": STEPS, "log_interval": 2, "save_interval": 4, "eval_interval": 4}


class Recorder:
    """Records every event, draws random numbers, and leaves the model in another mode."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.handlers: list[Any] = []

    def on_start(self, run: Any) -> None:
        self.handlers.append(signal.getsignal(signal.SIGINT))
        self._disturb(run)

    def on_report(self, run: Any, step: int, metrics: Mapping[str, Any]) -> None:
        assert run.step >= step
        self.events.append(["report", step, metrics["loss"]])
        self._disturb(run)

    def on_evaluation(self, run: Any, step: int, metrics: Mapping[str, Any]) -> None:
        self.events.append(["evaluation", step, metrics["val_loss"]])
        self._disturb(run)

    def on_save(self, run: Any, step: int, path: Path) -> None:
        run.wait_until_saved()
        assert (path / "manifest.json").is_file()
        self._disturb(run)

    def on_end(self, run: Any, result: Any) -> None:
        self.result = result

    def state_dict(self) -> dict[str, Any]:
        return {"events": self.events}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.events = state["events"]

    def _disturb(self, run: Any) -> None:
        assert not torch.is_grad_enabled()
        torch.manual_seed(0)
        torch.rand(3)
        run.model.eval()


class DrawsRandomNumbers(nn.Module):
    """A model whose forward pass uses the global generator."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 8)
        self.dropout = nn.Dropout(0.5)
        self.lm_head = nn.Linear(8, vocab_size, bias=False)

    def forward(self, input_ids: Any, shift_labels: Any = None, num_items_in_batch: int = 1, **_: Any) -> Any:
        from minimind.modeling.transformer import CausalLMOutput

        logits = self.lm_head(self.dropout(self.embedding(input_ids)))
        flat = (logits.flatten(0, 1), shift_labels.flatten())
        loss = nn.functional.cross_entropy(*flat, ignore_index=-100, reduction="sum")
        return CausalLMOutput(loss / num_items_in_batch, None)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture(scope="module")
def straight(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorder]:
    """A run with a callback, and nothing else."""
    out, recorder = tmp_path_factory.mktemp("straight"), Recorder()
    pretrain(tiny(corpus, out, **OPTIONS), callbacks=[recorder])
    return out, recorder


def test_a_callback_sees_every_event_and_the_result_its_history(straight: tuple[Path, Recorder]) -> None:
    out, recorder = straight
    steps = [(kind, step) for kind, step, _ in recorder.events]
    evaluations = [("evaluation", step) for step in (0, 4, 8, 10)]
    assert steps == sorted([*evaluations, *(("report", step) for step in (2, 4, 6, 8, 10))], key=_order)
    history, lines = recorder.result.history, read_metrics(out / "metrics.jsonl")
    assert history.steps.tolist() == [2, 4, 6, 8, 10]
    assert history.losses.tolist() == [line["loss"] for line in lines if "loss" in line]
    assert history.val_steps.tolist() == [0, 4, 8, 10]
    assert history.val_losses.tolist() == [
        value for kind, _, value in recorder.events if kind == "evaluation"
    ]
    assert len(history.learning_rates) == len(history.grad_norms) == len(history.tokens) == 5


def _order(event: tuple[str, int]) -> tuple[int, str]:
    return event[1], "report evaluation".partition(event[0])[0]


def test_a_callback_does_not_change_a_run_nor_break_its_resume(
    corpus: Path, tmp_path: Path, straight: tuple[Path, Recorder], capfd: pytest.CaptureFixture[str]
) -> None:
    out, recorder = straight
    config, before = tiny(corpus, tmp_path / "plain", **OPTIONS), signal.getsignal(signal.SIGINT)
    pretrain(config)
    assert_same_end(tmp_path / "plain", out)
    # A library writes nothing and leaves signals alone.
    assert capfd.readouterr() == ("", "")
    assert recorder.handlers == [before]
    # Stopped after a save whose evaluation follows, so that the state in the checkpoint lacks it.
    config = dataclasses.replace(config, output_dir=str(tmp_path / "resumed"))
    pretrain(config, callbacks=[Recorder()], stop_after=8)
    resumed = Recorder()
    pretrain(dataclasses.replace(config, resume="auto"), callbacks=[resumed])
    assert_same_end(tmp_path / "resumed", out)
    assert resumed.events == recorder.events


def test_random_numbers_of_a_callback_do_not_reach_the_model(corpus: Path, tmp_path: Path) -> None:
    losses = []
    for name, callbacks in (("with", [Recorder()]), ("without", [])):
        config = tiny(corpus, tmp_path / name, max_steps=4, log_interval=1, dropout=0.0)
        result = pretrain(
            config,
            callbacks=callbacks,
            model_factory=lambda model_config: DrawsRandomNumbers(model_config.vocab_size),
        )
        losses.append(result.history.losses.tolist())
    assert losses[0] == losses[1]


def test_an_exception_of_a_callback_is_raised_after_a_checkpoint(corpus: Path, tmp_path: Path) -> None:
    class Broken:
        calls = 0

        def on_report(self, run: Any, step: int, metrics: Mapping[str, Any]) -> None:
            self.calls += 1
            raise KeyError("no such thing")

    broken, other = Broken(), Recorder()
    config = tiny(corpus, tmp_path / "out", **{**OPTIONS, "save_interval": 1000})
    with pytest.raises(KeyError, match="no such thing") as caught:
        pretrain(config, callbacks=[broken, other])
    assert caught.value.__notes__ == ["raised by Broken.on_report, a callback of pretrain()"]
    assert broken.calls == 1
    step = last_checkpoint(tmp_path / "out").step
    assert 2 <= step < STEPS
    assert other.result.stopped == "an exception in Broken.on_report"
    assert not other.result.model_dir.exists()


def test_a_callback_that_fails_at_the_start_trains_nothing(corpus: Path, tmp_path: Path) -> None:
    class Broken:
        def on_start(self, run: Any) -> None:
            raise ValueError("not ready")

    with pytest.raises(ValueError, match="not ready"):
        pretrain(tiny(corpus, tmp_path / "out", max_steps=1), callbacks=[Broken()])
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_states_of_callbacks_are_named_by_class_and_missing_ones_noted() -> None:
    notes: list[str] = []
    saved = Callbacks([Recorder(), Recorder()]).state_dict()
    assert list(saved["states"]) == ["Recorder", "Recorder#2"]
    Callbacks([Recorder()]).load_state_dict(saved, notes.append)
    assert [note.partition(",")[0] for note in notes] == [
        "the checkpoint holds a state of the callback Recorder#2"
    ]
    Callbacks([Recorder()]).load_state_dict({}, notes.append)
    assert notes[1:] == ["the checkpoint holds no state of the callback Recorder; it starts without one."]
    with pytest.raises(ConfigError, match="has none of the methods on_start, on_report"):
        Callbacks([object()])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="has none of the methods"):
        Callbacks([Recorder])  # type: ignore[list-item]


def test_a_state_that_json_cannot_hold_is_an_exception_of_the_callback() -> None:
    recorder = Recorder()
    recorder.events.append(torch.zeros(1))
    callbacks = Callbacks([recorder])
    assert callbacks.state_dict()["states"] == {}
    with pytest.raises(TypeError, match="not JSON serializable"):
        callbacks.raise_error()


def test_a_run_with_parts_of_a_program_resumes_only_with_them(corpus: Path, tmp_path: Path) -> None:
    def sgd(model: nn.Module, config: PretrainConfig) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)

    def halves(step: int, total_steps: int) -> float:
        return 0.5 ** (step // 2)

    class Numbers:
        fingerprint = "numbers 1"

        def __iter__(self) -> Any:
            return iter([f"{number} and {number + 1}" for number in range(300)])

    parts: dict[str, Any] = {"optimizer": sgd, "schedule": halves, "data": Numbers()}
    config = tiny(corpus, tmp_path / "out", data=(), max_steps=6, log_interval=1)
    straight = dataclasses.replace(config, output_dir=str(tmp_path / "straight"))
    result = pretrain(straight, **parts)
    assert result.history.learning_rates.tolist() == pytest.approx([0.01, 0.01, 5e-3, 5e-3, 2.5e-3, 2.5e-3])
    pretrain(config, **parts, stop_after=3)
    again = dataclasses.replace(config, resume="auto")
    with pytest.raises(CheckpointError) as caught:
        pretrain(again)
    assert str(caught.value).endswith(
        "the run was trained with parts of a Python program (optimizer sgd, schedule halves, data Numbers); "
        "resume it there, by calling minimind.pretrain(config, optimizer=..., schedule=..., data=...) with "
        "them again."
    )
    pretrain(again, **parts)
    assert_same_end(tmp_path / "out", tmp_path / "straight")


@pytest.mark.parametrize(
    ("before", "now", "refused", "changed"),
    [
        ({}, {"optimizer": "lion"}, "optimizer= muon → lion: the saved optimizer state is of another", ""),
        ({"optimizer": "a"}, {"optimizer": "b"}, "optimizer= a → b: ", ""),
        ({"model_factory": "Net"}, {}, "(model_factory Net); resume it there", ""),
        ({}, {"schedule": "mine"}, "", "schedule= mine: takes effect from the next step."),
        ({"schedule": "mine"}, {"schedule": "mine"}, "", ""),
    ],
)
def test_which_parts_may_change(before: Any, now: Any, refused: str, changed: str) -> None:
    names = CustomParts().names(None)
    assert {*names.values(), *CustomParts().given.values()} == {None}
    saved = {"optimizer": "muon", "custom_parts": names | before}
    found = compare_settings(saved, {"optimizer": "muon", "custom_parts": names | now})
    assert [len(found[0]), len(found[1])] == [bool(refused), bool(changed)]
    assert refused in "".join(found[0])
    assert changed == "".join(found[1])
    # Checkpoints of earlier versions name no parts.
    assert compare_settings({"optimizer": "muon"}, {"custom_parts": names | {"optimizer": "x"}}) == ([], [])


def test_parts_that_contradict_the_options_are_refused_together() -> None:
    documents: Any = CustomDocuments
    custom = CustomParts(optimizer=lambda model, config: None, data=documents, schedule=3)  # type: ignore[arg-type,return-value]
    with pytest.raises(ConfigError) as caught:
        custom.check(PretrainConfig(data=("x.jsonl",), batch_size="auto"))
    assert [problem.partition(" ")[0] for problem in caught.value.problems] == [
        "--batch-size",
        "optimizer=",
        "data=",
        "schedule=",
    ]


def test_an_optimizer_whose_state_no_checkpoint_can_hold_fails_at_its_first_step() -> None:
    model, config = nn.Linear(2, 2), PretrainConfig(learning_rate=1.0)

    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            self.state[self.param_groups[0]["params"][0]]["calls"] = 1

    optimizer = build_custom_optimizer(lambda model, _: Counting(model.parameters(), lr=1.0), model, config)
    with pytest.raises(ConfigError, match="checkpoints cannot hold calls of the optimizer Counting; keep"):
        optimizer.step()
    fine = build_custom_optimizer(
        lambda model, _: torch.optim.Adam(model.parameters(), lr=torch.tensor(1.0)), model, config
    )
    model(torch.ones(1, 2)).sum().backward()
    fine.step()
    with pytest.raises(ConfigError, match="returned a dict; return a"):
        build_custom_optimizer(lambda model, _: {}, model, config)  # type: ignore[arg-type,return-value]
    others = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="no parameters of the model"):
        build_custom_optimizer(lambda *_: torch.optim.SGD(others.parameters(), lr=1.0), model, config)


@pytest.mark.parametrize("factor", [None, "fast", -0.1, float("nan"), float("inf")])
def test_a_schedule_that_returns_no_usable_number_is_named(factor: Any) -> None:
    schedule = LearningRateSchedule(PretrainConfig(), 10, custom=lambda step, total_steps: factor)
    with pytest.raises(ConfigError, match=r"schedule= returned .* for step 7; return a fraction"):
        schedule.at(7)


def test_documents_of_the_caller_are_checked() -> None:
    class Mixed:
        fingerprint = "1"

        def __iter__(self) -> Any:
            return iter(["one", " ", b"two"])

    reading, found = Reading(), []
    with pytest.raises(DataError, match="data=: document 3 is a bytes; yield the text"):
        found += CustomDocuments(Mixed()).documents(reading)
    assert reading.empty == 1
    with pytest.raises(ConfigError, match="data= got a list; it must yield documents"):
        _ = CustomDocuments(["a"]).fingerprint  # type: ignore[arg-type]


def test_a_quiet_run_logs_its_warnings(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, logger="minimind")
    config = tiny(corpus, tmp_path / "out", max_steps=1, resume="auto")
    pretrain(config)
    assert "--resume: no checkpoint in" in caplog.text
    assert capfd.readouterr().out == ""
