"""Command lines of the original's train_pretrain.py, pasted behind our launchers."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minimind.config.options import PretrainConfig
from minimind.config.schema import schema_of

Command = Callable[..., Any]

MIGRATION = Path(__file__).parents[2] / "docs" / "migration.md"

# Every option of trainer/train_pretrain.py with its default, and what that makes of our configuration.
OPTIONS: dict[str, tuple[str | None, dict[str, object]]] = {
    "--save_dir": ("../out", {"output_dir": "../out"}),
    "--save_weight": ("pretrain", {}),
    "--epochs": ("2", {"epochs": 2}),
    "--batch_size": ("32", {"batch_size": 32}),
    "--learning_rate": ("5e-4", {"learning_rate": 5e-4}),
    "--device": ("cuda:0", {}),
    "--dtype": ("bfloat16", {"mixed_precision": "bf16"}),
    "--num_workers": ("8", {}),
    "--accumulation_steps": ("8", {"accumulation_steps": 8}),
    "--grad_clip": ("1.0", {"grad_clip": 1.0}),
    "--log_interval": ("100", {"log_interval": 100}),
    "--save_interval": ("1000", {"save_interval": 1000}),
    "--hidden_size": ("768", {"hidden_size": 768}),
    "--num_hidden_layers": ("8", {"num_hidden_layers": 8}),
    "--max_seq_len": ("340", {"max_seq_len": 340}),
    "--use_moe": ("0", {}),
    "--seed": ("42", {"seed": 42}),
    "--data_path": (
        "../dataset/pretrain_t2t_mini.jsonl",
        {"data": ("../dataset/pretrain_t2t_mini.jsonl",)},
    ),
    "--from_weight": ("none", {"from_weight": None}),
    "--from_resume": ("0", {"resume": None}),
    "--use_wandb": (None, {"tracker": ("tensorboard", "wandb")}),
    "--wandb_project": ("MiniMind-Pretrain", {"project": "MiniMind-Pretrain"}),
    "--use_compile": ("0", {"compile": False}),
}
IGNORED = {"--save_weight", "--device", "--num_workers"}


def words_of(flag: str) -> list[str]:
    value = OPTIONS[flag][0]
    return [flag] if value is None else [flag, value]


@pytest.mark.parametrize("flag", OPTIONS)
def test_an_option_of_the_original_means_the_same_or_is_said_to_mean_nothing(
    run: Command, trained: list[PretrainConfig], flag: str
) -> None:
    # The size keeps the run from the preset that machines without a GPU get.
    done = run("pretrain", "--num_hidden_layers", "3", *words_of(flag))
    assert done.code == 0
    expected = {"num_hidden_layers": 3, **OPTIONS[flag][1]}
    assert trained == [PretrainConfig(**expected)]
    said = [f"{flag.replace('_', '-')} {OPTIONS[flag][0]} is ignored: "] if flag in IGNORED else []
    assert len(done.err.splitlines()) == len(said)
    assert all(text in done.err for text in said)


def test_all_options_of_the_original_can_be_given_at_once(
    run: Command, trained: list[PretrainConfig]
) -> None:
    done = run("pretrain", *(word for flag in OPTIONS for word in words_of(flag)))
    assert done.code == 0
    expected: dict[str, Any] = {}
    for _, values in OPTIONS.values():
        expected |= values
    assert trained == [PretrainConfig(**expected)]


@pytest.mark.parametrize(
    ("device", "cpu"), [("cpu", "true"), ("cuda", None), ("cuda:0", None), ("mps", None)]
)
def test_the_device_cpu_is_used_and_others_are_left_to_the_machine(
    run: Command, trained: list[PretrainConfig], monkeypatch: pytest.MonkeyPatch, device: str, cpu: str | None
) -> None:
    # Set first, so that it is put back at the end.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "")
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    done = run("pretrain", "--hidden_size", "64", "--device", device)
    assert done.code == 0
    assert os.environ.get("ACCELERATE_USE_CPU") == cpu
    assert ("is ignored" in done.err) is (cpu is None)
    assert len(trained) == 1


def test_under_a_launcher_the_device_is_that_of_the_process(
    run: Command, trained: list[PretrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("pretrain --hidden_size 64 --device cuda:1").code == 0
    assert len(trained) == 1


def test_the_page_on_migration_has_a_row_for_every_option() -> None:
    rows = re.findall(r"^\| `(--\w+)` \| ([^|]*) \|", MIGRATION.read_text(encoding="utf-8"), re.M)
    assert [flag for flag, _ in rows] == list(OPTIONS)
    for flag, default in rows:
        assert default == ("off" if OPTIONS[flag][0] is None else f"`{OPTIONS[flag][0]}`")


def test_the_run_nearest_to_the_original_has_its_values(run: Command, trained: list[PretrainConfig]) -> None:
    """Defaults of ours may change; the command on the page must then name what they were."""
    page = MIGRATION.read_text(encoding="utf-8")
    (command,) = re.findall(r"original's defaults:\n\n```bash\nminimind-train (.*?)\n```", page, re.S)
    assert run(*shlex.split(command.replace("\\\n", ""))).code == 0
    (config,) = trained
    ours = {name: value for _, values in OPTIONS.values() for name, value in values.items()}
    # Where the run is put and what it reads, and what follows the machine.
    for name in ("output_dir", "data", "project", "tracker", "compile", "mixed_precision"):
        del ours[name]
    expected = {
        **ours,
        **{"optimizer": "adamw", "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.999, "lr_schedule": "cosine"},
        **{"warmup_steps": 0, "min_lr_ratio": 0.1, "packing": False, "val_fraction": 0.0, "dropout": 0.0},
        **{"num_key_value_heads": 4, "intermediate_size": 2432, "learning_rate": 5e-4},
    }
    assert {name: getattr(config, name) for name in expected} == expected


def test_the_page_on_migration_tells_our_defaults() -> None:
    plain = PretrainConfig()
    by_flag = {field.flag: getattr(plain, name) for name, field in schema_of(PretrainConfig).items()}
    rows = re.findall(
        r"^\| `--\w+` \| [^|]* \| `(--[\w-]+)[^|]*` \| `(\w[^`]*)`",
        MIGRATION.read_text(encoding="utf-8"),
        re.M,
    )
    mapped = {flag: value for flag, value in rows if by_flag.get(flag) is not None and flag != "--use-moe"}
    assert len(mapped) > 10
    for flag, value in mapped.items():
        ours = by_flag[flag]
        assert (float(value) if isinstance(ours, int | float) else value) == ours, flag
