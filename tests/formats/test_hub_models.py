"""Models of the Hub: a cache on the disk and a stand-in for the download; no test reaches a network."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minimind.errors import ConfigError
from minimind.formats.hub import is_model_name, model_snapshot, pinned_name
from minimind.formats.open_model import open_model
from minimind.training.setup import resolve_run
from support.foreign_models import continuing, save_shape

huggingface_hub = pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    model_snapshot.cache_clear()
    yield
    model_snapshot.cache_clear()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of huggingface_hub with one model, `ann/tiny`, and no network."""
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    save_shape("llama", folder / "models--ann--tiny" / "snapshots" / COMMIT)
    (folder / "models--ann--tiny" / "refs").mkdir()
    (folder / "models--ann--tiny" / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize("name", ["hf://ann/tiny", "ann/tiny", f"hf://ann/tiny@{COMMIT}", "ann/tiny@main"])
def test_a_cached_model_is_opened_without_a_network(cache: Path, name: str) -> None:
    source = open_model(name)
    assert source.path.name == COMMIT
    assert source.config.num_hidden_layers == 2
    assert source.tokenizer() is not None
    assert pinned_name(name) == f"hf://ann/tiny@{COMMIT}"


def test_a_run_records_the_commit(cache: Path, tmp_path: Path) -> None:
    inputs = resolve_run(continuing("ann/tiny", output_dir="run"))
    assert inputs.config.from_weight == f"hf://ann/tiny@{COMMIT}"
    assert inputs.config.hidden_size == 32


@pytest.mark.parametrize("name", ["hf://ann/other", "ann/other"])
def test_a_model_that_is_not_there_is_one_sentence(cache: Path, name: str) -> None:
    with pytest.raises(
        ConfigError, match="Hub cannot be reached, and the model was not downloaded"
    ) as raised:
        open_model(name)
    assert str(raised.value).startswith(f"{name}: ")
    assert "\n" not in str(raised.value)


def test_a_path_that_does_not_exist_stays_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").mkdir()
    for text in ("runs/mine", "runs/typo", "./ann/tiny", "/ann/tiny", "tiny", "a/b/c", "ann/tiny.pth", "~/x"):
        assert not is_model_name(text), text
        assert pinned_name(text) == text
    with pytest.raises(ConfigError, match=r"^runs/typo does not exist; name a run folder"):
        open_model("runs/typo")
    with pytest.raises(ConfigError, match="is not the name of a model; write hf://owner/name"):
        open_model("hf://tiny")


class Download:
    """Stands for `snapshot_download`: copies the files that the patterns name."""

    def __init__(self, source: Path, cache: Path) -> None:
        self.source, self.cache, self.calls = source, cache, 0

    def __call__(self, name: str, **options: Any) -> str:
        self.calls += 1
        self.options = options
        target = self.cache / COMMIT
        for pattern in options["allow_patterns"]:
            for file in self.source.glob(pattern):
                target.mkdir(exist_ok=True, parents=True)
                shutil.copy(file, target)
        return str(target)


@pytest.fixture
def download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Download:
    found = Download(save_shape("gpt2", tmp_path / "repository"), tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
    monkeypatch.chdir(tmp_path)
    return found


def test_a_model_is_downloaded_once(download: Download) -> None:
    assert open_model("ann/tiny").config.num_hidden_layers == 2
    open_model("ann/tiny")
    assert download.calls == 1
    assert download.options["ignore_patterns"] == ["*/*"]
    assert download.options["local_files_only"] is False


def test_weights_in_pickles_are_downloaded_only_where_there_are_no_others(download: Download) -> None:
    import torch
    from safetensors.torch import load_file

    file = download.source / "model.safetensors"
    torch.save(load_file(file), download.source / "pytorch_model.bin")
    open_model("ann/tiny")
    assert not list(download.cache.glob("*/*.bin"))
    file.unlink()
    shutil.rmtree(download.cache)
    weights = open_model("ann/without").weights()
    assert weights["transformer.wte.weight"].shape[1] == 32
    for left in (*download.source.glob("*.bin"), *download.cache.glob("*/*.bin")):
        left.unlink()
    with pytest.raises(ConfigError, match="ann/empty has no weights"):
        open_model("ann/empty")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("GatedRepoError", r"gated; accept its conditions on https://huggingface\.co/ann/tiny"),
        ("RepositoryNotFoundError", "no such folder here and no such model on the Hub"),
        ("RevisionNotFoundError", "no such revision"),
        ("Timeout", r"could not be downloaded \(too late\)"),
    ],
)
def test_why_a_download_fails_is_said(
    download: Download, monkeypatch: pytest.MonkeyPatch, error: str, words: str
) -> None:
    def fail(*_: Any, **__: Any) -> Callable[..., str]:
        raise type(error, (Exception,), {})("too late")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ConfigError, match=words):
        open_model("ann/tiny")
