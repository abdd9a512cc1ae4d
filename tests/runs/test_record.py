"""Run folders read back, and what `info` says of runs, checkpoints, model folders and files of weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minimind.checkpoint.files import folder_bytes
from minimind.errors import ConfigError, UserError
from minimind.formats.weight_header import read_headers
from minimind.modeling.config import MiniMindConfig
from minimind.modeling.parameter_count import count_parts
from minimind.modeling.transformer import MiniMindForCausalLM
from minimind.runs.compare import compare_runs
from minimind.runs.compare_html import comparison_html
from minimind.runs.info import Info, read_info
from minimind.runs.info_text import device_text
from minimind.runs.record import read_run
from minimind.runs.reproduce import reproduce
from minimind.training.pretrain import pretrain
from support import tiny_runs
from support.made_runs import ENVIRONMENT, make_run


def test_a_curve_counts_time_on_over_a_resume(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a", [5.0, 4.0, 3.5, 3.0], resumed_at=20))
    curve = run.curve("loss")
    assert [point.step for point in curve] == [10, 20, 30, 40]
    assert [point.tokens for point in curve] == [10_000, 20_000, 30_000, 40_000]
    assert [point.seconds for point in curve] == [20.0, 40.0, 60.0, 80.0]


def test_an_evaluation_lies_between_the_reports_around_it(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a", bits={0: 3.0, 10: 2.0}))
    lines = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[:-1]
    lines.append(json.dumps({"step": 25, "val_bits_per_byte": 1.0, "val_loss": 2.0}))
    (tmp_path / "a" / "metrics.jsonl").write_text("\n".join(lines))
    run = read_run(tmp_path / "a")
    assert [(p.tokens, p.seconds) for p in run.curve("val_bits_per_byte")] == [
        (0.0, 0.0),
        (10_000.0, 20.0),
        (25_000.0, 50.0),
    ]
    assert run.best() is not None
    assert run.best()["step"] == 25  # type: ignore[index]


def test_what_is_not_finite_or_cut_short_is_skipped(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a", [4.0, None, 2.0]))
    assert [point.value for point in run.curve("loss")] == [4.0, 2.0]
    assert (run.steps, run.tokens, run.last("loss")) == (30, 30_000, 2.0)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "9" * 400, '"x"', "[1]"])
def test_numbers_that_are_none_are_skipped(tmp_path: Path, number: str) -> None:
    make_run(tmp_path / "a")
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write("\n")
        for name in ("loss", "tokens", "elapsed", "val_loss", "step"):
            values = {"step": "40", "loss": "2.0", "tokens": "40000", "elapsed": "80.0", name: number}
            file.write("{" + ", ".join(f'"{key}": {value}' for key, value in values.items()) + "}\n")
    info, compared = read_info(tmp_path / "a"), compare_runs([tmp_path / "a"])
    assert (info.values["steps"], info.values["loss"], info.values["tokens"]) == (40, 2.0, 40_000)
    comparison_html(compared)


@pytest.mark.parametrize("value", [None, 1, "x", [], [1], {}])
def test_an_environment_of_another_form_is_as_good_as_missing(tmp_path: Path, value: object) -> None:
    launch = {**ENVIRONMENT["launch"], **dict.fromkeys(("machines", "kind", "precision", "variables"), value)}
    for number, facts in enumerate(
        [dict.fromkeys(("packages", "launch", "working_folder", "git", "gpus"), value), {"launch": launch}]
    ):
        folder = make_run(tmp_path / str(number))
        (folder / "environment.json").write_text(json.dumps({**ENVIRONMENT, **facts}))
        read_info(folder)
        compare_runs([folder, folder])
        reproduce(read_run(folder))


def test_a_run_of_another_version_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('hidden_size = 96\nnew_thing = 3\nlr_schedule = "spiral"\n')
    run = read_run(tmp_path)
    assert run.config.hidden_size == 96
    assert run.unread == ("lr_schedule", "new_thing")
    assert (run.steps, run.tokens, run.finished, run.best(), run.curve("loss")) == (0, None, False, None, [])
    assert run.fingerprint("tokenizer") is None
    info = read_info(tmp_path)
    assert info.values["parameters"] == {}
    assert row(info, "model") == "8 layers, hidden size 96, 8 heads, 2 key/value heads"
    # Options that contradict each other by now.
    (tmp_path / "config.toml").write_text("hidden_size = 97\n")
    assert read_run(tmp_path).config.hidden_size == 97


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"device": "cpu", "gpus": ["NVIDIA L4"]}, "CPU"),
        ({"device": "cpu:0", "gpus": []}, "CPU"),
        ({"device": "cuda:1", "gpus": ["NVIDIA L4", "NVIDIA L4"]}, "NVIDIA L4"),
        ({"device": "mps"}, "MPS"),
        ({}, "not recorded"),
    ],
)
def test_a_device_is_named_by_its_kind(environment: dict[str, object], text: str) -> None:
    assert device_text(environment) == text


def test_a_folder_without_a_run_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="contains no run"):
        read_run(tmp_path)
    with pytest.raises(ConfigError, match="is no run, checkpoint, model folder"):
        read_info(tmp_path)
    (tmp_path / "config.toml").write_text("{{")
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/config\.toml is not valid TOML"):
        read_run(tmp_path)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained."""
    folder = tmp_path_factory.mktemp("info")
    corpus = tiny_runs.write_corpus(folder / "corpus.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        pretrain(tiny_runs.tiny(corpus, folder / "out", max_steps=8))
    return folder / "out"


def row(info: Info, key: str) -> str:
    return dict(info.rows)[key]


def test_a_run_tells_what_it_was(out: Path) -> None:
    info = read_info(out)
    run = read_run(out)
    values = json.loads(json.dumps(info.values))
    assert (values["kind"], values["finished"], values["steps"]) == ("run", True, 8)
    assert values["tokens"] == tiny_runs.last_checkpoint(out).trainer["tokens"]
    parts = values["parameters"]
    assert parts["all"] == sum(count for part, count in parts.items() if part != "all")
    assert parts["embedding"] == 6400 * 32
    assert values["best"]["val_loss"] == pytest.approx(run.best()["val_loss"])  # type: ignore[index]
    settings = tiny_runs.last_checkpoint(out).trainer["settings"]
    assert values["fingerprints"]["training text"] == settings["data_fingerprint"]
    assert values["fingerprints"]["tokenizer"] == settings["tokenizer_fingerprint"]
    assert values["checkpoints"] == [checkpoint.step for checkpoint in run.checkpoints]
    assert values["bytes"]["all"] > values["bytes"]["checkpoints"] > values["bytes"]["model"] > 0
    assert values["launch"]["processes"] == 1
    assert "8 steps" in row(info, "trained")
    assert "torch" in row(info, "versions")
    names = [name for name, _ in info.next]
    assert names == ["pretrain", "generate", "export", "reproduce"]


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"epochs": 2}, "--epochs"),
        ({"epochs": 2, "max_steps": 30}, "--max-steps"),
        ({"epochs": 2, "max_steps": 41}, "--epochs"),
        ({"epochs": 2, "max_tokens": 30_000}, "--max-tokens"),
    ],
)
def test_a_finished_run_names_the_limit_to_raise(tmp_path: Path, options: dict[str, int], flag: str) -> None:
    run = make_run(tmp_path / "a", [4.0, 3.0, 2.0] if flag != "--epochs" else [4.0, 3.0, 2.5, 2.0], **options)
    (run / "model").mkdir()
    (run / "model" / "model.safetensors").touch()
    (run / "checkpoints" / "step-00000030").mkdir(parents=True)
    assert dict(read_info(run).next)["pretrain"].endswith(f" {flag} N")


def test_fingerprints_of_an_older_run_come_from_its_checkpoint(out: Path, tmp_path: Path) -> None:
    run = read_run(out)
    known = run.fingerprint("training text")
    object.__setattr__(run, "environment", {})
    assert run.fingerprint("training text") == known is not None


def test_a_checkpoint_tells_its_step_and_how_to_go_on(out: Path) -> None:
    checkpoint = tiny_runs.last_checkpoint(out)
    info = read_info(checkpoint.path)
    assert (info.kind, info.values["steps"]) == ("checkpoint", 8)
    assert info.values["parameters"] == read_info(out).values["parameters"]
    assert info.values["dtypes"] == ["F32"]
    command = dict(info.next)["pretrain"]
    assert f"--resume {checkpoint.path}" in command
    assert f"--output-dir {out}" in command


def test_what_a_run_removes_meanwhile_is_no_error(tmp_path: Path) -> None:
    """A checkpoint may be rotated away between the listing of its files and their sizes."""
    (tmp_path / "kept").write_bytes(b"12345")
    done = threading.Event()

    def rotate() -> None:
        while not done.is_set():
            (tmp_path / "step-1" / "inner").mkdir(parents=True)
            for number in range(20):
                (tmp_path / "step-1" / f"file-{number}").touch()
            shutil.rmtree(tmp_path / "step-1")

    thread = threading.Thread(target=rotate)
    thread.start()
    try:
        assert {folder_bytes(tmp_path) for _ in range(2000)} == {5}
    finally:
        done.set()
        thread.join()


def test_a_missing_path_is_distinguished_from_an_unreadable_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere does not exist; name a run"):
        read_info(tmp_path / "nowhere")


def test_a_damaged_checkpoint_is_not_called_intact(out: Path, tmp_path: Path) -> None:
    copy = tmp_path / tiny_runs.last_checkpoint(out).path.name
    shutil.copytree(tiny_runs.last_checkpoint(out).path, copy)
    assert "intact" in row(read_info(copy), "checkpoint")
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        read_info(copy)
    (copy / "trainer.json").unlink()
    with pytest.raises(UserError, match=r"trainer\.json is missing|model\.safetensors is damaged"):
        read_info(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        read_info(copy)


def test_a_model_folder_and_its_weights_tell_the_same(out: Path, tmp_path: Path) -> None:
    folder = read_info(out / "model")
    weights = read_info(out / "model" / "model.safetensors")
    assert (folder.kind, weights.kind) == ("model", "weights")
    assert folder.values["parameters"] == weights.values["parameters"]
    assert folder.values["shape"]["hidden_size"] == 32
    assert folder.values["dtypes"] == ["F16"]
    assert dict(folder.next)["pretrain"].startswith("minimind-train pretrain --from-weight")
    # Other commands do not take the file alone, which has no shape.
    assert weights.next == [line for line in folder.next if line[0] != "pretrain"]
    alone = shutil.copy(out / "model" / "model.safetensors", tmp_path)
    assert read_info(Path(alone)).next == []
    checkpoint = tiny_runs.last_checkpoint(out).path
    assert f"generate {checkpoint}" in dict(read_info(checkpoint / "model.safetensors").next)["generate"]


def test_a_pth_is_counted_without_running_anything_in_it(tmp_path: Path) -> None:
    shape = MiniMindConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    state = MiniMindForCausalLM(shape).state_dict()
    del state["lm_head.weight"]
    torch.save(state, tmp_path / "pretrain_32.pth")
    info = read_info(tmp_path / "pretrain_32.pth")
    assert info.values["parameters"]["all"] == shape.num_parameters()
    torch.save({"weights": {1, 2}, "f": print}, tmp_path / "odd.pth")
    with pytest.raises(ConfigError, match="cannot be read as a state dict"):
        read_info(tmp_path / "odd.pth")


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x02\0\0\0\0\0\0\0[]", b"\x10\0\0\0\0\0\0\0{}"])
def test_a_damaged_header_is_reported_in_a_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read as safetensors"):
        read_headers([path])


def test_a_pth_of_more_than_weights_is_refused_without_advice_to_run_its_code(
    tmp_path: Path,
) -> None:
    path = tmp_path / "w.pth"
    torch.save({"a": path}, path)
    with pytest.raises(ConfigError, match=r"it contains pathlib\.\w+, which is not a tensor\.$") as caught:
        read_headers([path])
    assert "weights_only" not in str(caught.value)


def test_the_header_is_what_the_library_reads(out: Path) -> None:
    path = out / "model" / "model.safetensors"
    tensors = load_file(path)
    assert read_headers([path]).shapes == {name: tuple(t.shape) for name, t in tensors.items()}
    assert count_parts(read_headers([path]).shapes)["head"] == 0


def test_reading_a_run_needs_no_torch(out: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from minimind.runs.info import read_info; "
        "from minimind.runs.compare import compare_runs; "
        "from minimind.runs.compare_html import comparison_html; "
        "path = Path(sys.argv[1]); read_info(path); comparison_html(compare_runs([path])); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(out)], check=True)


@pytest.mark.parametrize("totals", [False, True])
def test_the_training_time_of_a_resumed_run_is_the_sum_of_its_parts(tmp_path: Path, totals: bool) -> None:
    """Three parts of 3, 5 and 9 s; each later part reports first after more seconds than the part before."""
    run = make_run(tmp_path / "run", [], {})
    start, lines = datetime(2026, 1, 2, tzinfo=UTC), []
    for part, (begin, clocks, total) in enumerate(((0, (1, 2), 3), (100, (2.5, 4), 5), (200, (6, 8), 9))):
        for number, elapsed in enumerate(clocks):
            step = 2 * part + number + 1
            time = (start + timedelta(seconds=begin + elapsed + 0.01)).isoformat(timespec="milliseconds")
            values = {"loss": 1.0, "tokens": step * 10, "elapsed": elapsed}
            lines.append({"step": step, "time": time, "kind": "train", **values})
        if totals:
            lines.append({"step": 2 * part + 2, "time": time, "kind": "train", "total_elapsed": total})
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    expected = 3 + 5 + 9 if totals else 2 + 4 + 8
    assert read_run(run).seconds == expected
    assert read_info(run).values["training_seconds"] == expected
    (row,) = (row for row in compare_runs([run]).outcome if row.name == "training time")
    assert row.values == (f"{expected}s",)
    # What the page draws.
    seconds = [point.seconds for point in read_run(run).curve("loss")]
    assert seconds == ([1, 2, 5.5, 7, 14, 16] if totals else [1, 2, 4.5, 6, 12, 14])


def test_a_pause_of_the_process_is_not_another_part(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [], {})
    lines = [
        {"step": 1, "time": "2026-01-02T00:01:40+00:00", "loss": 1.0, "tokens": 1, "elapsed": 100.0},
        {"step": 2, "time": "2026-01-02T00:03:10+00:00", "loss": 1.0, "tokens": 2, "elapsed": 130.0},
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert read_run(run).seconds == 130


def test_a_point_between_reports_is_interpolated_between_the_nearest_two(tmp_path: Path) -> None:
    file = make_run(tmp_path / "a", [4.0, 3.0, 2.5]) / "metrics.jsonl"
    lines = [{"step": step, "loss": 2.0, "tokens": step, "elapsed": step**2} for step in (10, 20, 30)]
    lines.append({"step": 25, "val_bits_per_byte": 1.0, "val_loss": 2.0})
    file.write_text("\n".join(map(json.dumps, lines)))
    (point,) = read_run(tmp_path / "a").curve("val_bits_per_byte")
    assert (point.tokens, point.seconds) == (25, (400 + 900) / 2)
