"""Golden losses: short runs compute what they computed when they were recorded, to the last bit."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "golden"))

import record

GROUPS = {"one process": list(record.SINGLE), "DDP": ["ddp"], "FSDP2": ["fsdp2"]}


@pytest.mark.parametrize(
    "group",
    [
        "one process",
        # Most of their time passes before the processes train.
        pytest.param("DDP", marks=pytest.mark.slow),
        pytest.param("FSDP2", marks=pytest.mark.slow),
    ],
)
def test_runs_compute_the_golden_losses(group: str) -> None:
    found = record.run_cases(GROUPS[group])
    differing = [line for name in GROUPS[group] for line in record.differences(name, found[name])]
    assert not differing, "\n".join(differing)


def test_every_recording_belongs_to_a_case_that_is_compared() -> None:
    recordings = {path.stem for path in record.HERE.glob("*.json")} - {"tokenizer"}
    assert recordings == set(record.CASES) == {name for names in GROUPS.values() for name in names}


def test_a_change_in_the_last_bit_is_a_difference() -> None:
    found = copy.deepcopy(record.recorded("adamw"))
    assert not record.differences("adamw", found)
    loss = found["losses"][-1]
    found["losses"][-1] = loss * (1 + 1e-15)
    assert found["losses"][-1] != loss
    assert len(record.differences("adamw", found)) == 1


def test_another_version_of_pytorch_may_round_differently() -> None:
    found = copy.deepcopy(record.recorded("adamw"))
    found["torch"] = "0.0"
    found["losses"][-1] *= 1 + 1e-6
    assert not record.differences("adamw", found)
    found["losses"][-1] *= 1 + 1e-3
    assert len(record.differences("adamw", found)) == 1


def test_the_recorded_runs_reach_what_they_are_meant_to_cover() -> None:
    spikes, resumed = record.recorded("spike_skip"), record.recorded("resumed")
    assert 0 < spikes["skipped_steps"][-1] < 30
    assert len(resumed["losses"]) == 12
    assert any("load" in name for name in record.recorded("moe")["metrics"])
    rates = record.recorded("wsd_mixture")["learning_rates"]
    assert rates[6] == max(rates) > 2 * rates[-1]
    assert all(len(record.recorded(name)["validation_losses"]) >= 3 for name in record.CASES)
