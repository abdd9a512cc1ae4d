"""What reaches metrics.jsonl and the trackers, and that none of them can hold up a run."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import re
import sys
import threading
import time
import types
from pathlib import Path

import pytest
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from torch.utils.tensorboard import SummaryWriter

from minimind.config.options import PretrainConfig
from minimind.errors import ConfigError, UserError
from minimind.io import append, atomic
from minimind.run_folder import RunFolder
from minimind.tracking.backends import BackgroundThread, grouped_name
from minimind.tracking.metrics_file import parse_line
from minimind.tracking.trackers import Trackers, check_trackers, hyper_parameters


class FakeRun:
    """Records what WandB's or SwanLab's run object is asked to do."""

    def __init__(self, options: dict) -> None:
        self.options = options
        self.id = options.get("id", "fresh-id")
        self.logged: list[tuple[int, dict]] = []
        self.finished_by: threading.Thread | None = None

    def log(self, values: dict, step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished_by = threading.current_thread()


class FakePackage(types.ModuleType):
    """Stands in for the packages `wandb` and `swanlab`; test_tracker_files.py has the real ones."""

    Settings = dict

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.runs: list[FakeRun] = []
        self.config = self
        self.hyper_parameters: dict = {}

    def init(self, **options) -> FakeRun:
        self.runs.append(FakeRun(options))
        return self.runs[-1]

    def update(self, values: dict, allow_val_change: bool = True) -> None:
        self.hyper_parameters.update(values)

    def __setitem__(self, key: str, value: str) -> None:
        self.hyper_parameters[key] = value


@pytest.fixture(params=["wandb", "swanlab"])
def package(request, monkeypatch) -> FakePackage:
    fake = FakePackage(request.param)
    monkeypatch.setitem(sys.modules, request.param, fake)
    return fake


class Desk:
    """Opens trackers in a folder and keeps the warnings."""

    def __init__(self, folder: Path) -> None:
        self.folder = RunFolder(folder)
        self.warnings: list[str] = []
        self.process = Accelerator(cpu=True)

    def open(self, *tracker: str, state=None, start_step: int = 0, **options) -> Trackers:
        config = PretrainConfig(tracker=tracker or ("none",), **options)
        return Trackers(
            config, self.folder, self.process, state, start_step=start_step, warn=self.warnings.append
        )

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.folder.metrics.read_text().splitlines()]


@pytest.fixture
def desk(tmp_path) -> Desk:
    (tmp_path / "my-run").mkdir()
    return Desk(tmp_path / "my-run")


def test_metrics_file_has_a_json_object_for_each_report(desk):
    trackers = desk.open()
    trackers.log({"loss": 3.5, "tokens": 100, "grad_norm": math.nan, "mfu": math.inf}, 10)
    trackers.log({"val_loss": 3.25}, 10)
    trackers.close()
    train, evaluation = desk.lines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", train.pop("time"))
    assert train == {
        "step": 10, "kind": "train", "loss": 3.5, "tokens": 100, "grad_norm": None, "mfu": None,
    }  # fmt: skip
    assert evaluation["kind"] == "evaluation"
    assert evaluation["val_loss"] == 3.25
    assert desk.warnings == []


def test_resume_cuts_what_was_logged_beyond_the_checkpoint(desk):
    trackers = desk.open()
    for step in (10, 20, 30):
        trackers.log({"loss": float(step)}, step)
    trackers.close()
    with desk.folder.metrics.open("a") as file:
        file.write('{"step": 40, "los')  # killed while writing
    trackers = desk.open(start_step=20)
    trackers.log({"loss": 31.0}, 30)
    trackers.close()
    assert [(line["step"], line["loss"]) for line in desk.lines()] == [(10, 10.0), (20, 20.0), (30, 31.0)]


def test_torn_line_inside_the_kept_part_does_no_harm(desk):
    desk.folder.metrics.write_text('{"step": 1, "loss": 2.0}\n{"step": 2\nnull\n\n{"step": 3, "loss": 1.0}')
    trackers = desk.open(start_step=5)
    trackers.log({"loss": 0.5}, 6)
    trackers.close()
    assert [line["step"] for line in desk.lines()] == [1, 3, 6]


def test_run_that_starts_over_keeps_no_line(desk):
    desk.folder.metrics.write_text('{"step": 0, "val_loss": 2.0}\n{"step": 1, "loss": 2.0}\n')
    trackers = desk.open(start_step=0)
    trackers.close()
    assert desk.lines() == []


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_events_lie_in_the_run_folder_and_a_resume_leaves_one_curve(desk):
    trackers = desk.open("tensorboard")
    for step in (10, 20, 30):
        trackers.log({"loss": float(step)}, step)
    trackers.close()
    trackers = desk.open("tensorboard", start_step=20)
    trackers.log({"loss": 31.0}, 30)
    trackers.close()
    assert desk.warnings == []
    folder = desk.folder.path / "tensorboard"
    assert scalars(folder, "train/loss") == [(10, 10.0), (20, 20.0), (30, 31.0)]
    # TensorBoard takes a folder inside for one more run.
    assert not [path for path in folder.iterdir() if path.is_dir()]


def test_run_that_starts_over_leaves_one_curve_in_tensorboard(desk):
    for loss in (1.0, 2.0):
        trackers = desk.open("tensorboard")
        trackers.log({"loss": loss}, 0)
        trackers.log({"loss": loss}, 10)
        trackers.close()
    assert scalars(desk.folder.path / "tensorboard", "train/loss") == [(0, 2.0), (10, 2.0)]


def test_a_rewind_leaves_one_curve_in_tensorboard(desk):
    trackers = desk.open("tensorboard")
    for step in (10, 20, 30):
        trackers.log({"loss": float(step)}, step)
    trackers.close()
    trackers = desk.open("tensorboard", start_step=10)
    trackers.log({"loss": 21.0}, 20)
    trackers.close()
    assert desk.warnings == []
    assert scalars(desk.folder.path / "tensorboard", "train/loss") == [(10, 10.0), (20, 21.0)]


def test_hyper_parameters_have_types_that_tensorboard_takes():
    values = hyper_parameters(PretrainConfig(data=("a.txt", "b.txt"), learning_rate=5e-4))
    assert values["data"] == "a.txt, b.txt"
    assert values["val_data"] == "none"
    assert values["max_steps"] == "none"
    assert values["learning_rate"] == 5e-4
    assert all(isinstance(value, (bool, int, float, str)) for value in values.values())


def test_wandb_and_swanlab_get_name_hyper_parameters_and_values(desk, package):
    trackers = desk.open(package.__name__, project="letters", learning_rate=0.25)
    trackers.log({"loss": 1.5}, 10)
    assert trackers.state() == {package.__name__: "fresh-id", f"{package.__name__}:grouped": "yes"}
    trackers.close()
    (run,) = package.runs
    name_key = {"wandb": "name", "swanlab": "experiment_name"}[package.__name__]
    assert run.options["project"] == "letters"
    assert run.options[name_key] == "my-run"
    assert "resume" not in run.options
    assert package.hyper_parameters["learning_rate"] == 0.25
    assert package.hyper_parameters["max_tokens"] == "none"
    assert run.logged == [(10, {"train/loss": 1.5})]
    # SwanLab's own finish refuses any other thread.
    assert (run.finished_by is threading.main_thread()) is (package.__name__ == "swanlab")
    assert run.finished_by is not None
    assert desk.warnings == []


def test_resume_goes_on_in_the_same_wandb_or_swanlab_run(desk, package):
    trackers = desk.open(package.__name__, state={package.__name__: "old-id"}, start_step=50)
    trackers.close()
    (run,) = package.runs
    assert run.options["id"] == "old-id"
    assert run.options["resume"] == "allow"
    assert trackers.state() == {package.__name__: "old-id"}


def test_a_run_of_an_earlier_version_goes_on_under_the_names_it_has(desk, package, monkeypatch):
    state = {package.__name__: "old-id"}
    trackers = desk.open(package.__name__, state=state, start_step=50)
    trackers.log({"val_loss": 1.0}, 60)
    trackers.close()
    assert package.runs[0].logged == [(60, {"val_loss": 1.0})]
    # Also at the next resume, while a run of this version keeps groups.
    assert trackers.state() == state
    grouped = {**state, f"{package.__name__}:grouped": "yes"}
    trackers = desk.open(package.__name__, state=grouped, start_step=50)
    trackers.log({"val_loss": 1.0}, 60)
    trackers.close()
    assert package.runs[1].logged == [(60, {"val/loss": 1.0})]
    assert trackers.state() == grouped


def test_old_events_of_tensorboard_go_on_under_their_tags(desk):
    folder = desk.folder.path / "tensorboard"
    folder.mkdir()
    with SummaryWriter(str(folder)) as writer:  # as earlier versions named them
        writer.add_scalar("loss", 3.0, 10)
    for start_step in (10, 20):
        trackers = desk.open("tensorboard", start_step=start_step)
        trackers.log({"loss": 2.0}, start_step + 10)
        trackers.close()
    assert scalars(folder, "loss") == [(10, 3.0), (20, 2.0), (30, 2.0)]
    trackers = desk.open("tensorboard")  # a run that starts over
    trackers.log({"loss": 2.0}, 10)
    trackers.close()
    assert scalars(folder, "train/loss") == [(10, 2.0)]


def test_tensorboard_shows_both_losses_in_one_chart_and_a_dozen_options(desk):
    for start_step in (0, 10):
        trackers = desk.open("tensorboard", start_step=start_step, learning_rate=0.25)
        trackers.close()
    events = EventAccumulator(str(desk.folder.path / "tensorboard"))
    events.Reload()
    (layout,) = events.Tensors("custom_scalars__config__")
    categories = layout_pb2.Layout.FromString(layout.tensor_proto.string_val[0]).category
    first = categories[0].chart[0]
    assert (first.title, list(first.multiline.tag)) == ("loss", ["train/loss", "val/loss"])
    metadata = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    shown = plugin_data_pb2.HParamsPluginData.FromString(metadata).session_start_info.hparams
    assert len(shown) == 12
    assert shown["learning_rate"].number_value == 0.25


@pytest.mark.parametrize(
    ("metric", "tag"),
    [
        ("loss", "train/loss"), ("val_bits_per_byte", "val/bits_per_byte"), ("mfu", "perf/mfu"),
        ("data_wait_seconds", "perf/data_wait_seconds"), ("total_training", "perf/total_training"),
        ("expert_load", "experts/expert_load"), ("my/metric", "my/metric"), ("rewinds", "train/rewinds"),
        ("cloze_en", "score/cloze_en"),
    ],
)  # fmt: skip
def test_metrics_are_grouped(metric, tag):
    assert grouped_name(metric) == tag


def test_csv_has_a_row_for_each_report_and_a_resume_repeats_none(desk):
    for start_step in (0, 20):
        trackers = desk.open("csv", start_step=start_step)
        for step in (10, 20, 30):
            trackers.log(
                {"loss": step / 10, "tokens": 7, "grad_norm": math.nan, "digest": "a,b"}, start_step + step
            )
        trackers.log({"val_loss": 1.5}, start_step + 30)
        trackers.log({"total_training": 3.0}, start_step + 30)
        trackers.log_text("sample", "once\nupon", 30)
        trackers.close()
    text = (desk.folder.path / "metrics.csv").read_text()
    assert text.splitlines()[0] == (
        "step,epoch,tokens,loss,val_loss,val_perplexity,val_bits_per_byte,learning_rate,grad_norm,"
        "tokens_per_second,mfu,memory_gb,elapsed"
    )
    rows = [
        (row["step"], row["loss"], row["val_loss"], row["grad_norm"])
        for row in csv.DictReader(io.StringIO(text))
    ]
    assert rows == [
        ("10", "1.0", "", ""), ("20", "2.0", "", ""),
        ("30", "1.0", "", ""), ("40", "2.0", "", ""), ("50", "3.0", "", ""), ("50", "", "1.5", ""),
    ]  # fmt: skip
    assert desk.warnings == []


def test_a_csv_of_a_run_that_starts_over_is_empty(desk):
    for _ in range(2):
        trackers = desk.open("csv")
        trackers.log({"loss": 1.0}, 0)
        trackers.close()
    assert len((desk.folder.path / "metrics.csv").read_text().splitlines()) == 2


class FakeMLflow(types.ModuleType):
    """Stands in for the package `mlflow`, whose active run belongs to the thread that started it."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.calls: list[tuple] = []
        limits = types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
        self.utils = types.SimpleNamespace(validation=limits)

    def search_experiments(self, filter_string: str) -> list:
        return []

    def start_run(self, *, run_id, run_name, **options):
        self.thread = threading.current_thread()
        self.calls.append(("start", run_id, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id or "new-id"))

    def end_run(self) -> None:
        assert threading.current_thread() is self.thread
        self.calls.append(("end",))

    def log_metrics(self, values, step, run_id) -> None:
        self.calls.append(("metrics", values, step, run_id))

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **options: self.calls.append((name, *args, *options.values()))


def test_mlflow_gets_parameters_once_and_metrics_by_the_id_of_its_run(desk, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    fake = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    trackers = desk.open("mlflow", project="letters", learning_rate=0.25)
    trackers.log({"loss": 1.5, "digest": "a"}, 10)
    trackers.log_text("sample_0", "once", 10)
    trackers.close()
    assert desk.warnings == []
    named = {call[0]: call[1:] for call in fake.calls}
    assert named["set_tracking_uri"] == (f"sqlite:///{desk.folder.path / 'mlflow.db'}",)
    assert named["start"] == (None, "my-run")
    assert named["log_params"][0]["learning_rate"] == 0.25
    assert named["metrics"] == ({"train/loss": 1.5}, 10, "new-id")
    assert named["log_text"] == ("once", "sample_0/step-00000010.txt", "new-id")
    assert fake.calls[-1] == ("end",)
    fake.calls.clear()
    trackers = desk.open("mlflow", state=trackers.state(), start_step=10)
    trackers.close()
    assert ("start", "new-id", None) in fake.calls
    assert "log_params" not in [call[0] for call in fake.calls], "parameters cannot be changed"


def test_missing_packages_are_refused_together_with_the_command_that_installs_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "swanlab", None)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError) as caught:
        check_trackers(PretrainConfig(tracker=("tensorboard", "wandb", "swanlab", "mlflow", "csv")))
    assert caught.value.problems == [
        "--tracker wandb needs the package wandb, which is not installed; pip install wandb.",
        "--tracker swanlab needs the package swanlab, which is not installed; pip install swanlab.",
        "--tracker mlflow needs the package mlflow, which is not installed; pip install mlflow.",
    ]


def test_swanlab_without_its_dashboard_cannot_be_local(monkeypatch):
    monkeypatch.setitem(sys.modules, "swanlab", types.ModuleType("swanlab"))
    monkeypatch.setitem(sys.modules, "swanboard", None)
    monkeypatch.setenv("SWANLAB_MODE", "local")
    with pytest.raises(ConfigError, match=r"pip install 'swanlab\[dashboard\]'"):
        check_trackers(PretrainConfig(tracker=("swanlab",)))
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    check_trackers(PretrainConfig(tracker=("swanlab",)))


def test_installed_packages_and_none_are_accepted(package):
    check_trackers(PretrainConfig(tracker=("tensorboard", package.__name__)))
    check_trackers(PretrainConfig(tracker=("none",)))


def test_tracker_that_cannot_start_is_reported_and_training_goes_on(desk, package, monkeypatch):
    def refuse(**options):
        raise ConnectionError("no network\nsecond line")

    monkeypatch.setattr(package, "init", refuse)
    trackers = desk.open(package.__name__)
    trackers.log({"loss": 1.0}, 1)
    trackers.close()
    assert desk.warnings == [
        f"tracker {package.__name__} could not be started (ConnectionError: no network); "
        "training continues without it."
    ]
    assert len(desk.lines()) == 1


def test_tracker_that_fails_is_reported_once_and_the_others_go_on(desk, package, monkeypatch):
    def refuse(self, values, step):
        raise ConnectionError("gone")

    monkeypatch.setattr(FakeRun, "log", refuse)
    trackers = desk.open("tensorboard", package.__name__)
    for step in (1, 2, 3):
        trackers.log({"loss": 1.0}, step)
    trackers.close()
    assert len(desk.warnings) == 1
    assert "failed and gets no more values (ConnectionError: gone)" in desk.warnings[0]
    assert len(desk.lines()) == 3
    assert len(scalars(desk.folder.path / "tensorboard", "train/loss")) == 3


def test_what_a_function_in_the_background_raises_is_reported_and_the_next_one_runs():
    errors, done = [], []
    thread = BackgroundThread("test", lambda error: errors.append(str(error)))
    thread.submit(lambda: 1 / 0)
    thread.submit(lambda: done.append(1))
    assert thread.close(10.0)
    assert (errors, done) == (["division by zero"], [1])


def test_no_step_waits_for_a_tracker_that_hangs_and_the_file_is_whole_all_the_same(
    desk, package, monkeypatch
):
    release = threading.Event()
    monkeypatch.setattr(FakeRun, "log", lambda self, values, step: release.wait(30))
    trackers = desk.open(package.__name__)
    began = time.perf_counter()
    for step in range(1, 101):
        trackers.log({"loss": 1.0}, step)
    trackers.close(timeout=0.2)
    assert time.perf_counter() - began < 5
    assert [line["step"] for line in desk.lines()] == list(range(1, 101))
    assert desk.warnings == ["the trackers were still busy after 0.2 s; their last values may be missing."]
    trackers.close()
    release.set()


def test_a_full_disk_loses_no_report_and_is_reported_once(desk, monkeypatch):
    trackers = desk.open("tensorboard")
    trackers.log({"loss": 0.0}, 0)
    trackers.flush()
    write = os.write

    def refuse(handle, data):
        """Write half of a record, then fail, as a disk does that fills up."""
        write(handle, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(append.os, "write", refuse)
        for step in (1, 2, 3):
            trackers.log({"loss": float(step)}, step)
        with pytest.raises(OSError, match=r"No space left.*metrics\.jsonl"):
            trackers.flush()
        time.sleep(0.1)
    trackers.log({"loss": 4.0}, 4)
    trackers.close()
    assert [line["loss"] for line in desk.lines()] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert scalars(desk.folder.path / "tensorboard", "train/loss") == [(n, float(n)) for n in range(5)]
    assert sorted(warning.partition(" cannot")[0] for warning in desk.warnings) == [
        "metrics.jsonl", "tracker tensorboard",
    ]  # fmt: skip
    assert all("No space left on device" in warning for warning in desk.warnings)


def test_reports_that_never_fit_are_counted_at_the_end(desk, monkeypatch):
    trackers = desk.open()

    def refuse(handle, data):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(append.os, "write", refuse)
        trackers.log({"loss": 1.0}, 1)
        trackers.log({"loss": 1.0}, 2)
        trackers.close()
    assert desk.warnings[1:] == [f"2 lines of {desk.folder.metrics} could not be written and are lost."]


def test_a_metrics_file_that_cannot_be_rewritten_is_unchanged_and_named(desk, monkeypatch):
    desk.folder.metrics.write_text('{"step": 1, "loss": 2.0}\n{"step": 9, "loss": 1.0}\n')
    before = desk.folder.metrics.read_text()

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, "fsync", refuse)
    with pytest.raises(
        UserError, match=r"--output-dir .*my-run cannot be written .No space left.*disk of --output"
    ):
        desk.open(start_step=1)
    assert desk.folder.metrics.read_text() == before
    assert [path.name for path in desk.folder.path.iterdir()] == ["metrics.jsonl"]


def test_a_resumed_tensorboard_sorts_last_also_when_the_clock_was_set_back(desk, monkeypatch):
    for loss, start_step, now in ((1.0, 0, 2e9), (2.0, 10, 1e9)):
        monkeypatch.setattr("minimind.tracking.backends.time.time", lambda now=now: now)
        trackers = desk.open("tensorboard", start_step=start_step)
        trackers.log({"loss": loss}, 20)
        trackers.close()
    assert scalars(desk.folder.path / "tensorboard", "train/loss") == [(20, 2.0)]


def test_only_the_main_process_writes(desk, package):
    desk.process = types.SimpleNamespace(is_main_process=False)
    trackers = desk.open(package.__name__, state={package.__name__: "id"})
    trackers.log({"loss": 1.0}, 1)
    trackers.close()
    assert package.runs == []
    assert not desk.folder.metrics.exists()
    assert trackers.state() == {package.__name__: "id"}


def test_text_goes_to_the_file_alone(desk, package):
    trackers = desk.open(package.__name__)
    trackers.log({"loss": 1.5, "digest": "a1b2"}, 10)
    trackers.close()
    assert desk.lines()[0]["digest"] == "a1b2"
    assert package.runs[0].logged == [(10, {"train/loss": 1.5})]
    assert desk.warnings == []


def test_integers_beyond_64_bits_are_not_read():
    line = '{"step": 1, "tokens": 123456789012345678, "loss": 1234567890123456789}'
    assert parse_line(line) == {"step": 1, "tokens": 123456789012345678, "loss": None}


def test_a_line_of_text_has_a_kind_of_its_own(desk):
    trackers = desk.open()
    trackers.log_text("sample", "once\nupon", 10)
    trackers.close()
    (line,) = desk.lines()
    assert (line["kind"], line["step"], line["sample"]) == ("text", 10, "once\nupon")


def test_text_is_readable_in_any_script_and_stays_on_its_line(desk):
    text = "从前\u2028有\u0085一座山\udc80"
    trackers = desk.open()
    trackers.log_text("sample", text, 10)
    trackers.close()
    written = desk.folder.metrics.read_text(encoding="utf-8")
    assert "从前" in written
    (line,) = written.splitlines()
    assert json.loads(line)["sample"] == text


def test_flushed_means_on_the_disk_while_a_tracker_hangs(desk, package, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(FakeRun, "log", lambda self, values, step: release.wait(30))
    synced = []
    monkeypatch.setattr("os.fsync", lambda number: synced.append(desk.lines()))
    trackers = desk.open(package.__name__)
    for step in range(1, 51):
        trackers.log({"loss": 1.0}, step)
    trackers.flush()
    assert [line["step"] for line in synced[-1]] == list(range(1, 51))
    release.set()
    trackers.close()
    trackers.flush()


def test_values_are_those_of_the_moment_of_logging(desk):
    trackers = desk.open()
    values = {"loss": 1.0}
    trackers.log(values, 1)
    values["loss"] = 2.0
    trackers.close()
    assert desk.lines()[0]["loss"] == 1.0


def test_a_logged_text_is_shown_by_tensorboard(desk):
    trackers = desk.open("tensorboard")
    trackers.log_text("sample", "once upon", 10)
    trackers.close()
    events = EventAccumulator(str(desk.folder.path / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("sample/text_summary")
    assert event.step == 10
    assert b"once upon" in event.tensor_proto.string_val[0]


@pytest.mark.parametrize("damage", [lambda path: os.mkfifo(path), lambda path: path.write_bytes(b"\xff,1")])
def test_a_csv_that_cannot_be_read_does_not_block_a_run(desk, damage):
    desk.folder.path.mkdir(exist_ok=True)
    damage(desk.folder.path / "metrics.csv")
    trackers = desk.open("csv", start_step=20)
    trackers.log({"loss": 2.0}, 30)
    trackers.close()
