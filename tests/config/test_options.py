"""The options of a run: defaults, conflicts, and the page that documents them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from minimind.config.naming import options_were_typed
from minimind.config.options import CONFIG_SECTIONS, PretrainConfig
from minimind.config.presets import preset_config
from minimind.config.reference_page import PAGE, render
from minimind.config.schema import schema_of, write_toml
from minimind.errors import ConfigError


def problems_when_typed(**values: object) -> list[str]:
    with options_were_typed(), pytest.raises(ConfigError) as caught:
        PretrainConfig(**values)  # type: ignore[arg-type]
    return caught.value.problems


def test_the_defaults_are_valid() -> None:
    assert PretrainConfig().hidden_size == 512


def test_sections_hold_every_option_once_and_in_order() -> None:
    names = [name for section in CONFIG_SECTIONS for name in schema_of(section)]
    assert names == list(schema_of(PretrainConfig))


def test_no_two_options_share_a_flag() -> None:
    fields = schema_of(PretrainConfig).values()
    flags = [flag for field in fields for flag in (field.flag, *field.info.aliases)]
    assert len(flags) == len(set(flags))


def test_every_help_is_a_sentence() -> None:
    for field in schema_of(PretrainConfig).values():
        assert field.info.help[0].isupper() or field.info.help.startswith("torch.compile"), field.name
        assert field.info.help.endswith("."), field.name


def test_all_values_out_of_range_are_listed() -> None:
    assert problems_when_typed(epochs=0, learning_rate=-1.0, tracker=("wandb", "paper")) == [
        "--epochs 0 is out of range; it must be at least 1.",
        "--learning-rate -1.0 is out of range; it must be above 0.",
        "--tracker paper is not known; choose tensorboard, wandb, swanlab, mlflow, csv or none.",
    ]


def test_all_conflicts_are_listed() -> None:
    problems = problems_when_typed(
        num_attention_heads=6,
        num_key_value_heads=4,
        accumulation_steps=2,
        global_batch_size=64,
        val_data=("v.txt",),
        tracker=("none", "wandb"),
    )
    assert problems == [
        "--num-key-value-heads 4 does not divide --num-attention-heads 6; use one of 1, 2, 3, 6.",
        "--hidden-size 512 is not a multiple of --num-attention-heads 6; "
        "change one of them or set --head-dim.",
        "--accumulation-steps and --global-batch-size both set the global batch; give only one of them.",
        "--val-data needs --data; give the training data too.",
        "--tracker none cannot be combined with another tracker; remove one of them.",
    ]


def test_options_of_experts_belong_to_experts_and_to_each_other() -> None:
    assert problems_when_typed(num_experts=8, moe_intermediate_size=64) == [
        "--num-experts 8 applies to MoE models only; add --use-moe.",
        "--moe-intermediate-size 64 applies to MoE models only; add --use-moe.",
    ]
    assert problems_when_typed(use_moe=True, num_experts_per_tok=5) == [
        "--num-experts-per-tok 5 is more than --num-experts 4; lower it."
    ]


@pytest.mark.parametrize("values", [{"head_dim": 63}, {"hidden_size": 72, "num_attention_heads": 8}])
def test_an_odd_head_size_is_refused(values: dict[str, int]) -> None:
    assert problems_when_typed(**values) == [
        "rotary position embeddings need an even head dimension; set --head-dim to an even number."
    ]


def test_the_page_in_docs_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / PAGE
    assert page.read_text(encoding="utf-8") == render(), (
        "write it again by: python -m minimind.config.reference_page"
    )


def test_paths_and_scalars_of_other_libraries_are_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = PretrainConfig(
        data=[Path("a.jsonl"), "~/b.jsonl"],  # type: ignore[arg-type, list-item]
        output_dir=Path("~/run"),  # type: ignore[arg-type]
        max_steps=np.int64(5),  # type: ignore[arg-type]
        epochs=torch.tensor(2),  # type: ignore[arg-type]
        learning_rate=np.float32(0.5),  # type: ignore[arg-type]
        dropout=np.float64(0.25),
        packing=np.bool_(False),  # type: ignore[arg-type]
    )
    assert config == PretrainConfig(
        data=("a.jsonl", "/home/me/b.jsonl"),
        output_dir="/home/me/run",
        max_steps=5,
        epochs=2,
        learning_rate=0.5,
        dropout=0.25,
        packing=False,
    )
    kinds = [type(getattr(config, name)) for name in ("max_steps", "epochs", "learning_rate", "dropout")]
    assert kinds == [int, int, float, float]
    text = write_toml(config, CONFIG_SECTIONS)
    assert "dropout = 0.25\n" in text
    assert 'output_dir = "/home/me/run"\n' in text


def test_an_array_is_no_number() -> None:
    with pytest.raises(ConfigError, match="max_steps=array"):
        PretrainConfig(max_steps=np.array([5]))  # type: ignore[arg-type]


def test_messages_name_fields_in_python_and_flags_of_a_command_line() -> None:
    with pytest.raises(ConfigError) as caught:
        PretrainConfig(max_steps="5", num_attention_heads=0)  # type: ignore[arg-type]
    assert caught.value.problems == [
        "num_attention_heads=0 is out of range; it must be at least 1.",
        "max_steps='5' is not a whole number; write for example 8.",
    ]
    with pytest.raises(ConfigError) as caught:
        PretrainConfig(num_experts=8, val_data=("v",))
    assert caught.value.problems == [
        "num_experts 8 applies to MoE models only; add use_moe.",
        "val_data needs data; give the training data too.",
    ]
    with pytest.raises(ConfigError) as caught:
        preset_config("big", max_steps=0)
    assert caught.value.problems[0].startswith("preset big is not known; choose one of tiny, ")
    assert caught.value.problems[1] == "max_steps=0 is out of range; it must be at least 1."
    assert problems_when_typed(max_steps=0) == ["--max-steps 0 is out of range; it must be at least 1."]
