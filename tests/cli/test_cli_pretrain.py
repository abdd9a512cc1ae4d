"""`minimind-train pretrain`: from arguments to a configuration."""

from __future__ import annotations

import dataclasses
import shlex
import string
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind.config.options import CONFIG_SECTIONS, PretrainConfig
from minimind.config.presets import PRESETS, resolve
from minimind.config.schema import schema_of, write_toml
from minimind.errors import ConfigError
from minimind.run_folder import RunFolder
from minimind_cli.config_options import DEFAULT_BUDGETS

Command = Callable[..., Any]
SHAPED = "--hidden-size 512"


@pytest.mark.usefixtures("has_gpu")
def test_a_full_command_line_trains_what_it_says(run: Command, trained: list[PretrainConfig]) -> None:
    args = (
        "pretrain --epochs 2 --batch_size 32 --learning_rate 5e-4 --hidden_size 512 "
        "--num_hidden_layers 8 --max_seq_len 512"
    )
    done = run(args)
    assert (done.code, done.err) == (0, "")
    assert trained == [
        PretrainConfig(
            epochs=2,
            batch_size=32,
            learning_rate=5e-4,
            hidden_size=512,
            num_hidden_layers=8,
            max_seq_len=512,
        )
    ]


def test_without_a_size_a_machine_without_gpu_trains_the_tiny_preset(
    run: Command, trained: list[PretrainConfig], has_gpu: bool
) -> None:
    done = run("pretrain --epochs 1 --batch_size 128 --learning_rate 1e-3")
    assert done.code == 0
    preset = None if has_gpu else "tiny"
    assert trained == [resolve(preset=preset, flags={"epochs": 1, "batch_size": 128, "learning_rate": 1e-3})]
    assert len(done.err.splitlines()) == (0 if has_gpu else 1)
    assert ("--preset tiny" in done.err) is not has_gpu


@pytest.mark.parametrize("options", ["", "--seed 7", "--output-dir elsewhere"])
def test_a_run_without_options_has_a_budget(
    run: Command,
    trained: list[PretrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    options: str,
    has_gpu: bool,
) -> None:
    configs: list[PretrainConfig] = []

    def follow(config: PretrainConfig, **_: Any) -> PretrainConfig:
        configs.append(config)
        raise ConfigError("far enough")

    monkeypatch.setattr("minimind.planning.budget.follow_budget", follow)
    done = run("pretrain", *options.split())
    budget = DEFAULT_BUDGETS["GPU" if has_gpu else "CPU"]
    assert [config.budget for config in configs] == [budget]
    assert f"built-in text with --budget {shlex.quote(budget)}" in done.err
    assert trained == []


@pytest.mark.parametrize("option", ["--data a.jsonl", "--max-steps 5", "--epochs 1", "--hidden-size 64"])
def test_options_of_the_run_leave_no_default_budget(
    run: Command, trained: list[PretrainConfig], option: str, has_gpu: bool
) -> None:
    done = run("pretrain", *option.split())
    assert done.code == 0
    assert "--budget" not in done.err
    assert [config.budget for config in trained] == [None]


@pytest.mark.usefixtures("has_gpu")
def test_the_flag_of_the_original_resumes(run: Command, trained: list[PretrainConfig]) -> None:
    assert run("pretrain --from_resume 1 --epochs 3 --data a.jsonl").code == 0
    assert (trained[0].resume, trained[0].epochs) == ("auto", 3)


@pytest.mark.usefixtures("has_gpu")
@pytest.mark.parametrize("how", ["--resume", "--resume auto --max-steps 9", "--from_resume 1"])
def test_a_mistyped_folder_is_not_resumed_with_default_options(
    run: Command, trained: list[PretrainConfig], how: str, tmp_path: Path
) -> None:
    done = run("pretrain", *how.split(), "--output-dir", "typo")
    assert (done.code, trained) == (2, [])
    assert done.err.startswith("error: typo holds no run to resume; check --output-dir, or name --data")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["", "checkpoints", "checkpoints/step-00000009"])
def test_the_path_of_a_run_continues_it_with_its_options(
    run: Command, trained: list[PretrainConfig], path: str, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    (folder.checkpoints / "step-00000009").mkdir(parents=True)
    folder.describe(PretrainConfig(hidden_size=64, output_dir="where it was trained"), {})
    done = run("pretrain", "--resume", str(folder.path / path), "--epochs", "3")
    assert (done.code, trained[0].output_dir, trained[0].hidden_size) == (0, str(folder.path), 64)
    assert f"Continuing in {folder.path} with the options of {folder.config}" in done.err
    done = run("pretrain", "--resume", str(folder.path / path), "--output-dir", "other")
    assert (done.code, trained[1].output_dir, trained[1].hidden_size) == (0, "other", 64)
    assert "in other with the options of" in done.err


@pytest.mark.parametrize("how", ["--from_resume 1", "--resume", "--resume auto"])
def test_a_resumed_run_keeps_the_options_it_began_with(
    run: Command, trained: list[PretrainConfig], how: str, tmp_path: Path
) -> None:
    began = PretrainConfig(hidden_size=64, epochs=2, batch_size=4, output_dir=str(tmp_path / "run"))
    folder = RunFolder(tmp_path / "run")
    with folder.claim(resume=False):
        folder.describe(began, {})
    done = run("pretrain", *how.split(), "--epochs", "3", "--save_dir", str(folder.path))
    assert done.code == 0
    assert trained == [dataclasses.replace(began, epochs=3, resume="auto")]
    assert str(folder.config) in done.err
    # A preset or a file that is named counts instead.
    run("pretrain", *how.split(), "--preset", "tiny", "--save_dir", str(folder.path))
    assert trained[1].hidden_size == 128


@pytest.mark.parametrize(
    "size", ["--preset minimind-3", "--num_hidden_layers 2", "--from_weight m", "--config"]
)
def test_who_names_a_size_is_not_asked_for_a_gpu(
    run: Command, trained: list[PretrainConfig], size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minimind_cli.config_options.has_gpu", lambda: pytest.fail("asked for a GPU"))
    (tmp_path / "run.toml").write_text("epochs = 2\n")
    args = size.split() + ([str(tmp_path / "run.toml")] if size == "--config" else [])
    assert run("pretrain", *args).code == 0
    assert len(trained) == 1


def test_the_cpu_asked_for_counts_as_no_gpu(
    run: Command, trained: list[PretrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert run("pretrain --epochs 1").code == 0
    assert trained[0].hidden_size == PRESETS["tiny"]["hidden_size"]


@pytest.mark.parametrize(
    ("args", "name", "value"),
    [
        ("--data-path a.txt --data b.txt", "data", ("a.txt", "b.txt")),
        ("--data_path=a_b.txt", "data", ("a_b.txt",)),
        ("--save_dir my_run", "output_dir", "my_run"),
        ("--dtype bfloat16", "mixed_precision", "bf16"),
        ("--dtype float16", "mixed_precision", "fp16"),
        ("--dtype float32", "mixed_precision", "no"),
        ("--mixed-precision auto", "mixed_precision", "auto"),
        ("--use_wandb", "tracker", ("tensorboard", "wandb")),
        ("--use-wandb --tracker wandb", "tracker", ("wandb",)),
        ("--tracker swanlab --tracker tensorboard", "tracker", ("swanlab", "tensorboard")),
        ("--wandb_project Mine", "project", "Mine"),
        ("--from_resume 0", "resume", None),
        ("--resume", "resume", "auto"),
        ("--resume --epochs 2", "resume", "auto"),
        ("--resume out/checkpoints/5 --epochs 2", "resume", "out/checkpoints/5"),
        ("--from_resume 1 --resume here", "resume", "here"),
        ("--compile", "compile", True),
        ("--no-compile", "compile", False),
        ("--use_compile 0", "compile", False),
        ("--use_compile 1", "compile", True),
        ("--no_packing", "packing", False),
        ("--packing false", "packing", False),
        ("--packing=1", "packing", True),
        ("--from_weight none", "from_weight", None),
        ("--use_moe 0", "use_moe", False),
        ("--use_moe 1", "use_moe", True),
        ("--accumulation_steps 8", "accumulation_steps", 8),
        ("--max-tokens 1e9", "max_tokens", 10**9),
        ("--grad_clip 0", "grad_clip", 0.0),
        ("--epochs 2 --epochs 3", "epochs", 3),
    ],
)
def test_flags_in_every_spelling(
    run: Command, trained: list[PretrainConfig], args: str, name: str, value: object
) -> None:
    done = run(f"pretrain {SHAPED} {args}")
    assert (done.code, done.err) == (0, "")
    assert getattr(trained[0], name) == value


def test_all_user_errors_are_reported_together_one_a_line(
    run: Command, trained: list[PretrainConfig]
) -> None:
    done = run(
        "pretrain --batch_size many --learnin_rate 3 --from_resume 7 --lr-schedule cosin --epochs 0 "
        "--warmup_steps -1 text.jsonl --config nowhere.toml"
    )
    assert done.code == 2
    assert done.out == ""
    assert done.err.splitlines() == [
        "error: unknown option --learnin-rate; did you mean '--learning-rate'?",
        "error: unexpected argument 'text.jsonl'; values follow an option, such as --data text.jsonl.",
        "error: --from-resume 7 is not 0 or 1; write 0 or 1.",
        "error: --config nowhere.toml cannot be read (No such file or directory); name a TOML file, "
        "such as one that --print-config wrote.",
        "error: --epochs 0 is out of range; it must be at least 1.",
        "error: --batch-size many is not a whole number; write for example 32 or auto.",
        "error: --lr-schedule cosin is not known; choose cosine, linear, wsd or constant.",
        "error: --warmup-steps -1 is out of range; it must be at least 0.",
    ]
    assert trained == []


@pytest.mark.parametrize(
    ("args", "advice"),
    [
        ("--device cuda:1", "put CUDA_VISIBLE_DEVICES=1 before the command"),
        ("--num_experts 8", "add --use-moe"),
        ("--use_compile yes", "write 0 or 1"),
        ("--accumulation_steps 2 --global_batch_size 64", "give only one of them"),
        ("--preset huge", "choose one of tiny, "),
        ("--tracker none --use_wandb", "cannot be combined with another tracker"),
        ("--batch-size", "requires an argument"),
        ("-x", "unknown option -x."),
        ("--learnrate -1", "unknown option --learnrate; did you mean '--learning-rate'?"),
    ],
)
def test_a_mistake_says_what_to_do(
    run: Command, trained: list[PretrainConfig], args: str, advice: str
) -> None:
    done = run(f"pretrain {SHAPED} {args}")
    assert done.code == 2
    assert [line.startswith("error: ") and advice in line for line in done.err.splitlines()] == [True]
    assert trained == []


def test_a_file_gives_way_to_flags_and_overrides_the_preset(
    run: Command, trained: list[PretrainConfig], tmp_path: Path
) -> None:
    file = tmp_path / "run.toml"
    file.write_text('preset = "tiny"\nbatch_size = 4\nmax_steps = 7\nlog-interval = 3\n')
    assert run("pretrain", "--config", str(file), "--batch_size", "2", "--max-steps", "none").code == 0
    assert trained == [resolve(preset="tiny", flags={"batch_size": 2, "log_interval": 3})]


def test_a_wrong_key_in_the_file_suggests_the_nearest(run: Command, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("hiden_size = 64\n")
    done = run("pretrain", "--config", str(file))
    assert done.code == 2
    assert done.err == f"error: {file}: unknown key 'hiden_size'; did you mean 'hidden_size'?\n"


def test_the_printed_configuration_can_be_read_back(
    run: Command, trained: list[PretrainConfig], tmp_path: Path
) -> None:
    args = [
        "--preset",
        "minimind-3",
        "--data",
        'a "b"\\ü.txt',
        "--dtype",
        "bfloat16",
        "--use_wandb",
        "--resume",
    ]
    printed = run("pretrain", *args, "--print-config")
    assert (printed.code, printed.err) == (0, "")
    assert trained == []
    file = tmp_path / "run.toml"
    file.write_text(printed.out, encoding="utf-8")
    assert run("pretrain", "--config", str(file)).code == 0
    assert run("pretrain", *args).code == 0
    assert trained[0] == trained[1]


TEXT = st.text(st.characters(codec="utf-8"), min_size=1)
PATH = TEXT.filter(lambda text: "\0" not in text and not text.startswith("~"))
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "data": st.lists(PATH, min_size=1).map(tuple),
    "tokenizer": st.none() | PATH,
    "val_fraction": st.floats(0, 1, exclude_max=True),
    "learning_rate": st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    "grad_clip": st.floats(min_value=0, allow_infinity=False),
    "packing": st.booleans(),
    "compile": st.none() | st.booleans(),
    "max_tokens": st.none() | st.integers(1, 2**63 - 1),
    "head_dim": st.none() | st.integers(1, 64).map(lambda half: 2 * half),
    "lr_schedule": st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    "tracker": st.sets(st.sampled_from(["tensorboard", "wandb", "swanlab"])).map(tuple),
    "output_dir": PATH,
    "resume": st.none() | PATH,
    "run_name": st.none() | TEXT,
}


@given(st.fixed_dictionaries({}, optional=VALUES))
def test_every_configuration_survives_its_file(values: dict[str, Any]) -> None:
    config = PretrainConfig(**values)
    assert resolve(file=tomllib.loads(write_toml(config, CONFIG_SECTIONS))) == config


NAMES = st.sampled_from(["preset", *schema_of(PretrainConfig)]) | st.text(string.ascii_lowercase + "_-")
SCALARS = st.text() | st.integers() | st.floats() | st.booleans()


@given(st.dictionaries(NAMES, SCALARS | st.lists(SCALARS) | st.just({"a": 1})))
def test_any_file_gives_a_configuration_or_sentences(values: dict[str, Any]) -> None:
    problems = ["fine."]
    try:
        resolve(file=values)
    except ConfigError as error:
        problems = error.problems
    assert problems
    assert all(problem.endswith((".", "?")) for problem in problems)


@pytest.mark.parametrize(("heads", "listed"), [(6, "1, 2, 3, 6"), (2 * 3**38, f"243, 486, 729, {2 * 3**38}")])
def test_a_number_of_heads_has_its_divisors_listed_however_large_it_is(heads: int, listed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(file={"num_attention_heads": heads, "num_key_value_heads": 4})
    assert caught.value.problems[0].endswith(f"{listed}.")


def test_the_first_screen_of_a_run_has_at_most_20_lines(run: Command, tmp_path: Path) -> None:
    """With much to report of the data, which --verbose prints as a whole."""
    data = tmp_path / "data"
    data.mkdir()
    for number in range(12):
        lines = [f'{{"text": "{"the cat sat on a mat " * (4 + line % 3)}{line % 9}"}}' for line in range(20)]
        (data / f"{number}.jsonl").write_text("\n".join([*lines, f"not JSON {number}", '{"text": ""}']))
        (data / f"{number}.unknown{number}").touch()
    args = (
        *("pretrain", "--data", str(data), "--cache-dir", "cache", "--bad-lines", "skip", "--max-steps", "1"),
        *("--hidden-size", "16", "--num-hidden-layers", "1", "--num-attention-heads", "2"),
        *("--max-seq-len", "32", "--val-fraction", "0.2", "--tracker", "none", "--eval-interval", "100"),
    )
    for folder, extra in (("short", ()), ("long", ("--verbose",))):
        done = run(*args, "--output-dir", folder, *extra)
        assert done.code == 0, done.err
        first_screen = done.out.partition("step 0/1 | val loss")[0]
        rows = sum(-(-len(line) // 80) for line in first_screen.splitlines())
        assert (rows <= 20) == (not extra), first_screen
        assert "duplicates" in first_screen
    assert "not measured" not in done.out
    assert "compil" not in done.out.partition("bottleneck")[2]
