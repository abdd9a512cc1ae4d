"""Which options may change on resume."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from minimind.checkpoint.compatibility import CHANGED, FREE, REFUSED, changed_group_values, compare_settings
from minimind.config.options import PretrainConfig

WORKED_OUT = {"tokenizer_fingerprint", "data_fingerprint", "data_mixture", "norm_topk_prob"}


def settings(**changes: Any) -> dict[str, Any]:
    config = dataclasses.asdict(PretrainConfig())
    return (
        config
        | {
            "global_batch_size": 64,
            "tokenizer_fingerprint": "t1",
            "data_fingerprint": "d1",
            "data_mixture": "none",
            "norm_topk_prob": None,
        }
        | changes
    )


def test_every_option_is_classified_once() -> None:
    fields = {field.name for field in dataclasses.fields(PretrainConfig)}
    classes = [set(REFUSED), set(CHANGED), set(FREE)]
    assert sum(map(len, classes)) == len(set.union(*classes))
    assert set.union(*classes) == fields | WORKED_OUT


def test_equal_settings_differ_in_nothing_even_after_json() -> None:
    now = settings(data=("a.txt", "b.txt"), val_data=("c.txt",))
    assert compare_settings(json.loads(json.dumps(now)), now) == ([], [])


@pytest.mark.parametrize("key", sorted(FREE))
def test_free_options_change_silently(key: str) -> None:
    assert compare_settings(settings(), settings(**{key: "another"})) == ([], [])


@pytest.mark.parametrize("key", sorted(CHANGED))
def test_changed_options_are_reported(key: str) -> None:
    refused, changed = compare_settings(settings(**{key: 1}), settings(**{key: 2}))
    assert refused == []
    (line,) = changed
    assert line.startswith(f"--{key.replace('_', '-')} 1 → 2: ")


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_refused_options_name_old_new_and_the_way_out(key: str) -> None:
    refused, changed = compare_settings(settings(**{key: 8}), settings(**{key: 16}))
    assert changed == []
    (line,) = refused
    assert "8 → 16" in line
    assert "{" not in line
    flag = "--data" if key.startswith("data_") else "--" + key.removesuffix("_fingerprint").replace("_", "-")
    flag = {"norm_topk_prob": "--from-weight"}.get(key, flag)
    assert flag in line.partition(": ")[2]


def test_the_same_global_batch_divided_otherwise_is_fine_and_another_is_not() -> None:
    saved = settings(batch_size=32, accumulation_steps=2)
    assert compare_settings(saved, settings(batch_size=16, accumulation_steps=4)) == ([], [])
    refused, _ = compare_settings(saved, settings(batch_size=16, accumulation_steps=2, global_batch_size=32))
    assert refused == [
        "--global-batch-size 64 → 32: each step would train on other sequences; choose --batch-size and "
        "--accumulation-steps so that batch size x accumulation x processes is 64, "
        "or give --global-batch-size 64."
    ]


def test_booleans_are_refused_with_the_flag_to_give() -> None:
    refused, _ = compare_settings(settings(packing=True), settings(packing=False))
    assert "give --packing, or start a new run" in refused[0]
    refused, _ = compare_settings(settings(packing=False), settings(packing=True))
    assert "give --no-packing, or start a new run" in refused[0]


def test_all_differences_are_reported_together() -> None:
    refused, changed = compare_settings(
        settings(), settings(seed=1, hidden_size=64, learning_rate=1.0, dropout=0.1)
    )
    assert len(refused) == 2
    assert len(changed) == 2


def test_a_key_that_one_side_lacks_is_not_compared() -> None:
    saved = settings()
    del saved["rope_theta"]
    assert compare_settings(saved, settings(rope_theta=5.0)) == ([], [])


def test_group_values_changed_on_purpose() -> None:
    assert changed_group_values(settings(), settings()) == frozenset()
    assert changed_group_values(settings(), settings(beta2=0.5, learning_rate=3.0)) == {"betas"}
    assert changed_group_values(settings(), settings(weight_decay=0.5)) == {"weight_decay"}
