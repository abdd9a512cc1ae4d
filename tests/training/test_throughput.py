"""Speed, time left, and where the time went, against a clock that the test moves."""

from __future__ import annotations

import contextlib

import pytest
import torch

from minimind.training.peak_flops import device_peak_flops
from minimind.training.throughput import WARMUP_STEPS, Meter


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Trainer:
    """Runs steps of known length on a clock; the values of a step arrive `lag` steps later."""

    def __init__(self, total_steps: int, *, lag: int = 0, **options) -> None:
        self.clock = Clock()
        self.lag = lag
        options = {"flops_per_token": 10.0, "num_processes": 2, "peak_flops": None} | options
        self.meter = Meter(total_steps=total_steps, clock=self.clock, **options)
        self.step = options.get("start_step", 0)
        self.reports: dict[int, dict[str, float]] = {}

    def run(self, steps: int, *, seconds: float, tokens: int = 100, wait: float = 0.0, every: int = 10):
        for _ in range(steps):
            with self.meter.phase("data"):
                self.clock.now += wait
            self.clock.now += seconds - wait
            self.step += 1
            self.meter.step(tokens)
            arrived = self.step - self.lag
            if arrived > 0 and arrived % every == 0:
                self.reports[arrived] = self.meter.report(arrived)
        return self.reports

    def phase(self, name: str, seconds: float) -> None:
        with self.meter.phase(name):
            self.clock.now += seconds


def test_speed_leaves_out_the_slow_first_steps():
    trainer = Trainer(100)
    trainer.run(1, seconds=60.0)
    reports = trainer.run(19, seconds=0.5)
    assert reports[10]["tokens_per_second"] == pytest.approx(200)
    assert reports[20]["tokens_per_second"] == pytest.approx(200)
    assert reports[20]["elapsed"] == pytest.approx(60 + 19 * 0.5)
    assert trainer.meter.totals()["first_steps"] == pytest.approx(60 + (WARMUP_STEPS - 1) * 0.5)


def test_speed_leaves_out_evaluation_and_saving_but_not_waiting_for_data():
    trainer = Trainer(100)
    trainer.run(10, seconds=0.5)
    trainer.phase("evaluation", 30.0)
    trainer.phase("saving", 7.0)
    report = trainer.run(10, seconds=0.5, wait=0.1)[20]
    assert report["tokens_per_second"] == pytest.approx(200)
    assert report["data_wait_seconds"] == pytest.approx(1.0)
    assert report["data_wait"] == pytest.approx(0.2)


def test_speed_counts_the_steps_that_arrived_not_those_launched():
    """Steps launched ahead carry other token counts; the report of a step must not count them."""
    trainer = Trainer(100, lag=2)
    trainer.run(10, seconds=0.5, tokens=100)
    trainer.run(4, seconds=0.5, tokens=100)
    trainer.run(6, seconds=0.5, tokens=100)
    reports = trainer.run(2, seconds=0.5, tokens=100_000)
    assert sorted(reports) == [10, 20]
    assert reports[20]["tokens_per_second"] == pytest.approx(200)


def test_report_of_every_step_has_a_speed_from_the_second_on():
    trainer = Trainer(100)
    reports = trainer.run(1, seconds=20.0, every=1)
    assert "tokens_per_second" not in reports[1]
    assert "eta_seconds" not in reports[1]
    reports = trainer.run(1, seconds=0.5, every=1)
    assert reports[2]["tokens_per_second"] == pytest.approx(200)
    assert reports[2]["eta_seconds"] == pytest.approx(98 * 0.5)


def test_time_left_is_right_from_the_second_report_and_counts_evaluations_and_saving():
    """The estimate at step 20 is compared with the time that the rest then takes."""
    total, every = 105, {"evaluation": 10, "saving": 50}
    trainer = Trainer(total, intervals=every)
    cost = {"evaluation": 4.0, "saving": 9.0}
    # One save before the estimate, so that its cost is known.
    trainer.phase("saving", cost["saving"])
    planned_saves = 1
    estimate = estimated_at = None
    for step in range(1, total + 1):
        trainer.run(1, seconds=30.0 if step == 1 else 0.5)
        if step == 20:
            estimate, estimated_at = trainer.reports[20]["eta_seconds"], trainer.clock.now
        if step % every["evaluation"] == 0 or step == total:
            trainer.phase("evaluation", cost["evaluation"])
        if planned_saves and step == 50:
            planned_saves -= 1  # the early save took this one's place
        elif step % every["saving"] == 0 or step == total:
            trainer.phase("saving", cost["saving"])
    assert estimate == pytest.approx(trainer.clock.now - estimated_at)


def test_time_left_after_a_resume_counts_only_what_is_still_to_do():
    trainer = Trainer(100, start_step=60, intervals={"evaluation": 20})
    trainer.run(20, seconds=0.5)
    trainer.phase("evaluation", 4.0)
    report = trainer.run(10, seconds=0.5)[90]
    assert report["eta_seconds"] == pytest.approx(10 * 0.5 + 4.0)


def test_time_left_follows_a_change_of_speed():
    trainer = Trainer(1000)
    trainer.run(100, seconds=0.5)
    report = trainer.run(200, seconds=2.0)[300]
    assert report["eta_seconds"] == pytest.approx(700 * 2.0)


def test_utilization_is_the_models_arithmetic_over_the_peak_of_all_devices():
    trainer = Trainer(100, flops_per_token=6e9, peak_flops=1e12, num_processes=2)
    report = trainer.run(10, seconds=0.5)[10]
    assert report["mfu"] == pytest.approx(200 * 6e9 / 2e12)
    assert trainer.meter.totals()["mfu"] == pytest.approx(report["mfu"])


def test_unknown_peak_shows_no_utilization():
    trainer = Trainer(100, peak_flops=None)
    assert "mfu" not in trainer.run(10, seconds=0.5)[10]
    assert "mfu" not in trainer.meter.totals()


def test_totals_add_up_to_the_elapsed_time():
    trainer = Trainer(100)
    trainer.phase("compile", 12.0)
    trainer.run(50, seconds=0.5, wait=0.1)
    trainer.phase("evaluation", 5.0)
    trainer.phase("saving", 2.0)
    totals = trainer.meter.totals()
    parts = ("first_steps", "training", "data", "compile", "evaluation", "saving")
    assert sum(totals[part] for part in parts) == pytest.approx(totals["elapsed"])
    assert totals["elapsed"] == pytest.approx(12 + 25 + 5 + 2)
    assert totals["data"] == pytest.approx(5.0)
    assert totals["tokens_per_second"] == pytest.approx(200)


def test_run_too_short_to_measure_still_has_a_speed():
    trainer = Trainer(2)
    trainer.run(2, seconds=0.5)
    assert trainer.meter.totals()["tokens_per_second"] == pytest.approx(200)


def test_phase_is_booked_even_when_it_fails():
    trainer = Trainer(10)
    with contextlib.suppress(RuntimeError), trainer.meter.phase("saving"):
        trainer.clock.now += 3.0
        raise RuntimeError
    assert trainer.meter.totals()["saving"] == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("phase", "sentence"),
    [
        ("evaluation", "Evaluation took 50% of the time; a larger --eval-interval shortens it."),
        ("saving", "Saving took 50% of the time; a larger --save-interval shortens it."),
        ("compile", "Compiling took 50% of the time."),
    ],
)
def test_bottleneck_names_the_phase_that_took_the_time(phase, sentence):
    trainer = Trainer(100)
    trainer.run(100, seconds=0.5)
    trainer.phase(phase, 50.0)
    assert trainer.meter.bottleneck() == sentence


def test_bottleneck_names_data_utilization_or_nothing():
    waiting = Trainer(100)
    waiting.run(100, seconds=0.5, wait=0.2)
    assert waiting.meter.bottleneck().startswith("Waiting for data took 40% of the time;")
    idle = Trainer(100, flops_per_token=1e9, peak_flops=1e12)
    idle.run(100, seconds=0.5)
    assert idle.meter.bottleneck().startswith("The training steps used 10% of the peak arithmetic;")
    fine = Trainer(100)
    fine.run(100, seconds=0.5)
    assert fine.meter.bottleneck() is None


def test_compiling_is_named_only_where_something_was_compiled():
    slow = Trainer(4)
    slow.run(4, seconds=0.5)
    assert slow.meter.bottleneck(compiled=True).startswith("The first steps, which set up and compile, took")
    assert "compil" not in slow.meter.bottleneck(compiled=False)


def test_memory_is_that_of_the_process_where_the_device_has_no_counter():
    before = Meter(1.0, 1, None, 10, device=torch.device("cpu")).report(0)["memory_gb"]
    held = torch.ones(50_000_000)
    after = Meter(1.0, 1, None, 10).report(0)["memory_gb"]
    assert held.numel() * 4e-9 * 0.9 < after - before < held.numel() * 4e-9 * 1.5


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("Tesla V100-SXM2-32GB", 125),
        ("Tesla T4", 65),
    ],
)
def test_peak_of_known_gpus(name, tflops):
    assert device_peak_flops(name) == tflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H300",
        "NVIDIA A10G",
        "NVIDIA L4000",
        "Intel Arc A770",
    ],
)
def test_relatives_and_unknown_gpus_get_no_peak(name):
    assert device_peak_flops(name) is None
