"""The model of step time against measurements, by hand, and where it must rise or fall."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from minimind.errors import ConfigError
from minimind.planning.scaled_run import ScaledRun, ScaleRequest
from minimind.planning.step_time import (
    Cluster,
    MuonWork,
    SingleGPU,
    all_gather_seconds,
    all_reduce_seconds,
    ddp_step,
    fsdp2_step,
    link_bandwidth,
)

ROOT = Path(__file__).parents[2]
ONE = SingleGPU(
    seconds=0.060,
    forward_seconds=0.018,
    backward_seconds=0.036,
    micro_batches=1,
    parameters=64_000_000,
    layers=8,
    embedding_parameters=5_000_000,
    muon=MuonWork(seconds=0.004, elements=59_000_000, largest=0.03, largest_stack=0.03),
)


def nodes(count: int, network: float = 400e9) -> Cluster:
    return Cluster(8 * count, count, 450e9, network)


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "step_time_model", ROOT / "benchmarks" / "step_time_model.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["step_time_model"] = module
    spec.loader.exec_module(module)
    return module


def test_predictions_are_within_5_percent_of_all_measurements_but_one(benchmark: ModuleType) -> None:
    far = [row for row in benchmark.MEASURED if abs(benchmark.predicted(row)[1]) > 0.05]
    assert [(row.gpu, row.strategy) for row in far] == [("H100", "FSDP2")]


def test_the_tables_of_the_documentation_are_those_of_the_model(benchmark: ModuleType) -> None:
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    rows = (benchmark.MEASURED[0], benchmark.MEASURED[3])
    tables = [benchmark.checks(), *(benchmark.curve(row.preset, row.sequences, row.one) for row in rows)]
    for table in tables:
        assert "\n".join(table) in page, "run benchmarks/step_time_model.py and paste its tables"


def test_collectives_by_hand() -> None:
    # 82% of 450 GB/s in a node; between nodes 94% of the network, if that is slower.
    alone = 2 * 7 / 8 * 1e9 / 369e9 + 8.4e-6 + 2 * 7 * 3.4e-6
    assert all_reduce_seconds(1e9, nodes(1)) == pytest.approx(alone)
    # 128 nodes: a tree of 7 levels. 100 Gbit/s are 12.5 GB/s.
    tree = 2 * 1023 / 1024 * 1e9 / (0.94 * 12.5e9) + 8.4e-6 + 2 * (7 * 3.4e-6 + 7 * 14e-6)
    assert all_reduce_seconds(1e9, nodes(128, 12.5e9)) == pytest.approx(tree)
    ring = 15 / 16 * 1e9 / 369e9 + 8.4e-6 + 14 * 3.4e-6 + 14e-6
    assert all_gather_seconds(1e9, nodes(2)) == pytest.approx(ring)


def test_muon_by_hand() -> None:
    # Of one 2 x 3 matrix: five steps of 4 * 4 * 3 + 2 * 8 FLOP; the stack holds two of them.
    work = MuonWork.of([(3, 2), (2, 2, 3)], 64 / 0.63)
    assert work.elements == 18
    assert work.seconds == pytest.approx(15)
    assert (work.largest, work.largest_stack) == pytest.approx((1 / 3, 2 / 3))
    assert work.saved(2, whole_stacks=False) == pytest.approx(7.5)
    assert work.saved(1000, whole_stacks=False) == pytest.approx(10)  # a matrix is not split
    assert work.saved(1000, whole_stacks=True) == pytest.approx(5)


def test_one_gpu_has_no_overhead() -> None:
    alone = Cluster(1, 1, 450e9, 50e9)
    for step in (ddp_step(ONE, alone), fsdp2_step(ONE, alone), ddp_step(ONE, alone, muon_shared=True)):
        assert (step.seconds, step.efficiency) == (0.060, 1.0)


def test_what_makes_a_step_faster_and_slower() -> None:
    step = ddp_step(ONE, nodes(4), muon_shared=False, graphs=False)
    assert step.muon == 0
    assert ddp_step(ONE, nodes(4), muon_shared=True, graphs=False).muon < 0
    graphs = ddp_step(ONE, nodes(4), muon_shared=False, graphs=True)
    assert graphs.launches < step.launches
    # In a graph stragglers grow with the step, without one they do not.
    assert graphs.stragglers == pytest.approx(ddp_step(replace(ONE, seconds=0.03), nodes(4)).stragglers * 2)
    assert step.stragglers < ddp_step(ONE, nodes(128), graphs=False).stragglers
    half = ddp_step(replace(ONE, gradient_bytes=2), nodes(4), muon_shared=False, graphs=False)
    # Without the latency it would be half.
    assert 0.5 < half.communication / step.communication < 0.75
    # At 10 Gbit/s reducing 256 MB takes 0.4 s, of which the backward pass hides 0.036.
    slow = ddp_step(ONE, nodes(4, 1.25e9), graphs=False)
    assert slow.communication == pytest.approx(0.42 - 0.036 * (1 - 0.18), rel=0.02)


def test_a_host_that_is_slower_than_the_gpu_sets_the_time_of_a_step() -> None:
    small = replace(ONE, seconds=0.010)
    assert ddp_step(small, nodes(1), graphs=False).launches == pytest.approx(37.7e-3 - 0.010)
    twice = replace(small, micro_batches=2)
    assert ddp_step(twice, nodes(1), graphs=False).launches == pytest.approx(2 * 37.7e-3 - 0.010)


def test_hsdp_avoids_the_latency_of_gathering_over_all_gpus() -> None:
    far, hybrid = (fsdp2_step(ONE, nodes(128), hybrid=way) for way in (False, True))
    assert hybrid.communication < far.communication / 10
    # In one node both are the same.
    assert fsdp2_step(ONE, nodes(1), hybrid=True).communication == pytest.approx(
        fsdp2_step(ONE, nodes(1)).communication, rel=0.05
    )


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        ("NVIDIA H100 80GB HBM3", 450),
        ("NVIDIA H200", 450),
        ("NVIDIA H100 PCIe", 32),
        ("NVIDIA A100-SXM4-80GB", 300),
        ("NVIDIA A800-SXM4-80GB", 200),
        ("NVIDIA B200", 900),
        ("NVIDIA GeForce RTX 4090", 32),
    ],
)
def test_links_of_gpus(name: str, gigabytes: float) -> None:
    assert link_bandwidth(name) == gigabytes * 1e9


def test_nodes_have_8_gpus_and_400_gbit_per_gpu_by_default() -> None:
    assert ScaleRequest(64).cluster(1.0) == Cluster(64, 8, 1.0, 400e9)
    assert ScaleRequest(4).cluster(1.0) == Cluster(4, 1, 1.0, 200e9)
    assert ScaleRequest(12, 3, 80.0).cluster(1.0) == Cluster(12, 3, 1.0, 10e9)


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        (ScaleRequest(12), "is not a multiple of 8 GPUs per node; give --nodes too"),
        (ScaleRequest(12, 5), "is not a multiple of --nodes 5"),
        (ScaleRequest(8, None, 100.0), "--network-bandwidth is between nodes"),
    ],
)
def test_gpus_that_make_no_cluster_are_refused(request_: ScaleRequest, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        request_.cluster(1.0)


def test_rows_and_json_of_a_prediction() -> None:
    run = ScaledRun.predict(
        nodes(2),
        ONE,
        gpu="A GPU",
        measured=True,
        graphs=True,
        step_tokens=1 << 20,
        total_steps=100,
        other_seconds=5.0,
    )
    assert set(run.steps) == {"DDP", "FSDP2", "HSDP"}
    step = run.steps["DDP"].seconds
    assert run.seconds("DDP") == 100 * step + 5
    keys = [key for key, _ in run.rows()]
    assert keys == ["scaled to", "DDP", "", "FSDP2", "", "HSDP", "", "assuming"]
    assert dict(run.rows())["scaled to"].startswith("16 x A GPU on 2 nodes: 100 steps of 1.05M tokens")
    assert run.to_dict()["strategies"]["DDP"]["tokens_per_second"] == (1 << 20) / step
    one_node = ScaledRun.predict(
        nodes(1),
        ONE,
        gpu="A GPU",
        measured=False,
        graphs=False,
        step_tokens=1,
        total_steps=1,
        other_seconds=0.0,
    )
    assert "network" not in dict(one_node.rows())["assuming"]
    assert run.steps["DDP"].launches < one_node.steps["DDP"].launches
    assert "no CUDA graphs" in dict(one_node.rows())["assuming"]
    assert "estimated at 40%" in dict(one_node.rows())["assuming"]
