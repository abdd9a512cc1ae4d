"""Loss spikes: detection, the report of their documents, skip and rewind.

Run as a script this is one process of several.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trainer import make_trainer, record, step_batch, tiny_model, train

from minimind import PretrainConfig, load_tokenizer
from minimind.checkpoint.checkpointer import RunCheckpoints
from minimind.checkpoint.files import stored_checkpoints
from minimind.checkpoint.train_state import TrainState
from minimind.data.loader import MicroBatch
from minimind.errors import TrainingError
from minimind.optim.build import build_optimizer, skip_if_nonfinite
from minimind.training import loss_spikes as spikes_module
from minimind.training import step as step_module
from minimind.training.async_metrics import DELAY_STEPS
from minimind.training.loss_spikes import MAX_REWINDS, MIN_STEPS, WINDOW, append_loss, spike_threshold
from minimind.training.trainer import MAX_SKIPPED_IN_A_ROW, Trainer
from support.tiny_runs import pretrain_as_command as pretrain

pretrain_module = importlib.import_module("minimind.training.pretrain")

# In no other document there is this token.
MARKER = "猫"
POISON = f"{MARKER} zyx qpl ## vbn 8841 wkj }} ~~ ghf == mnb 5097 xcv << lkj !!"
SENTENCE = "the cat sat on a mat while rain fell over quiet hills and nobody asked why it was so"
WORDS = SENTENCE.split()
STEPS = 46


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models as small as these are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- when a loss jumps ---------------------------------------------------------------------------------


def falling_losses(seed: int, steps: int, noise: float, decay: float = 150.0) -> list[float]:
    rng = np.random.default_rng(seed)
    return (3.0 + 6.0 * np.exp(-np.arange(steps) / decay) + rng.normal(0, noise, steps)).tolist()


def alarms(losses: list[float], sigma: float = 8.0) -> tuple[list[int], list[float]]:
    """Return the steps, from 0, that are above their limit, and all limits."""
    recent: list[float] = []
    limits = []
    for loss in losses:
        limits.append(spike_threshold(recent, 0, sigma))
        append_loss(recent, loss)
    pairs = zip(losses, limits, strict=True)
    return [step for step, (loss, limit) in enumerate(pairs) if not loss <= limit], limits


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    noise=st.sampled_from([0.0, 0.02, 0.1, 0.5]),
    decay=st.sampled_from([30.0, 150.0, 1000.0]),
)
def test_a_noisy_falling_loss_raises_no_alarm(seed: int, noise: float, decay: float) -> None:
    found, limits = alarms(falling_losses(seed, 500, noise, decay))
    assert found == []
    assert sum(map(math.isfinite, limits)) == 500 - MIN_STEPS - DELAY_STEPS


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    at=st.integers(MIN_STEPS + DELAY_STEPS, 400),
    noise=st.sampled_from([0.02, 0.1]),
)
def test_an_injected_jump_is_found_where_it_is_and_nowhere_else(seed: int, at: int, noise: float) -> None:
    losses = falling_losses(seed, 450, noise, decay=30.0)
    # So far above the curve that not even the fall at the start hides it.
    losses[at] += 12.0
    assert alarms(losses)[0] == [at]


def test_a_small_jump_is_found_once_the_curve_is_flat() -> None:
    losses = falling_losses(1, 600, 0.05, decay=50.0)
    losses[500] += 12 * 0.05
    losses[510] -= 20 * 0.05
    assert alarms(losses)[0] == [500]


def test_what_is_not_finite_always_stands_out_and_moves_no_limit() -> None:
    clean = falling_losses(2, 400, 0.1)
    spoilt = list(clean)
    spoilt[50], spoilt[300] = math.nan, math.inf
    found, limits = alarms(spoilt)
    assert set(found) == {50, 300}
    assert limits[380] == pytest.approx(alarms(clean)[1][380], rel=0.02)


def test_the_limit_is_median_and_median_absolute_deviation() -> None:
    losses = np.random.default_rng(0).gamma(3.0, 1.0, 300)
    recent: list[float] = []
    for loss in losses:
        append_loss(recent, float(loss))
    window = losses[-WINDOW - DELAY_STEPS : -DELAY_STEPS]
    centre = np.median(window)
    deviation = 1.4826 * np.median(np.abs(window - centre))
    assert spike_threshold(recent, 0, 5.0) == pytest.approx(centre + 5 * deviation, rel=1e-12)
    assert spike_threshold(recent, 0, 5.0, batch_fraction=0.25) == pytest.approx(
        centre + 10 * deviation, rel=1e-12
    )


def test_the_limit_does_not_depend_on_how_many_losses_are_still_on_their_way() -> None:
    recent: list[float] = []
    for loss in falling_losses(4, 200, 0.2):
        append_loss(recent, loss)
    limits = {
        spike_threshold(recent[: len(recent) - unread], unread, 8.0) for unread in range(DELAY_STEPS + 1)
    }
    assert len(limits) == 1
    assert math.isfinite(limits.pop())


def test_few_losses_are_remembered_and_none_that_matters_is_forgotten() -> None:
    losses = falling_losses(5, 1000, 0.2)
    recent: list[float] = []
    for loss in losses:
        append_loss(recent, loss)
    assert len(recent) == WINDOW + DELAY_STEPS
    assert spike_threshold(recent, 0, 8.0) == spike_threshold(losses, 0, 8.0)


# --- an update left out on the device ------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("loss", "limit", "stepped"),
    [
        (2.0, 3.0, True),
        (3.0, 3.0, True),
        (3.5, 3.0, False),
        (math.nan, math.inf, False),
        (math.inf, math.inf, False),
    ],
)
def test_an_update_is_skipped_for_a_loss_above_the_limit_or_not_finite(
    fused: bool, loss: float, limit: float, stepped: bool
) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=fused)
    parameter.grad = torch.ones(3)
    skip_if_nonfinite(optimizer, torch.tensor(1.0), torch.tensor(loss), limit=limit)
    optimizer.step()
    assert bool((parameter != 1).any()) == stepped


@pytest.mark.parametrize(("loss", "stepped"), [(2.0, True), (3.5, False)])
def test_under_an_fp16_scaler_a_loss_above_the_limit_is_skipped_too(loss: float, stepped: bool) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    optimizer.scaler = torch.amp.GradScaler("cpu")  # as on an optimizer that Accelerate prepared
    optimizer.scaler.scale(parameter.sum()).backward()
    optimizer.scaler.unscale_(optimizer)
    skip_if_nonfinite(optimizer, torch.tensor(1.0), torch.tensor(loss), limit=3.0)
    optimizer.scaler.step(optimizer)
    optimizer.scaler.update()
    assert bool((parameter != 1).any()) == stepped
    assert optimizer.scaler.get_scale() == 2.0**16


def adamw_run(on_spike: str, lag: int = 0) -> Trainer:
    model = tiny_model()
    run = make_trainer(model, on_spike=on_spike, save_interval=100)
    run.optimizer = run.accelerator.prepare(build_optimizer(model, run.config, torch.device("cpu")))
    run.schedule = SimpleNamespace(at=lambda step, window: 1e-3)
    run.metrics._delay = lag
    return run


def everything(run: Trainer) -> list[torch.Tensor]:
    """Weights and moments."""
    moments = [value for fields in run.optimizer.optimizer.state.values() for value in fields.values()]
    return [*(p.detach().clone() for p in run.model.parameters()), *moments]


def train_on(run: Trainer, seeds: list[int]) -> TrainState:
    run.loader = SimpleNamespace(
        sequences_per_epoch=10**6,
        steps=lambda epoch, sequence, epochs: iter([step_batch(seed, 8) for seed in seeds]),
    )
    run.total_steps = len(seeds)
    rng = np.random.default_rng(0)
    usual = (math.log(97) + rng.normal(0, 0.05, WINDOW + DELAY_STEPS)).tolist()
    state = TrainState(recent_losses=usual)
    train(run, state)
    return state


@pytest.fixture
def third_loss_is_tenfold(monkeypatch: pytest.MonkeyPatch) -> None:
    marked = step_batch(3, 8).micro_batches[0].input_ids
    original = step_module.forward_loss

    def forward_loss(model: torch.nn.Module, batch: MicroBatch, *rest: Any) -> torch.Tensor:
        return original(model, batch, *rest) * (10 if torch.equal(batch.input_ids, marked) else 1)

    monkeypatch.setattr(step_module, "forward_loss", forward_loss)


@pytest.mark.usefixtures("third_loss_is_tenfold")
@pytest.mark.parametrize("lag", [0, 2])
def test_a_skipped_spike_leaves_no_trace_in_weights_and_moments(lag: int) -> None:
    """Values that come two steps later, as from a GPU, change nothing: the device decides by itself."""
    run = adamw_run("skip", lag)
    state = train_on(run, [1, 2, 3, 4, 5])
    without = adamw_run("skip")
    train_on(without, [1, 2, 4, 5])
    assert state.skipped_steps == 1
    assert [text for text in run.progress.warnings if "step 3: the loss jumped" in text and "skipped" in text]
    pairs = list(zip(everything(run), everything(without), strict=True))
    assert len(pairs) > 20
    for ours, theirs in pairs:
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("third_loss_is_tenfold")
def test_a_reported_spike_is_trained_on() -> None:
    run, without = adamw_run("report"), adamw_run("report")
    state = train_on(run, [1, 2, 3, 4, 5])
    train_on(without, [1, 2, 4, 5])
    assert state.skipped_steps == 0
    assert any("step 3: the loss jumped" in text for text in run.progress.warnings)
    pairs = zip(everything(run), everything(without), strict=True)
    assert not all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_skipping_step_after_step_ends_with_advice() -> None:
    run = adamw_run("skip")
    run.loader = SimpleNamespace(
        sequences_per_epoch=10**6,
        steps=lambda epoch, sequence, epochs: (step_batch(seed, 8) for seed in range(100)),
    )
    run.total_steps = 100
    with pytest.raises(TrainingError, match=f"{MAX_SKIPPED_IN_A_ROW} updates in a row.*--learning-rate"):
        train(run, TrainState(recent_losses=[1.0] * (WINDOW + DELAY_STEPS)))


# --- whole runs ----------------------------------------------------------------------------------------


def write_corpus(path: Path, documents: int, poisoned: int) -> Path:
    """Words in a fixed cycle, and one document that is unlike all others."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(documents):
            start = number % len(WORDS)
            text = " ".join((WORDS * 4)[start : start + 24 + number % 11])
            file.write(json.dumps({"text": POISON if number == poisoned else f"{text} {number}."}) + "\n")
    return path


def tiny(corpus: Path, out: Path, **changes: Any) -> PretrainConfig:
    return dataclasses.replace(
        PretrainConfig(
            data=(str(corpus),),
            cache_dir=str(corpus.parent / "cache"),
            output_dir=str(out),
            val_fraction=0.0,
            max_seq_len=64,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            batch_size=2,
            epochs=1,
            learning_rate=1e-2,
            log_interval=1,
            save_interval=7,
            keep_checkpoints=3,
            tracker=("none",),
            compile=False,
        ),
        **changes,
    )


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def reports(out: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "spikes").glob("*.json"))]


def saved_state(out: Path, number: int = -1) -> dict[str, Any]:
    return dict(stored_checkpoints(out / "checkpoints")[number].trainer["state"])


def marker_token() -> int:
    tokenizer = load_tokenizer(None)
    token = tokenizer.encode(MARKER)[0]
    assert token not in tokenizer.encode(" ".join([*WORDS, *map(str, range(1000))]))
    return token


class Poison:
    """Makes the loss of sequences with the marker what `factor` says, and counts such micro-batches."""

    def __init__(self, factor: float) -> None:
        self.factor, self.met = factor, 0
        self.after_meeting: Callable[[], None] = lambda: None
        self._token, self._forward_loss = marker_token(), step_module.forward_loss

    def __call__(self, model: torch.nn.Module, batch: MicroBatch, *rest: Any) -> torch.Tensor:
        loss = self._forward_loss(model, batch, *rest)
        if (batch.input_ids == self._token).any():
            self.met += 1
            return loss * self.factor
        if self.met:
            self.after_meeting()
        return loss


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 50 steps an epoch; the marker comes in step 41."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", 130, poisoned=100)


@pytest.fixture
def nan_poison(monkeypatch: pytest.MonkeyPatch) -> Poison:
    poison = Poison(math.nan)
    monkeypatch.setattr(step_module, "forward_loss", poison)
    return poison


@pytest.mark.parametrize("packing", [True, False])
def test_a_document_that_spikes_is_named_first_with_its_text(
    tmp_path: Path, packing: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """No trick: text unlike the rest raises the loss of its step, late enough for the rest to be learnt."""
    corpus = write_corpus(tmp_path / "corpus.jsonl", 620 if packing else 400, poisoned=0)
    size = {} if packing else {"max_seq_len": 48, "batch_size": 2}
    pretrain(
        tiny(
            corpus,
            tmp_path / "out",
            packing=packing,
            seed=SEED[packing],
            optimizer="muon",
            max_steps=145,
            save_interval=1000,
            **size,
        )
    )
    (report,) = reports(tmp_path / "out")
    first, second = report["documents"][:2]
    assert POISON in first["text"]
    assert first["loss"] > second["loss"] + 2
    assert report["loss"] > report["limit"]
    assert report["step"] > MIN_STEPS
    assert not report["update_skipped"]
    line = next(row for row in lines(tmp_path / "out") if row["step"] == report["step"])
    for ours, theirs in (("loss", "loss"), ("learning_rate", "learning_rate"), ("grad_norm", "grad_norm")):
        assert report[ours] == pytest.approx(line[theirs])
    assert sum(one["tokens"] for one in report["documents"]) <= 2 * 64
    path = tmp_path / "out" / "spikes" / f"step-{report['step']:08d}.json"
    assert f"its documents are in {path}." in capsys.readouterr().out


# With these the text comes after step 102, in an order that never changes.
SEED = {True: 2, False: 7}


def test_weights_that_are_not_finite_are_traced_to_the_text_that_uses_them(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also: such a state is never saved, the run says so and goes on."""
    original = Trainer.train_step

    def train_step(run: Trainer, batch: Any, limit: float) -> torch.Tensor:
        if run.state.step == 10:
            with torch.no_grad():
                run.model.get_input_embeddings().weight[marker_token()] = math.nan
        return original(run, batch, limit)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    monkeypatch.setattr(pretrain_module, "save_final_model", lambda *args: None)
    monkeypatch.setattr(pretrain_module, "write_sample", lambda *args: "")
    out = tmp_path / "out"
    result = pretrain(tiny(corpus, out, tie_word_embeddings=False, max_steps=STEPS))
    assert result.steps == STEPS
    assert [entry.step for entry in stored_checkpoints(out / "checkpoints")] == [7]
    assert "embed_tokens.weight is not finite" in capsys.readouterr().out
    (report,) = reports(out)
    assert report["loss"] is None
    assert report["update_skipped"]
    culprits = [one for one in report["documents"] if one["loss"] is None]
    assert any(MARKER in one["text"] for one in culprits)
    # A NaN reaches what lies in the same sequence, through a masked place times zero, and no further.
    assert len({one["row"] for one in culprits}) == 1
    assert len(report["documents"]) > len(culprits)
    assert report["documents"][: len(culprits)] == culprits


def test_a_report_that_cannot_be_written_does_not_end_the_run(
    corpus: Path, tmp_path: Path, nan_poison: Poison, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "spikes").write_text("in the way")
    result = pretrain(tiny(corpus, tmp_path / "out"))
    assert nan_poison.met == 1
    assert result.steps > 20
    assert "could not be written" in capsys.readouterr().out


def rows_met(out: Path) -> list[int]:
    (report,) = reports(out)
    return [report["epoch"], report["row"], report["rows"]]


@pytest.mark.parametrize("factor", [math.nan, 50.0])
@pytest.mark.parametrize("lag", [0, 2])
def test_a_rewind_excludes_the_sequences_as_if_they_had_never_been(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, lag: int
) -> None:
    poison = Poison(factor)
    monkeypatch.setattr(step_module, "forward_loss", poison)
    # So that a jump is known within this short run.
    monkeypatch.setattr(spikes_module, "MIN_STEPS", 5)
    monkeypatch.setattr("minimind.training.outputs.SAMPLE_TOKENS", 4)
    original = Trainer.train

    def train_with_lag(run: Trainer) -> None:
        run.metrics._delay = lag
        original(run)

    monkeypatch.setattr(Trainer, "train", train_with_lag)
    out = tmp_path / "out"
    result = pretrain(tiny(corpus, out, on_spike="rewind", max_steps=STEPS, dropout=0.1, sample_interval=2))
    state = saved_state(out)
    assert (result.steps, poison.met, state["rewinds"], state["step"]) == (STEPS, 1, 1, STEPS)
    assert state["left_out"] == [rows_met(out)]
    assert MARKER in json.dumps(reports(out)[0]["documents"], ensure_ascii=False)
    (rewound,) = [row for row in lines(out) if row["kind"] == "rewind"]
    assert rewound["rewound_from"] == reports(out)[0]["step"]
    assert rewound["step"] == rewound["rewound_from"] - 1 - (rewound["rewound_from"] - 1) % 7
    assert [rewound[f"left_out_{name}"] for name in ("epoch", "row", "rows")] == state["left_out"][0]
    assert [row["step"] for row in lines(out) if "loss" in row] == list(range(1, STEPS + 1))
    samples = map(json.loads, (out / "samples.jsonl").read_text(encoding="utf-8").splitlines())
    assert [sample["step"] for sample in samples] == list(range(2, STEPS + 1, 2))

    # The same run without these sequences from the first step on.
    take_up = RunCheckpoints.resume

    def leave_out(*args: Any, **options: Any) -> Any:
        fresh, saved_step, trackers = take_up(*args, **options)
        fresh.excluded_sequences = state["left_out"]
        return fresh, saved_step, trackers

    monkeypatch.setattr(RunCheckpoints, "resume", leave_out)
    pretrain(tiny(corpus, tmp_path / "never", on_spike="rewind", max_steps=STEPS, dropout=0.1))
    assert poison.met == 1
    ours, theirs = (stored_checkpoints(path / "checkpoints")[-1] for path in (out, tmp_path / "never"))
    for kind in ("weights", "optimizer_state"):
        mine, other = getattr(ours, kind)(), getattr(theirs, kind)()
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_a_run_resumed_after_a_rewind_still_excludes_the_sequences(
    corpus: Path, tmp_path: Path, nan_poison: Poison
) -> None:
    out = tmp_path / "out"

    def cut_power() -> None:
        raise RuntimeError("power cut")

    nan_poison.after_meeting = cut_power
    config = tiny(corpus, out, on_spike="rewind", max_steps=STEPS)
    with pytest.raises(RuntimeError, match="power cut"):
        pretrain(config)
    assert nan_poison.met == 1
    nan_poison.after_meeting = lambda: None
    result = pretrain(dataclasses.replace(config, resume="auto"))
    assert (result.steps, nan_poison.met) == (STEPS, 1)
    assert saved_state(out)["left_out"] == [rows_met(out)]
    assert saved_state(out)["rewinds"] == 1


def test_a_run_that_goes_back_again_and_again_ends_with_advice(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = step_module.forward_loss
    monkeypatch.setattr(step_module, "forward_loss", lambda *args: original(*args) * math.nan)
    out = tmp_path / "out"
    with pytest.raises(TrainingError, match=f"after {MAX_REWINDS} rewinds.*learning_rate.*on_spike skip"):
        pretrain(tiny(corpus, out, on_spike="rewind"))
    state = saved_state(out)
    assert state["step"] == 0  # there was nothing else to go back to
    assert state["left_out"] == [[0, 2 * number, 2] for number in range(MAX_REWINDS)]
    assert len(reports(out)) == MAX_REWINDS + 1


def test_going_back_does_not_take_a_checkpoint_that_was_given_up(
    corpus: Path, tmp_path: Path, nan_poison: Poison
) -> None:
    out = tmp_path / "out"
    nan_poison.factor = 1.0
    pretrain(tiny(corpus, out, max_steps=STEPS, save_interval=4, keep_checkpoints=20))
    nan_poison.factor, nan_poison.met = math.nan, 0
    first = str(out / "checkpoints" / "step-00000004")
    config = tiny(corpus, out, max_steps=STEPS, save_interval=100, on_spike="rewind", resume=first)
    pretrain(config)
    assert nan_poison.met == 1
    (rewound,) = [row for row in lines(out) if row["kind"] == "rewind"]
    assert rewound["rewound_from"] > 8
    assert rewound["step"] == 4


# --- several processes ---------------------------------------------------------------------------------


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize("on_spike", ["skip", "rewind"])
def test_two_processes_decide_alike(corpus: Path, tmp_path: Path, nan_poison: Poison, on_spike: str) -> None:
    """Only one of them has the text, in a separate micro-batch."""
    folder = tmp_path / "two"
    folder.mkdir()
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", "0", __file__, str(corpus), str(folder), on_spike]
    paths = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1]), *sys.path]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (json.loads((folder / f"process-{rank}.json").read_text()) for rank in range(2))
    assert sorted((one.pop("met"), other.pop("met"))) == [0, 1]
    assert one == other

    pretrain(tiny(corpus, tmp_path / "alone", on_spike=on_spike, max_steps=STEPS))
    alone = saved_state(tmp_path / "alone")
    for name in ("step", "epoch", "row", "tokens", "skipped_steps", "left_out", "rewinds"):
        assert one["state"][name] == alone[name]
    assert one["state"]["rewinds"] + one["state"]["skipped_steps"] >= 1
    (ours,), (theirs,) = reports(folder / "out"), reports(tmp_path / "alone")
    assert {(d["document"], d["row"], d["start"]) for d in ours["documents"]} == {
        (d["document"], d["row"], d["start"]) for d in theirs["documents"]
    }


def one_of_several(corpus: Path, folder: Path, on_spike: str) -> None:
    torch.set_num_threads(1)
    poison = Poison(math.nan)
    step_module.forward_loss = poison
    original = Trainer.train

    def train_and_tell(run: Trainer) -> None:
        original(run)
        total = sum(p.detach().double().abs().sum().item() for p in run.model.parameters())
        found = {"state": run.state.to_dict(), "weights": total, "met": poison.met}
        name = f"process-{run.accelerator.process_index}.json"
        (folder / name).write_text(json.dumps(found))

    Trainer.train = train_and_tell
    config = tiny(corpus, folder / "out", on_spike=on_spike, max_steps=STEPS, batch_size=1)
    pretrain(config)
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort an ordinary exit


if __name__ == "__main__":
    one_of_several(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])


@pytest.mark.parametrize(
    ("scaled", "loss_sum", "norm", "reported"),
    [
        (True, 1.0, math.inf, False),  # the scaler searches its scale
        (True, 1.0, math.nan, False),
        (True, 9.0, 1.0, True),
        (True, math.nan, math.nan, True),
        (False, 1.0, math.inf, True),
        (False, 9.0, 1.0, True),
    ],
)
def test_with_a_scaler_an_overflowing_gradient_alone_blames_no_data(
    scaled: bool, loss_sum: float, norm: float, reported: bool
) -> None:
    run = adamw_run("report")
    run.accelerator.scaler = torch.amp.GradScaler("cpu") if scaled else None
    spikes: list[Any] = []
    run.spikes = SimpleNamespace(report=lambda spike: spikes.append(spike) or "")  # type: ignore[assignment]
    run._handle_spike(dataclasses.replace(record(3), limit=5.0), loss_sum, norm)
    assert bool(spikes) == reported
    assert len(run.progress.warnings) == 1
