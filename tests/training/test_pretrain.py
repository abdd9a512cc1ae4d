"""A whole run from text to a model folder, on the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import signal
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind import (
    CheckpointError,
    ConfigError,
    DataError,
    PretrainConfig,
    load_tokenizer,
    preset_config,
)
from minimind.config.options import CONFIG_SECTIONS
from minimind.config.presets import resolve
from minimind.config.schema import parse_values, read_toml, write_toml
from minimind.data.shards import random_shards
from minimind.tracking.console import Progress
from minimind.training.setup import resolve_run
from minimind.training.summary import PretrainResult
from minimind.training.time_limits import END_SECONDS
from minimind.training.trainer import Trainer
from support.cycle_corpus import WORDS, write_corpus
from support.step_clock import StepClock
from support.tiny_runs import pretrain_as_command as pretrain


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


def tiny(corpus: Path, out: Path, **changes: Any) -> PretrainConfig:
    return dataclasses.replace(
        PretrainConfig(
            data=(str(corpus),),
            cache_dir=str(corpus.parent / "cache"),
            output_dir=str(out),
            val_fraction=0.1,
            max_seq_len=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            batch_size=4,
            epochs=3,
            learning_rate=1e-2,
            weight_decay=0.1,
            log_interval=5,
            save_interval=10,
            compile=False,
        ),
        **changes,
    )


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PretrainResult]:
    out = tmp_path_factory.mktemp("runs") / "finished"
    return out, pretrain(tiny(corpus, out))


def test_the_loss_falls_and_the_result_says_so(finished: tuple[Path, PretrainResult]) -> None:
    out, result = finished
    evaluations = [row["val_bits_per_byte"] for row in metrics(out) if "val_bits_per_byte" in row]
    assert evaluations[-1] < 0.7 * evaluations[0]
    assert result.val_loss is not None
    assert result.bits_per_byte == pytest.approx(evaluations[-1])
    assert math.log(6400) * 0.9 < metrics(out)[0]["val_loss"] < math.log(6400) * 1.15
    assert result.steps > 0
    assert result.tokens > 0
    assert isinstance(result.sample, str)


def test_a_run_leaves_what_is_promised(finished: tuple[Path, PretrainResult]) -> None:
    out, result = finished
    assert result.model_dir == out / "model"
    for name in (
        "config.toml",
        "environment.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "report.html",
    ):
        assert (out / name).exists(), name
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        assert (out / "model" / name).is_file(), name
    assert (out / "model" / "tokenizer_config.json").is_file()
    environment = json.loads((out / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert list((out / "tensorboard").rglob("events.*"))
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"Step {result.steps:,} of {result.steps:,} (100%). The model is saved." in page
    assert f"<dt>Validation loss</dt><dd>{result.val_loss:.4f}</dd>" in page
    assert "--hidden-size" in page


def test_the_written_configuration_reads_back(finished: tuple[Path, PretrainResult], corpus: Path) -> None:
    out, _ = finished
    text = (out / "config.toml").read_text()
    tomllib.loads(text)
    values, problems = parse_values(PretrainConfig, read_toml(out / "config.toml"), "config.toml")
    assert problems == []
    assert write_toml(PretrainConfig(**values), CONFIG_SECTIONS) == text
    assert values["data"] == (str(corpus),)


def test_transformers_loads_the_model_and_gives_our_logits(finished: tuple[Path, PretrainResult]) -> None:
    transformers = pytest.importorskip("transformers")
    from minimind.formats.huggingface import load_model

    out, _ = finished
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32).eval()
    ours = load_model(out / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    text = "the cat sat on a mat, 猫坐在垫子上。"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    assert ids[0].tolist() == load_tokenizer(None).encode(text)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_the_delivered_model_has_the_validation_loss_that_was_reported(
    finished: tuple[Path, PretrainResult],
) -> None:
    """The last update is in the delivered model; half precision costs little."""
    from minimind.formats.huggingface import load_model

    out, result = finished
    model = load_model(out / "model").eval()
    tokenizer = load_tokenizer(None)
    ids = [tokenizer.bos_token_id, *tokenizer.encode(" ".join(WORDS * 2))]
    with torch.no_grad():
        loss = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    assert result.val_loss is not None
    assert loss < result.val_loss + 1.0


def test_an_existing_run_is_not_overwritten(finished: tuple[Path, PretrainResult], corpus: Path) -> None:
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(ConfigError, match=r"^output_dir .* already holds a run.*resume"):
        pretrain(tiny(corpus, out))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_the_same_seed_gives_the_same_losses(corpus: Path, tmp_path: Path) -> None:
    def losses(name: str, seed: int) -> list[float]:
        pretrain(tiny(corpus, tmp_path / name, seed=seed, max_steps=8, dropout=0.1, log_interval=2))
        return [row["loss"] for row in metrics(tmp_path / name) if "loss" in row]

    assert losses("a", 1) == losses("b", 1)
    assert losses("c", 2) != losses("d", 1)


def test_training_starts_from_the_weights_of_a_model_folder(
    finished: tuple[Path, PretrainResult], corpus: Path, tmp_path: Path
) -> None:
    _, result = finished
    pretrain(tiny(corpus, tmp_path / "more", from_weight=str(result.model_dir), max_steps=2))
    first = next(row for row in metrics(tmp_path / "more") if "val_loss" in row)
    assert result.val_loss is not None
    assert first["val_loss"] == pytest.approx(result.val_loss, abs=0.3)


def test_a_model_folder_of_another_shape_is_refused_with_both_shapes(
    finished: tuple[Path, PretrainResult], corpus: Path, tmp_path: Path
) -> None:
    _, result = finished
    with pytest.raises(ConfigError, match=r"^num_hidden_layers 3.*from_weight.*2"):
        pretrain(tiny(corpus, tmp_path / "other", from_weight=str(result.model_dir), num_hidden_layers=3))
    assert not (tmp_path / "other" / "metrics.jsonl").exists()


def test_every_size_that_is_given_beside_weights_must_be_theirs(
    finished: tuple[Path, PretrainResult],
) -> None:
    """Also one that equals the default, as an argument, typed, or in a file."""
    weights: dict[str, Any] = {"from_weight": str(finished[1].model_dir), "max_seq_len": 32}

    def ways(**given: Any) -> list[PretrainConfig]:
        values = weights | given
        return [PretrainConfig(**values), resolve(flags=values), resolve(file=given, flags=weights)]

    for config in (*ways(), *ways(hidden_size=32, tie_word_embeddings=True, use_moe=False)):
        resolved = resolve_run(config).config
        assert (resolved.hidden_size, resolved.num_hidden_layers, resolved.use_moe) == (32, 2, False)
    for name, value in (
        ("num_hidden_layers", 8),
        ("hidden_size", 512),
        ("rope_theta", 1e4),
        ("use_moe", True),
    ):
        for config in ways(**{name: value}):
            with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} .*contradicts --from-weight"):
                resolve_run(config)
    with pytest.raises(ConfigError, match=r"--num-hidden-layers 8 contradicts .* or the preset"):
        resolve_run(resolve(preset="minimind2-small", flags=weights))
    # --print-config prints a command that means the same.
    config = resolve(flags=weights)
    assert resolve(file=tomllib.loads(write_toml(config, CONFIG_SECTIONS))) == config


def test_trained_weights_continue_at_a_lower_rate(
    finished: tuple[Path, PretrainResult], tmp_path: Path
) -> None:
    weights = {"from_weight": str(finished[1].model_dir), "max_seq_len": 32}
    train = random_shards(tmp_path / "random", 100)
    notes: list[str] = []

    def rates(**options: Any) -> tuple[float | None, float | None]:
        inputs = resolve_run(PretrainConfig(**options)).with_learning_rate(train, 1, notes.append)
        return inputs.config.learning_rate, inputs.config.weight_decay

    rate, decay = rates(hidden_size=32, max_seq_len=32)
    assert rate is not None
    lower, same = rates(**weights)
    assert lower == pytest.approx(0.3 * rate)
    assert same == decay
    assert [note for note in notes if f"{lower:g} (default: 0.3 times that of random weights)" in note]
    assert rates(**weights, learning_rate=0.5, weight_decay=0.7) == (0.5, 0.7)


def test_a_run_that_goes_on_for_longer_keeps_its_rates(corpus: Path, tmp_path: Path) -> None:
    config = tiny(corpus, tmp_path / "out", learning_rate=None, weight_decay=None, max_steps=10)

    def rates(config: PretrainConfig) -> tuple[float, float]:
        pretrain(config)
        written = read_toml(Path(config.output_dir) / "config.toml")
        return written["learning_rate"], written["weight_decay"]

    short = rates(config)
    longer = dataclasses.replace(config, max_steps=20)
    assert rates(dataclasses.replace(longer, resume="auto")) == short
    assert rates(dataclasses.replace(longer, output_dir=str(tmp_path / "new"))) != short


def test_padded_sequences_train_too(corpus: Path, tmp_path: Path) -> None:
    result = pretrain(tiny(corpus, tmp_path / "padded", packing=False, max_steps=20))
    assert result.steps == 20
    evaluations = [row["val_loss"] for row in metrics(tmp_path / "padded") if "val_loss" in row]
    assert evaluations[-1] < evaluations[0] - 0.5


@pytest.mark.slow
def test_two_weighted_sources_train_and_resume_as_one_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (write_corpus(tmp_path / f"{name}.jsonl", 20) for name in ("first", "second"))
    weighted = tiny(
        first,
        tmp_path / "whole",
        data=(f"{first}:0.6", f"{second}:0.4"),
        epochs=2,
        optimizer="muon",  # NorMuon would depend on the length of the first part
        lr_schedule="constant",
        warmup_steps=0,
        log_interval=1,
        save_interval=100,
    )
    result = pretrain(weighted)
    said = capsys.readouterr().out
    assert f"mixture:   {first}: 60.0% of the tokens, 2.4" in said
    assert f"mixture:   {second}: 40.0% of the tokens, 1.6" in said

    def losses(out: Path) -> dict[int, float]:
        return {row["step"]: row["loss"] for row in metrics(out) if "loss" in row}

    # Stopped in the middle of the first epoch, and of the passes of both entries.
    out = tmp_path / "parts"
    pretrain(dataclasses.replace(weighted, output_dir=str(out), max_steps=result.steps // 2 - 3))
    again = dataclasses.replace(weighted, output_dir=str(out), resume="auto")
    with pytest.raises(
        CheckpointError, match=r"data mixture 60% of \d+ doc.* → 50% of .* same data and mixture weights"
    ):
        pretrain(dataclasses.replace(again, data=(f"{first}:0.5", f"{second}:0.5")))
    with pytest.raises(CheckpointError, match=r"data mixture 60% .* → none"):
        pretrain(dataclasses.replace(again, data=(str(first), str(second))))
    # The same shares in other numbers are the same mixture.
    pretrain(dataclasses.replace(again, data=(f"{first}:3", f"{second}:2")))
    assert losses(out) == losses(tmp_path / "whole")
    assert len(losses(out)) == result.steps


@pytest.mark.parametrize(
    ("limits", "steps"), [({"max_steps": 3}, 3), ({"max_tokens": 4 * 64 * 5, "epochs": 50}, 5)]
)
def test_a_run_stops_at_its_limit(corpus: Path, tmp_path: Path, limits: dict[str, int], steps: int) -> None:
    assert pretrain(tiny(corpus, tmp_path / "short", **limits)).steps == steps


def test_a_wsd_run_finishes_within_its_time(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the limit it would go on for hours; with it the learning rate still falls to its minimum."""
    out = tmp_path / "timed"
    clock = StepClock(monkeypatch, 0.1)
    result = pretrain(
        tiny(
            corpus,
            out,
            epochs=100_000,
            lr_schedule="wsd",
            max_time="20s",
            warmup_steps=10,
            log_interval=1,
            eval_batches=1,
        )
    )
    # All but what is kept for the end, and a tenth of the rest.
    assert 0.85 * (20 - END_SECONDS) < clock.elapsed < 20 - END_SECONDS
    assert result.stopped is None
    rates = [row["learning_rate"] for row in metrics(out) if "learning_rate" in row]
    assert rates[-1] == pytest.approx(0.1 * max(rates))
    decaying = sum(rate < max(rates) for rate in rates[len(rates) // 2 :])
    assert 0.05 < decaying / len(rates) < 0.3
    assert (out / "model" / "model.safetensors").exists()


def test_a_run_out_of_time_is_saved_and_goes_on(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = StepClock(monkeypatch, 0.1)
    config = tiny(corpus, tmp_path / "cut", epochs=100_000, max_time="6s", save_interval=10_000)
    result = pretrain(config)
    assert result.stopped == "--max-time"
    assert 6 <= clock.elapsed < 7
    assert not (tmp_path / "cut" / "model").exists()
    limit = result.steps + 3
    more = pretrain(dataclasses.replace(config, max_time=None, max_steps=limit, resume="auto"))
    assert (more.steps, more.stopped) == (limit, None)


def test_a_signal_ends_the_run_in_order(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    StepClock(
        monkeypatch, 0.05, after_step=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 9 else None
    )
    result = pretrain(tiny(corpus, tmp_path / "cut", epochs=100_000, save_interval=10_000))
    assert result.stopped == "SIGTERM"
    assert 9 <= result.steps < 15
    (checkpoint,) = (tmp_path / "cut" / "checkpoints").glob("step-*")
    assert checkpoint.name == f"step-{result.steps:08d}"


@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_fails_before_it_wrote_anything_leaves_no_folder(tmp_path: Path, there: bool) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("no JSON\n")
    out = tmp_path / "out"
    if there:
        out.mkdir()
    with pytest.raises(DataError, match="invalid JSON"):
        pretrain(tiny(corpus, out))
    assert out.exists() == there


def test_a_signal_ends_the_run_while_text_is_tokenized(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Progress, "data_build", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny(corpus, tmp_path / "out", cache_dir=str(tmp_path / "cache")))
    # Nothing of a build that was not finished, beside its lock.
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(("choice", "finishes"), [("continue", True), ("stop", False)])
def test_a_full_disk_ends_the_run_only_if_asked_to(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: str, finishes: bool
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "here")

    monkeypatch.setattr("minimind.checkpoint.store.write_tensors", full)
    config = tiny(corpus, tmp_path / "full", max_steps=30, save_interval=5, on_save_error=choice)
    if finishes:
        assert pretrain(config).steps == 30
    else:
        with pytest.raises(CheckpointError, match="was not saved"):
            pretrain(config)
    assert (tmp_path / "full" / "model").exists() == finishes
    assert not list((tmp_path / "full" / "checkpoints").glob("*"))


def test_a_wsd_run_that_is_resumed_finishes_within_its_time_too(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(
        corpus, tmp_path / "timed", epochs=100_000, lr_schedule="wsd", warmup_steps=10, log_interval=1
    )
    first = pretrain(config, stop_after=40)
    clock = StepClock(monkeypatch, 0.25)
    result = pretrain(dataclasses.replace(config, max_time="25s", resume="auto"))
    assert 0.85 * (25 - END_SECONDS) < clock.elapsed < 25 - END_SECONDS
    assert result.stopped is None
    assert result.steps > first.steps
    rates = [row["learning_rate"] for row in metrics(tmp_path / "timed") if "learning_rate" in row]
    assert len(rates) == result.steps
    assert rates[-1] == pytest.approx(0.1 * max(rates))
    # The decay is about a fifth of all steps, those before the resume included.
    assert 0.05 < sum(rate < max(rates) for rate in rates[40:]) / len(rates) < 0.3


def test_a_wsd_run_with_a_time_limit_reaches_its_peak_and_goes_on_when_it_gets_more_time(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "timed"
    config = tiny(corpus, out, epochs=100_000, lr_schedule="wsd", log_interval=1, eval_batches=1)
    clock = StepClock(monkeypatch, 0.1)
    first = pretrain(dataclasses.replace(config, max_time="20s"))
    assert first.stopped is None

    def rates() -> list[float]:
        return [row["learning_rate"] for row in metrics(out) if "learning_rate" in row]

    # 2% of the steps of all epochs are the 1,000 at most, of which no time is left for half.
    assert max(rates()) == config.learning_rate
    assert rates()[-1] == pytest.approx(0.1 * max(rates()))
    assert rates().index(max(rates())) < 40
    # The same time again ends at once, and says so.
    again = dataclasses.replace(config, resume="auto")
    capsys.readouterr()
    assert pretrain(dataclasses.replace(again, max_time="20s")).steps == first.steps
    assert "--max-time none, trains on" in capsys.readouterr().out
    clock.elapsed = 0.0
    result = pretrain(again, stop_after=first.steps + 5)
    assert result.steps == first.steps + 5
    assert rates()[-5:] == [max(rates())] * 5
    assert "the learning rate goes from" in capsys.readouterr().out


@pytest.mark.slow
def test_the_tiny_preset_learns_the_built_in_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--preset tiny` without --data, but 80 steps of its 674."""
    monkeypatch.chdir(tmp_path)
    result = pretrain(preset_config("tiny", max_steps=80, cache_dir=str(tmp_path / "cache")))
    evaluations = [
        row["val_bits_per_byte"] for row in metrics(tmp_path / "out") if "val_bits_per_byte" in row
    ]
    assert evaluations[-1] < 0.6 * evaluations[0]
    assert result.sample


@pytest.mark.parametrize(("epochs", "scale"), [(1, 6.0), (4, 6.0), (8, 1.5), (16, 1.0)])
def test_repeated_text_lowers_the_learning_rate_of_the_embedding(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int, scale: float
) -> None:
    found: list[float] = []

    def train(trainer: Trainer) -> None:
        groups = trainer.optimizer.param_groups
        found.extend(group["lr_scale"] for group in groups if "lr_scale" in group)

    monkeypatch.setattr(Trainer, "train", train)
    pretrain(tiny(corpus, tmp_path / "run", optimizer="normuon", epochs=epochs))
    assert found == [pytest.approx(scale)]


def test_a_run_does_not_depend_on_the_callers_torch_settings(corpus: Path, tmp_path: Path) -> None:
    expected = pretrain(tiny(corpus, tmp_path / "usual", max_steps=3))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            found = pretrain(tiny(corpus, tmp_path / "unusual", max_steps=3))
            assert torch.is_inference_mode_enabled()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        again = pretrain(tiny(corpus, tmp_path / "no-grad", max_steps=3))
        assert not torch.is_grad_enabled()
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        other = pretrain(tiny(corpus, tmp_path / "autocast", max_steps=3))
        assert torch.is_autocast_enabled("cpu")
    assert torch.get_default_device().type == "cpu"
    assert found.loss == again.loss == other.loss == expected.loss
    assert found.val_loss == again.val_loss == expected.val_loss


def test_a_second_run_in_the_same_process_is_refused_while_one_runs(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[str] = []
    original = Trainer.validate

    def validate(run: Trainer) -> None:
        with pytest.raises(ConfigError, match="already running in this process") as error:
            pretrain(tiny(corpus, tmp_path / "second"))
        refused.append(str(error.value))
        original(run)

    monkeypatch.setattr(Trainer, "validate", validate)
    assert pretrain(tiny(corpus, tmp_path / "first", max_steps=1)).steps == 1
    assert len(refused) == 1
    assert not (tmp_path / "second").exists()
    # And the next one may run.
    assert pretrain(tiny(corpus, tmp_path / "third", max_steps=1, val_fraction=0.0)).steps == 1


def test_step_0_evaluates_what_later_evaluations_do(corpus: Path, tmp_path: Path) -> None:
    """With a learning rate of almost 0 the model stays the same, so the losses must be equal."""
    out = tmp_path / "out"
    pretrain(tiny(corpus, out, max_steps=1, learning_rate=1e-12))
    first, last = (row for row in metrics(out) if "val_loss" in row)
    assert (first["step"], last["step"]) == (0, 1)
    assert first["val_tokens"] == last["val_tokens"] > 4 * 64
    assert first["val_loss"] == pytest.approx(last["val_loss"], rel=1e-5)


def test_what_a_launch_leaves_unused_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minimind.training.setup.check_launch", lambda config: "1 of 8 cores is used.")
    notes: list[str] = []
    resolve_run(PretrainConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2), notes.append)
    assert notes == ["1 of 8 cores is used."]


@pytest.mark.parametrize("choice", ["continue", "stop"])
def test_a_failed_save_is_reported_at_once_and_ends_the_run_only_if_asked_to(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    choice: str,
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "here")

    monkeypatch.setattr("minimind.checkpoint.store.write_tensors", full)
    out = tmp_path / "out"
    config = tiny(corpus, out, max_steps=100, save_interval=5, log_interval=1, on_save_error=choice)
    with contextlib.suppress(CheckpointError):
        pretrain(config)
    assert (metrics(out)[-1]["step"] < 100) == (choice == "stop")
    captured = capfd.readouterr()
    assert "was not saved" in captured.out + captured.err
