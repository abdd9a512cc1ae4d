"""What TensorBoard, WandB and SwanLab, the packages themselves, write of a run that was stopped and resumed.

Their files are read back and held against metrics.jsonl. Nothing may reach for the network, and no key, token
or password may stand in any file.
"""

from __future__ import annotations

import html
import importlib.util
import json
import math
import os
import re
import socket
import sqlite3
import struct
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minimind.tracking.backends import grouped_name
from support.tiny_runs import write_corpus

pytestmark = pytest.mark.slow

# The key of WandB must have 40 characters.
KEY = "ca9a51ca9a52ca9a53ca9a54ca9a55ca9a56ca9a"
SAMPLE = "step {step}:\n  <b>zwölf</b> & 你好\n"
STOP, STEPS = 7, 20

# A program of a user, with a key among its arguments: two parts of one run, and a text at each evaluation.
CHILD = f"""
import importlib, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from support.tiny_runs import tiny
module = importlib.import_module("minimind.training.pretrain")
from minimind.tracking.trackers import Trackers

class Talking(Trackers):
    def log(self, values, step):
        super().log(values, step)
        if "val_loss" in values:
            self.log_text("sample", {SAMPLE!r}.format(step=step), step)

importlib.import_module("minimind.training.outputs").Trackers = Talking
config = dict(tracker=tuple(sys.argv[2].split(",")), project="letters")
first = module.pretrain(tiny(Path("corpus.jsonl"), Path("my-run"), **config), stop_after={STOP})
assert first.stopped
module.pretrain(tiny(Path("corpus.jsonl"), Path("my-run"), **config, resume="auto"))
"""

Curves = dict[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class Finished:
    """A run that was stopped, resumed and finished: its folder, and all that was printed."""

    folder: Path
    said: str

    def grouped(self) -> Curves:
        """Return the numbers of metrics.jsonl under the names that trackers show."""
        return {grouped_name(name): points for name, points in self.curves().items()}

    def curves(self) -> Curves:
        """Return the numbers of metrics.jsonl, NaN for null."""
        found: Curves = defaultdict(list)
        for line in (self.folder / "metrics.jsonl").read_text().splitlines():
            values = json.loads(line)
            for name in values.keys() - {"step", "time", "kind", "digest", "sample"}:
                value = values[name]
                found[name].append((values["step"], math.nan if value is None else value))
        assert len(found["loss"]) > 5
        assert len(found["val_loss"]) > 3
        return found

    def environment(self) -> dict[str, Any]:
        return json.loads((self.folder / "environment.json").read_text())


def train(folder: Path, trackers: str, **variables: str) -> Finished:
    """Run the program in a folder with a git remote that holds a token, and a proxy that nobody may use."""
    write_corpus(folder / "corpus.jsonl")
    remote = f"https://{KEY}:{KEY}@example.com/letters.git"
    subprocess.run(["git", "init", "-q", folder], check=True)
    subprocess.run(["git", "-C", folder, "remote", "add", "origin", remote], check=True)
    (folder / "child.py").write_text(CHILD)
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        environment = {
            **{name: value for name, value in os.environ.items() if "proxy" not in name.lower()},
            **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), address),
            **dict.fromkeys(("WANDB_API_KEY", "SWANLAB_API_KEY", "HF_TOKEN"), KEY),
            **dict.fromkeys(("WANDB_MODE", "SWANLAB_MODE"), "offline"),
            **{"HOME": str(folder), "OMP_NUM_THREADS": "1"},
            **variables,
        }
        args = [sys.executable, "child.py", str(Path(__file__).parents[1]), trackers, "--api-key", KEY]
        done = subprocess.run(args, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):
            proxy.accept()
    return Finished(folder / "my-run", done.stdout + done.stderr)


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    trackers = [name for name in ("tensorboard", "wandb", "swanlab") if installed(name)]
    return train(tmp_path_factory.mktemp("tracked"), ",".join(trackers))


def assert_same(ours: Curves, theirs: Curves, tolerance: float = 0.0) -> None:
    """The same values at the same steps in the same order, none twice and none missing."""
    assert ours.keys() == theirs.keys()
    for name, points in ours.items():
        assert [step for step, _ in theirs[name]] == [step for step, _ in points], name
        expected = [value for _, value in points]
        assert [value for _, value in theirs[name]] == pytest.approx(
            expected, rel=tolerance, abs=0, nan_ok=True
        ), name


def test_every_number_stands_in_the_docs(finished: Finished) -> None:
    page = (Path(__file__).parents[2] / "docs" / "tracking.md").read_text(encoding="utf-8")
    keys = [key for row in re.findall(r"^\| (`.*?) \|", page, re.M) for key in re.findall(r"`(\w+)`", row)]
    assert [
        name
        for name in finished.curves()
        if name not in keys and not (name.startswith("total_") and "total_elapsed" in keys)
    ] == []


# TensorBoard


@pytest.fixture(scope="module")
def events(finished: Finished) -> EventAccumulator:
    accumulator = EventAccumulator(str(finished.folder / "tensorboard"), size_guidance={"tensors": 0})
    accumulator.Reload()
    return accumulator


def test_tensorboard_has_every_number_once(finished: Finished, events: EventAccumulator) -> None:
    found = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    assert_same(finished.grouped(), found, tolerance=1e-6)  # it keeps float32


def test_tensorboard_shows_hyper_parameters_environment_and_samples(
    finished: Finished, events: EventAccumulator
) -> None:
    from tensorboard.plugins.hparams import plugin_data_pb2

    metadata = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = plugin_data_pb2.HParamsPluginData.FromString(metadata).session_start_info.hparams
    assert values["learning_rate"].number_value == 1e-2
    assert values["optimizer"].string_value == "normuon"

    def texts(name: str) -> list[tuple[int, str]]:
        found = events.Tensors(f"{name}/text_summary")
        return [(event.step, event.tensor_proto.string_val[0].decode()) for event in found]

    # Once for each part of the run.
    assert [step for step, _ in texts("configuration")] == [0, STOP]
    assert "    learning_rate = 0.01\n" in texts("configuration")[1][1]
    described = json.loads(texts("environment")[1][1])
    assert described == finished.environment()
    samples = texts("sample")
    assert [step for step, _ in samples] == [step for step, _ in finished.curves()["val_loss"]]
    assert samples[-1][1] == f"    step {STEPS}:\n      <b>zwölf</b> & 你好"


# WandB


@dataclass(frozen=True)
class WandBRun:
    """What the offline files of WandB hold, joined in the order in which they were begun."""

    ids: list[str]
    history: list[tuple[int, dict[str, Any]]]
    config: dict[str, Any]


@pytest.fixture(scope="module")
def wandb_run(finished: Finished) -> WandBRun:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    run = WandBRun([], [], {})
    for file in sorted((finished.folder / "wandb").glob("offline-run-*/*.wandb")):
        for data in leveldb_records(file.read_bytes()[7:], 7):
            record = Record.FromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run.ids.append(record.run.run_id)
            if kind in ("run", "config"):
                updates = (record.run.config if kind == "run" else record.config).update
                run.config.update({item.key: json.loads(item.value_json) for item in updates})
            if kind == "history":
                items = {
                    ".".join(item.nested_key) or item.key: json.loads(item.value_json)
                    for item in record.history.item
                }
                run.history.append((record.history.step.num, items))
    return run


def leveldb_records(data: bytes, start: int) -> Iterator[bytes]:
    """Yield the records of a log in the format of LevelDB: parts of 32 KiB, each piece with a header of 7."""
    position, pieces = start, b""
    data = bytes(start) + data
    while position < len(data):
        room = 32768 - position % 32768
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        pieces += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield pieces
            pieces = b""


def test_wandb_has_every_number_once(finished: Finished, wandb_run: WandBRun) -> None:
    found: Curves = defaultdict(list)
    for step, items in wandb_run.history:
        for name, value in items.items():
            if not name.startswith(("_", "sample")):
                found[name].append((step, float(value)))
    assert_same(finished.grouped(), found)


def test_wandb_goes_on_in_the_same_run(wandb_run: WandBRun) -> None:
    assert len(wandb_run.ids) == 2
    assert len(set(wandb_run.ids)) == 1
    steps = [step for step, _ in wandb_run.history]
    assert steps == sorted(set(steps))


def test_wandb_shows_hyper_parameters_environment_and_samples(
    finished: Finished, wandb_run: WandBRun
) -> None:
    assert wandb_run.config["learning_rate"] == 1e-2
    assert wandb_run.config["environment"] == finished.environment()
    files = sorted((finished.folder / "wandb").glob("offline-run-*/files/media/html/sample_*.html"))
    texts = {int(file.name.split("_")[1]): file.read_text(encoding="utf-8") for file in files}
    assert sorted(texts) == [step for step, _ in finished.curves()["val_loss"]]
    assert texts[STEPS] == f"<pre>{html.escape(SAMPLE.format(step=STEPS))}</pre>"


# SwanLab


@dataclass(frozen=True)
class SwanLabRun:
    """What the files of SwanLab hold, joined in the order in which they were begun."""

    ids: list[str]
    curves: Curves
    texts: dict[int, str]
    config: dict[str, Any]


@pytest.fixture(scope="module")
def swanlab_run(finished: Finished) -> SwanLabRun:
    pytest.importorskip("swanlab")
    return read_swanlab(finished)


def read_swanlab(finished: Finished) -> SwanLabRun:
    import yaml
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    run = SwanLabRun([], defaultdict(list), {}, {})
    for file in sorted((finished.folder / "swanlab").glob("run-*/*.swanlab")):
        reader = DataStoreReader()
        reader.open(file)
        for data in reader:
            record = Record.FromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "start":
                run.ids.append(record.start.id)
            elif kind == "scalar":
                run.curves[record.scalar.key].append((record.scalar.step, record.scalar.value.number))
            elif kind == "media":
                (item,) = record.media.value.items
                run.texts[record.media.step] = (file.parent / "media/text" / item.filename).read_text("utf-8")
        reader.close()
        config = yaml.safe_load((file.parent / "files/config.yaml").read_text("utf-8"))
        run.config.update({name: entry["value"] for name, entry in config.items()})
    return run


def test_swanlab_has_every_number_once(finished: Finished, swanlab_run: SwanLabRun) -> None:
    assert_same(finished.grouped(), swanlab_run.curves)


def test_swanlab_goes_on_in_the_same_run(swanlab_run: SwanLabRun) -> None:
    assert len(swanlab_run.ids) == 2
    assert len(set(swanlab_run.ids)) == 1


def test_swanlab_shows_hyper_parameters_environment_and_samples(
    finished: Finished, swanlab_run: SwanLabRun
) -> None:
    assert swanlab_run.config["learning_rate"] == 1e-2
    assert swanlab_run.config["environment"] == finished.environment()
    assert "allow_val_change" not in swanlab_run.config
    assert sorted(swanlab_run.texts) == [step for step, _ in finished.curves()["val_loss"]]
    assert swanlab_run.texts[STEPS] == SAMPLE.format(step=STEPS)


def test_the_dashboard_of_swanlab_has_every_number(tmp_path: Path) -> None:
    pytest.importorskip("swanboard", reason="comes with swanlab[dashboard]")
    finished = train(tmp_path, "swanlab", SWANLAB_MODE="local")
    assert_same(finished.grouped(), read_swanlab(finished).curves)
    with sqlite3.connect(finished.folder / "swanlab" / "runs.swanlab") as database:
        rows = database.execute(
            "select run_id, tag.name, folder from tag join experiment on experiment.id = experiment_id "
            "where type = 'line' order by experiment.id"
        ).fetchall()
    shown: Curves = defaultdict(list)
    for run, name, folder in rows:
        for file in sorted((finished.folder / "swanlab" / run / "logs" / folder).glob("*.log")):
            for line in map(json.loads, file.read_text().splitlines()):
                shown[name].append((line["index"], line["data"]))
    assert_same(finished.grouped(), shown)


# All of them


def test_no_key_stands_in_any_file_or_on_the_screen(finished: Finished) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("swanlab")
    files = [path for path in finished.folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    assert KEY not in finished.said
    assert "--api-key" in finished.environment()["command"]
    tomllib.loads((finished.folder / "config.toml").read_text())
