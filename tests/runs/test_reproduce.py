"""The command that repeats a run: read back it gives the same options, and what changed is named."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import minimind.runs.changes as changes_module
from minimind.config.command_line import to_argv
from minimind.config.options import CONFIG_SECTIONS, PretrainConfig
from minimind.config.presets import PRESETS, preset_config
from minimind.config.schema import write_toml
from minimind.run_folder import RunFolder
from minimind.runs.record import read_run
from minimind.runs.reproduce import Reproduction, reproduce
from minimind.tracking.environment import describe_environment
from minimind.training.pretrain import pretrain
from minimind_cli.config_options import read_config
from minimind_cli.options import normalize
from minimind_cli.pretrain import pretrain as command
from support import tiny_runs

RUNS = Path("runs")


def read_back(args: list[str], monkeypatch: pytest.MonkeyPatch) -> PretrainConfig:
    """Return the options that `minimind-train pretrain` takes from arguments, on a machine without a GPU."""
    monkeypatch.setattr("minimind_cli.config_options.has_gpu", lambda: False)
    read: list[PretrainConfig] = []
    app = typer.Typer()

    def note(ctx: typer.Context, preset: str | None = None, config: str | None = None, **_: Any) -> None:
        read.append(read_config(ctx, preset, config))

    note.__signature__ = command.__signature__  # type: ignore[attr-defined]
    app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})(note)
    result = CliRunner().invoke(app, normalize(args))
    assert result.exit_code == 0, (result.output, result.exception)
    return read[0]


@st.composite
def configs(draw: st.DrawFn) -> PretrainConfig:
    """Return options as a preset or none, with changes of every kind."""
    base = preset_config(name) if (name := draw(st.sampled_from([None, *PRESETS]))) else PretrainConfig()
    text = st.text("ab -'\"$\\é", min_size=1, max_size=8).filter(lambda t: t.strip() not in ("", "none"))
    changes = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "data": st.lists(text.map(lambda t: f"x{t}"), min_size=1, max_size=3).map(tuple),
                "learning_rate": st.floats(1e-6, 1.0),
                "eval_interval": st.none() | st.integers(1, 100),
                "compile": st.sampled_from([None, True, False]),
                "packing": st.booleans(),
                "tracker": st.sampled_from([("none",), ("tensorboard", "wandb"), ("tensorboard",)]),
                "run_name": text,
                "project": text.map(lambda t: f"-{t}"),
                "hidden_size": st.sampled_from([512, 768, 1792]),
                "max_tokens": st.none() | st.integers(1, 10**12),
                "global_batch_size": st.none() | st.integers(1, 100),
                "max_time": st.sampled_from([None, "3h30m"]),
            },
        )
    )
    return dataclasses.replace(base, **changes)


@settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(config=configs())
def test_the_words_give_the_same_options_back(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = shlex.split(shlex.join(to_argv(config)))
    assert read_back(args, monkeypatch) == config


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_two_arguments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = to_argv(preset_config(name))
    assert len(args) == 2
    assert read_back(args, monkeypatch) == preset_config(name)


def test_plain_defaults_still_name_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one, a machine without a GPU would train another model."""
    args = to_argv(PretrainConfig())
    assert args == ["--hidden-size", "512"]
    assert read_back(args, monkeypatch) == PretrainConfig()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_corpus(tmp_path_factory.mktemp("data") / "corpus.jsonl")


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the CPU."""
    out = tmp_path_factory.mktemp("runs") / "first run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        pretrain(tiny_runs.tiny(corpus, out, max_steps=6))
    return out


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def test_the_command_repeats_a_run_to_the_last_bit(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = reproduce(read_run(trained))
    args = shlex.split(found.command)
    if args[0].startswith("ACCELERATE_USE_CPU"):
        args.pop(0)
    assert args[:2] == ["minimind-train", "pretrain"]
    assert "'" in found.command, "the folder has a space in its name"
    config = read_back(args[2:], monkeypatch)
    assert config.output_dir == str(trained) + "-again"
    pretrain(config)
    tiny_runs.assert_same_end(Path(config.output_dir), trained)
    assert reproduce(read_run(trained)).args[-1].endswith("-again-2")


def test_nothing_is_warned_of_where_nothing_changed(trained: Path) -> None:
    changed_files = [w for w in reproduce(read_run(trained)).warnings if "git commit" not in w]
    assert changed_files == []


def record(folder: Path, config: PretrainConfig, **environment: Any) -> Reproduction:
    """Return how a run would be repeated that has left these options and this environment."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(write_toml(config, CONFIG_SECTIONS), encoding="utf-8")
    facts = {**describe_environment("cpu"), "launch": {"processes": 1, "on_cpu": True}, **environment}
    RunFolder(folder).environment.write_text(json.dumps(facts), encoding="utf-8")
    return reproduce(read_run(folder))


def test_the_page_shows_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = preset_config("minimind-3", data=("corpus.jsonl",), batch_size=128, optimizer="adamw")
    config = dataclasses.replace(config, learning_rate=5e-4, weight_decay=0.3)
    found = record(Path("runs/adamw"), config, working_folder=str(tmp_path))
    page = Path(__file__).parents[2] / "docs" / "comparing-runs.md"
    assert f"\n{shlex.join(found.args)}\n" in page.read_text(encoding="utf-8")


def test_changes_are_named(tmp_path: Path, corpus: Path) -> None:
    config = dataclasses.replace(tiny_runs.tiny(corpus, tmp_path / "out"), resume="auto", max_time="1h")
    packages = {**describe_environment("cpu")["packages"], "minimind": "0.0.1", "numpy": "1.0"}
    found = record(
        tmp_path / "run",
        config,
        packages=packages,
        python="3.9.1",
        git={"commit": "abcdef123456789", "changed": True},
        device="cuda:0",
        gpus=["NVIDIA H100"] * 2,
        launch={"processes": 1, "precision": "bf16", "compiled": True},
        fingerprints={"tokenizer": "other", "training text": "other"},
    )
    text = "\n".join(found.warnings)
    for phrase in (
        "the code minimind was 0.0.1",
        "the package numpy was 1.0",
        "Python was 3.9.1",
        "abcdef123456",
        "files differed from the git commit",
        "the device was NVIDIA H100 and is CPU",
        "the tokenizer of the package is not that",
        "the run was resumed",
        "--max-time 1h",
    ):
        assert phrase in text, phrase
    assert "--resume" not in found.command


def test_text_is_compared_by_its_content(tmp_path: Path) -> None:
    corpus = tiny_runs.write_corpus(tmp_path / "corpus.jsonl")
    config = tiny_runs.tiny(corpus, tmp_path / "out", max_steps=2)
    pretrain(config)
    run = read_run(tmp_path / "out")
    assert not any("data" in warning for warning in reproduce(run).warnings)
    corpus.write_text(corpus.read_text() + '{"text": "one more document"}\n')
    assert any("--check-data" in warning for warning in reproduce(run).warnings)
    checked = reproduce(run, check_data=True)
    assert any("data has changed" in warning for warning in checked.warnings)
    corpus.unlink()
    assert any("the data cannot be read" in warning for warning in reproduce(run).warnings)


@pytest.mark.parametrize(
    ("launch", "expected"),
    [
        (
            {"processes": 8, "kind": "DDP", "on_cpu": False},
            "accelerate launch --multi_gpu --num_processes 8 -m minimind_cli pretrain",
        ),
        (
            {"processes": 2, "kind": "DDP", "on_cpu": True},
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 -m minimind_cli",
        ),
        (
            {
                **{"processes": 8, "machines": 2, "kind": "FSDP2"},
                "variables": {
                    "FSDP_ACTIVATION_CHECKPOINTING": "true",
                    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4",
                },
            },
            "accelerate launch --use_fsdp --fsdp_version 2 --use_parallelism_config "
            "--parallelism_config_dp_shard_size 4 --fsdp_activation_checkpointing true --num_processes 8 "
            "--num_machines 2 -m minimind_cli pretrain",
        ),
    ],
)
def test_several_processes_are_launched_as_they_were(
    tmp_path: Path, corpus: Path, launch: dict[str, Any], expected: str
) -> None:
    found = record(tmp_path / "run", tiny_runs.tiny(corpus, tmp_path / "out"), launch=launch)
    assert found.command.startswith(expected)


def test_what_the_machine_decided_is_said_where_this_one_decides_otherwise(
    tmp_path: Path, corpus: Path
) -> None:
    config = dataclasses.replace(
        tiny_runs.tiny(corpus, tmp_path / "out"), mixed_precision="auto", compile=None
    )
    launch = {"processes": 1, "precision": "bf16", "compiled": not torch.cuda.is_available()}
    command = record(tmp_path / "a", config, launch=launch).command
    assert "--mixed-precision bf16" in command
    assert "--compile" in command
    same = {"processes": 1, "precision": "no", "compiled": torch.cuda.is_available()}
    command = record(tmp_path / "b", config, launch=same).command
    assert "--mixed-precision" not in command
    assert "compile" not in command


def test_paths_hold_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PretrainConfig(data=("a.jsonl:0.7", "/b.jsonl:0.3"), cache_dir="~/c")
    monkeypatch.chdir(tmp_path)
    found = record(tmp_path / "run", config, working_folder="/somewhere")
    assert "--data /somewhere/a.jsonl:0.7 --data /b.jsonl:0.3" in found.command
    assert f"--cache-dir {Path('~/c').expanduser()} " in found.command
    here = record(tmp_path / "run", config, working_folder=str(tmp_path))
    assert "--data a.jsonl:0.7" in here.command


def test_a_run_that_recorded_little_is_repeated_with_a_warning_for_each_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.toml").write_text('hidden_size = 64\ngone = 1\ndata = ["x.jsonl"]\n')
    found = reproduce(read_run(tmp_path / "old"))
    assert "--hidden-size 64" in found.command
    text = "\n".join(found.warnings)
    for phrase in (
        "recorded no environment",
        "did not record its data",
        "gone",
        "--data",
        "did not record its launch",
    ):
        assert phrase in text, phrase


def test_git_outside_of_a_repository_is_distinguished() -> None:
    then = {"commit": "a" * 40, "changed": False}
    assert list(changes_module._git_changes(then, then)) == []
    assert "in none" in next(changes_module._git_changes(then, None))
    assert list(changes_module._git_changes(None, then)) == []
    other = {"commit": "b" * 40, "changed": True}
    first, second = changes_module._git_changes(then, other)
    assert "aaaaaaaaaaaa and is bbbbbbbbbbbb" in first
    assert "now" in second


def test_an_empty_list_of_trackers_stays_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = tiny_runs.write_corpus(tmp_path / "corpus.jsonl")
    found = record(tmp_path / "run", tiny_runs.tiny(corpus, tmp_path / "out", tracker=()))
    assert "--tracker none" in found.command
    assert read_back(list(found.args[2:]), monkeypatch).tracker == ("none",)


def test_a_run_named_none_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = tiny_runs.write_corpus(tmp_path / "corpus.jsonl")
    found = record(tmp_path / "run", tiny_runs.tiny(corpus, tmp_path / "out", run_name="none"))
    config = read_back(list(found.args[2:]), monkeypatch)
    # Trackers name a run without a name after its folder.
    assert (config.run_name or Path(config.output_dir).name) == "none"
