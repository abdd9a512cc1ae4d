"""Data sets of the Hugging Face Hub, `hf://owner/name`, streamed through the package datasets."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, needs_package
from ..io.atomic import write_text
from ..io.reading import read_json
from .readers import Reading, TextFile

PREFIX = "hf://"
_SPELLING = re.compile(
    r"hf://(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+?))?(/(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?"
)
# Rows between two calls of `tick`.
_ROWS = 256


@dataclass(frozen=True)
class HubDataset:
    """A split of a data set at one commit.

    Attributes:
        name: `owner/name`.
        config: the configuration (subset), None for the default one.
        split: such as `train`.
        commit: of the repository; part of the key of the token cache.
        num_shards: data files of the split.
    """

    name: str
    config: str | None
    split: str
    commit: str
    num_shards: int

    def folder(self, cache_dir: Path, text_key: str) -> Path:
        """Return the folder of downloaded shards, which exists until they are tokenized."""
        digest = hashlib.sha256(json.dumps([asdict(self), text_key]).encode()).hexdigest()
        return cache_dir / f"hub-{digest[:32]}"


@dataclass(frozen=True)
class HubShard:
    """One shard of a data set; stands for a file in the list of sources."""

    dataset: HubDataset
    index: int

    def __str__(self) -> str:
        place = f"{self.dataset.name}@{self.dataset.commit[:8]}"
        config = f"/{self.dataset.config}" if self.dataset.config else ""
        return f"{PREFIX}{place}{config}:{self.dataset.split} {self.index + 1}/{self.dataset.num_shards}"

    def file(self, cache_dir: Path, text_key: str) -> Path:
        """Return where the downloaded shard is until it is tokenized."""
        return self.dataset.folder(cache_dir, text_key) / f"{self.index:05d}.jsonl"

    @property
    def identity(self) -> dict[str, Any]:
        """What identifies the content of the shard."""
        return {"hub": asdict(self.dataset), "shard": self.index}


@dataclass(frozen=True)
class HubReader:
    """Downloads a shard and reads its documents; an interrupted build downloads only missing shards again.

    Attributes:
        shard: the shard.
        file: reads the downloaded shard, whose path is `HubShard.file`.
        tick: called every few rows of a download; may raise to stop it.
    """

    shard: HubShard
    file: TextFile
    tick: Callable[[], object]

    def documents(self, reading: Reading) -> Iterator[str]:
        """Yield the documents; see `readers.TextFile.documents`."""
        if not self.file.path.is_file():
            self.file.path.parent.mkdir(parents=True, exist_ok=True)
            self._download(self.file.path, self.file.text_key)
        yield from self.file.documents(reading)

    def _download(self, file: Path, key: str) -> None:
        draft = file.with_suffix(f".part-{os.getpid()}")
        try:
            with draft.open("wb") as output:
                for number, row in enumerate(self._rows(key)):
                    if number % _ROWS == 0:
                        self.tick()
                    if key not in row:
                        raise DataError(
                            f"{self.file.option} {self.shard} has no column '{key}'; set --text-key to one "
                            f"of {', '.join(row)}."
                        )
                    # A value that is no text becomes null, which the reader reports with its line.
                    line = json.dumps({key: row[key]}, ensure_ascii=False, default=lambda _: None)
                    output.write(line.encode(errors="backslashreplace") + b"\n")
            draft.replace(file)
        finally:
            draft.unlink(missing_ok=True)

    def _rows(self, key: str) -> Iterator[dict[str, Any]]:
        dataset = self.shard.dataset
        try:
            rows = _datasets(self.file.option).load_dataset(
                dataset.name, dataset.config, split=dataset.split, revision=dataset.commit, streaming=True
            )
            rows = rows.shard(num_shards=dataset.num_shards, index=self.shard.index)
            if key in (rows.column_names or ()):
                rows = rows.select_columns([key])
            yield from rows
        except _network_errors() as error:
            raise DataError(
                f"{self.file.option} {self.shard} could not be read ({_reason(error)}); check the network "
                "and run the same command again: complete shards are kept."
            ) from error


def is_hub(pattern: str) -> bool:
    """Return whether a value of --data names a data set of the Hub."""
    return pattern.startswith(PREFIX)


def hub_shards(pattern: str, option: str, cache_dir: Path) -> list[HubShard]:
    """Return the shards of `hf://owner/name[@revision][/config][:split]`, by default of the split `train`.

    Without a network, the commit that the last use of the same name found counts.

    Raises:
        DataError: for a name that cannot be parsed or found, and where the package datasets is missing.
    """
    match = _SPELLING.fullmatch(pattern)
    if match is None:
        raise DataError(
            f"{option} {pattern} is not the name of a data set; write hf://owner/name, "
            "hf://owner/name:split or hf://owner/name/config:split."
        )
    known = cache_dir / f"hub-{hashlib.sha256(pattern.encode()).hexdigest()[:32]}.json"
    try:
        dataset = _find(match, option)
        cache_dir.mkdir(parents=True, exist_ok=True)
        write_text(known, json.dumps(asdict(dataset)))
    except ConnectionError as error:
        try:
            dataset = HubDataset(**read_json(known))
        except (OSError, ValueError, TypeError):
            raise DataError(
                f"{option} {pattern} cannot be found ({_reason(error)}); check the name and the network, or "
                "download the data set and pass its files."
            ) from error
        warnings.warn(
            f"{option} {pattern}: the Hub cannot be reached, so the commit {dataset.commit[:8]} of the last "
            "use counts.",
            stacklevel=2,
        )
    return [HubShard(dataset, index) for index in range(dataset.num_shards)]


def _find(match: re.Match[str], option: str) -> HubDataset:
    """Return the data set as it is on the Hub now; ConnectionError when it is not reached."""
    datasets = _datasets(option)
    from huggingface_hub import HfApi

    name, config, split = match["name"], match["config"], match["split"] or "train"
    try:
        commit = HfApi().dataset_info(name, revision=match["revision"]).sha
        rows = datasets.load_dataset(name, config, split=split, revision=commit, streaming=True)
    except ValueError as error:  # names the configurations or splits that exist
        raise DataError(f"{option} {match[0]} cannot be used: {_reason(error)}") from error
    except _network_errors() as error:
        raise ConnectionError(_reason(error)) from error
    return HubDataset(name, config, split, str(commit), int(rows.num_shards))


def _network_errors() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import HfHubHTTPError

    # Each HTTP client raises different exceptions; those of httpx derive from Exception only.
    found = []
    for client, name in (
        ("httpx", "HTTPError"),
        ("requests", "RequestException"),
        ("aiohttp", "ClientError"),
    ):
        with suppress(ImportError):
            found.append(getattr(importlib.import_module(client), name))
    return (OSError, HfHubHTTPError, *found)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


def _datasets(option: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(needs_package(f"{option} hf://...", "datasets")) from error
    return datasets
