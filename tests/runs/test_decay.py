"""A run annealed from the stable phase of another, which stays unchanged."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from minimind.checkpoint.files import StoredCheckpoint, folder_name, stored_checkpoints
from minimind.checkpoint.train_state import TrainState
from minimind.config.options import PretrainConfig
from minimind.config.schema import parse_values, read_toml
from minimind.data.batch_plan import plan_batches
from minimind.errors import CheckpointError, ConfigError
from minimind.run_folder import RunFolder
from minimind.runs.decay import decay, decay_config
from minimind.schedule import LearningRateSchedule
from minimind.tracking.trackers import Trackers
from minimind.training.pretrain import pretrain
from support.launching import ACCELERATE, launch
from support.tiny_runs import STEPS, reports, tiny, write_corpus

FROM, DECAY = 8, 6
PER_STEP = 8 * 32
# Almost six steps: the last one counts whole.
TOKENS = DECAY * PER_STEP - 5
# Muon: what NorMuon derives from the length of a run stays that of the trunk.
STABLE = {
    **{"lr_schedule": "constant", "warmup_steps": 2, "log_interval": 1, "keep_checkpoints": 1},
    "optimizer": "muon",
}


@dataclass(frozen=True)
class Branched:
    """A trunk stopped at step 13, its decay from step 8, and a run whose schedule decayed there."""

    trunk: Path
    decayed: Path
    straight: Path
    untouched: bool
    charts: list[dict[str, str]]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def branched(tmp_path_factory: pytest.TempPathFactory) -> Branched:
    folder = tmp_path_factory.mktemp("branched")
    corpus = write_corpus(folder / "corpus.jsonl")
    charts: list[dict[str, str]] = []

    class Charted(Trackers):
        def __init__(self, config: PretrainConfig, *args: Any, **options: Any) -> None:
            charts.append(args[2])
            super().__init__(config, *args, **options)

        def state(self) -> dict[str, str]:
            return {"wandb": "id-of-the-trunk"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("minimind.training.outputs"), "Trackers", Charted)
        trunk = tiny(corpus, folder / "trunk", **STABLE, keep_every=4, save_interval=STEPS)
        assert pretrain(trunk, stop_after=13).stopped
        before = contents(folder / "trunk")
        decay(folder / "trunk", TOKENS, from_step=FROM)
        untouched = contents(folder / "trunk") == before
    schedule = {"lr_schedule": "wsd", "decay_steps": DECAY, "decay_shape": "linear"}
    straight = tiny(corpus, folder / "straight", **{**STABLE, **schedule}, max_steps=FROM + DECAY)
    pretrain(straight)
    return Branched(folder / "trunk", folder / "trunk-decay-8", folder / "straight", untouched, charts)


def test_the_learning_rate_falls_in_a_straight_line_to_the_minimum(branched: Branched) -> None:
    rates = [report["learning_rate"] for report in reports(branched.decayed) if "loss" in report]
    falls = [1 - 0.9 * step / DECAY for step in range(1, DECAY + 1)]
    assert rates == pytest.approx([1e-2 * fall for fall in falls], rel=1e-12)


def test_the_decay_is_that_of_a_run_whose_schedule_decayed_there(branched: Branched) -> None:
    after = [report for report in reports(branched.straight) if report["step"] > FROM]
    assert len(after) > DECAY
    # The same sequences, losses and gradients to the last bit.
    assert reports(branched.decayed) == after
    models = [
        (folder / "model" / "model.safetensors").read_bytes()
        for folder in (branched.decayed, branched.straight)
    ]
    assert models[0] == models[1]


def test_the_trunk_is_untouched_and_can_be_resumed(branched: Branched) -> None:
    assert branched.untouched
    flags, problems = parse_values(PretrainConfig, read_toml(RunFolder(branched.trunk).config))
    assert not problems
    result = pretrain(dataclasses.replace(PretrainConfig(**flags), resume="auto"))
    assert (result.steps, result.stopped) == (STEPS, None)
    losses = [report for report in reports(branched.trunk) if "loss" in report]
    assert [report["step"] for report in losses] == list(range(1, STEPS + 1))
    assert losses[-1]["learning_rate"] == 1e-2


def test_every_nth_checkpoint_of_the_trunk_stays(branched: Branched) -> None:
    # Written though the save interval is longer, and kept though only the newest one is.
    steps = [checkpoint.step for checkpoint in stored_checkpoints(branched.trunk / "checkpoints")]
    assert {4, 8, 12} <= set(steps)


def test_the_decay_has_charts_and_a_configuration_of_its_own(branched: Branched) -> None:
    assert branched.charts == [{}, {}]
    recorded = read_toml(RunFolder(branched.decayed).config)
    expected = {"lr_schedule": "wsd", "decay_steps": DECAY, "max_steps": FROM + DECAY, "warmup_steps": 2}
    assert {name: recorded[name] for name in expected} == expected
    assert recorded["resume"].endswith("trunk/checkpoints/step-00000008")


def test_a_decay_that_was_stopped_goes_on(branched: Branched, tmp_path: Path) -> None:
    trunk = stored_checkpoints(branched.trunk / "checkpoints")
    config = decay_config(next(one for one in trunk if one.step == FROM), TOKENS, tmp_path / "separate")
    assert pretrain(config, stop_after=FROM + 2, branch=True).stopped
    # What `pretrain --resume` reads is in the folder.
    flags, _ = parse_values(PretrainConfig, read_toml(RunFolder(tmp_path / "separate").config))
    pretrain(PretrainConfig(**{**flags, "resume": "auto"}))
    losses = [
        [report for report in reports(folder) if "loss" in report]
        for folder in (tmp_path / "separate", branched.decayed)
    ]
    assert losses[0] == losses[1]


def test_a_folder_that_holds_a_run_is_refused(branched: Branched) -> None:
    with pytest.raises(ConfigError, match="already contains a run; resume it with minimind-train pretrain"):
        decay(branched.trunk, TOKENS, from_step=FROM)


@pytest.mark.slow
@pytest.mark.alone
def test_two_processes_decay_as_one_does(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    # Eight sequences at once, which two processes have to share.
    options = {**STABLE, "dropout": 0.0, "batch_size": 8, "accumulation_steps": None}
    assert pretrain(tiny(corpus, tmp_path / "trunk", **options), stop_after=FROM).stopped
    decay(tmp_path / "trunk", TOKENS, output_dir=tmp_path / "alone")
    launcher = (*ACCELERATE, "--multi_gpu", "--num_processes", 2, "--main_process_port", 0)
    args = ("decay", tmp_path / "trunk", "--tokens", TOKENS, "--output-dir", tmp_path / "together")
    code, text = launch([*launcher, "-m", "minimind_cli", *args], tmp_path)
    assert code == 0, text
    assert text.count(f"resuming from step {FROM}") == text.count("trained: ") == 1
    ours, theirs = (reports(tmp_path / name) for name in ("together", "alone"))
    assert ours[-1]["step"] == FROM + DECAY
    same = ("step", "digest", "learning_rate")
    assert [[row.get(name) for name in same] for row in ours] == [
        [row.get(name) for name in same] for row in theirs
    ]
    for name in ("loss", "val_loss"):
        losses = [[row[name] for row in rows if name in row] for rows in (ours, theirs)]
        assert losses[0] == pytest.approx(losses[1], rel=0, abs=1e-5)


def test_a_damaged_checkpoint_is_refused_with_the_others_and_leaves_no_folder(
    branched: Branched, tmp_path: Path
) -> None:
    shutil.copytree(branched.trunk, tmp_path / "trunk")
    with (tmp_path / "trunk" / "checkpoints" / folder_name(8) / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match=r"step-00000008/model\.safetensors has .*; give from_step 4"):
        decay(tmp_path / "trunk", TOKENS, from_step=8)
    assert [path.name for path in tmp_path.iterdir()] == ["trunk"]


# Errors and options, on checkpoints that hold nothing but where they stand


def checkpoint(folder: Path, step: int, total_steps: int = 100, **options: Any) -> StoredCheckpoint:
    path = folder / "checkpoints" / folder_name(step)
    path.mkdir(parents=True)
    settings = dataclasses.asdict(PretrainConfig(**{"batch_size": 4, "max_seq_len": 16, **options}))
    settings |= {"global_batch_size": 8, "total_steps": total_steps, "steps_per_epoch": 60}
    ending = options.pop("ending", None)
    state = TrainState(step=step, tokens=step * 100, decay_window=ending)
    trainer = {"step": step, "settings": settings, "state": state.to_dict()}
    (path / "trainer.json").write_text(json.dumps(trainer))
    return StoredCheckpoint(path, step)


def test_a_step_without_checkpoint_is_refused_with_those_there_are(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        checkpoint(tmp_path, step, lr_schedule="constant")
    with pytest.raises(CheckpointError, match=r"from_step 15 has no checkpoint .* steps 10, 20 or 30;"):
        decay(tmp_path, 1000, from_step=15)


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="name the output_dir of a run"):
        decay(tmp_path, 1000)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_schedule_without_stable_phase_is_refused(tmp_path: Path, schedule: str) -> None:
    checkpoint(tmp_path, 10, lr_schedule=schedule)
    with pytest.raises(CheckpointError, match=f"lr_schedule {schedule}, which has no stable phase"):
        decay(tmp_path, 1000)


def test_a_checkpoint_of_the_decay_is_refused_with_those_that_would_do(tmp_path: Path) -> None:
    for step in (4, 40, 80, 81):
        checkpoint(tmp_path, step, lr_schedule="wsd", warmup_steps=5)
    # The newest is taken by default.
    with pytest.raises(
        CheckpointError, match=r"step-00000081 is already in the decay: .* give from_step 40 or 80\."
    ):
        decay(tmp_path, 1000)
    with pytest.raises(CheckpointError, match=r"step-00000004 is in the warm-up: .* 40 or 80\."):
        decay(tmp_path, 1000, from_step=4)


def test_the_length_is_counted_in_whole_steps(tmp_path: Path) -> None:
    packed = checkpoint(tmp_path, 50, lr_schedule="constant")
    for tokens, steps in ((1, 1), (8 * 16, 1), (8 * 16 + 1, 2)):
        config = decay_config(packed, tokens, tmp_path)
        assert (config.decay_steps, config.max_steps) == (steps, 50 + steps)
    # Rows that are padded have fewer real tokens: as many as they had so far.
    padded = checkpoint(tmp_path, 51, lr_schedule="constant", packing=False)
    assert decay_config(padded, 1000, tmp_path).decay_steps == 10


@pytest.mark.parametrize(("processes", "batch_size"), [(1, 4), (2, 4), (4, 2), (8, 1)])
def test_other_processes_share_the_rows_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, batch_size: int
) -> None:
    stable = checkpoint(tmp_path, 50, lr_schedule="constant")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    config = decay_config(stable, 1000, tmp_path)
    plan = plan_batches(config, processes)
    assert (plan.global_batch_size, plan.micro_batch_size) == (8, batch_size)


def test_a_step_that_processes_cannot_share_names_how_many_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(ConfigError, match=r"6 processes cannot share .* 8 sequences; use 4\."):
        decay_config(checkpoint(tmp_path, 50, lr_schedule="constant"), 1000, tmp_path)


def test_the_decay_may_go_beyond_the_passes_of_the_run(tmp_path: Path) -> None:
    config = decay_config(checkpoint(tmp_path, 50, lr_schedule="constant"), 80 * 128, tmp_path)
    assert config.epochs == 3  # 130 steps, 60 a pass


def test_shape_and_minimum_can_be_chosen(tmp_path: Path) -> None:
    stable = checkpoint(tmp_path, 50, lr_schedule="wsd", min_lr_ratio=0.2, learning_rate=1.0)
    config = decay_config(stable, 4 * 128, tmp_path, shape="sqrt", min_lr_ratio=0.0)
    rate = LearningRateSchedule(config, config.max_steps or 0).at
    assert [rate(step, None) for step in range(49, 54)] == pytest.approx(
        [1.0, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5, 0.0]
    )
    assert decay_config(stable, 1, tmp_path).min_lr_ratio == 0.2


def test_limits_of_the_run_do_not_end_the_decay(tmp_path: Path) -> None:
    options = {"max_tokens": 10_000, "max_time": "1h", "accumulation_steps": 2, "run_name": "mine"}
    config = decay_config(checkpoint(tmp_path, 50, lr_schedule="constant", **options), 1000, tmp_path)
    assert (config.max_tokens, config.max_time, config.accumulation_steps) == (None, None, None)
    assert (config.global_batch_size, config.run_name) == (8, "mine-decay-50")
