"""Parse the values of --data: paths with optional weights."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from .files import find_files
from .hub import HubShard, hub_shards, is_hub


@dataclass(frozen=True)
class DataSource:
    """One value of --data.

    Attributes:
        pattern: the file, folder or glob, without the weight.
        weight: its share of the training tokens; the shares sum to 1. None without weights.
        files: the files of the pattern, or the shards of a data set of the Hub.
    """

    pattern: str
    weight: float | None
    files: tuple[Path | HubShard, ...]

    @property
    def paths(self) -> list[Path]:
        """The files, without data sets of the Hub."""
        return [file for file in self.files if isinstance(file, Path)]


def read_sources(
    values: Sequence[str],
    skipped: Counter[str] | None = None,
    text_key: str = "text",
    cache_dir: Path | None = None,
) -> list[DataSource]:
    """Return the sources of --data; `corpus.jsonl:0.7` is a path and a weight.

    Without weights, a file that several sources name belongs to the first of them. See `find_files` for
    `skipped` and `text_key`, and `find_sources` for `cache_dir`.

    Raises:
        DataError: for a path that does not exist, an invalid or missing weight, and a file that two sources
            with weights name.
    """
    read = [split_weight(value) for value in values]
    weighted = [value for value, (_, weight) in zip(values, read, strict=True) if weight is not None]
    if weighted and len(weighted) < len(values):
        plain = next(value for value, (_, weight) in zip(values, read, strict=True) if weight is None)
        raise DataError(
            f"--data {weighted[0]} has a weight and --data {plain} has none; give every --data one, as in "
            f"{plain}:0.5, or none of them."
        )
    total = math.fsum(weight for _, weight in read if weight is not None)
    owners: dict[Path | HubShard, str] = {}
    sources = []
    for value, (pattern, weight) in zip(values, read, strict=True):
        named = find_sources([pattern], "--data", skipped, text_key, cache_dir)
        found = {path.resolve() if isinstance(path, Path) else path: path for path in named}
        files = [path for real, path in found.items() if weighted or real not in owners]
        if weighted and (twice := next((real for real in found if real in owners), None)) is not None:
            raise DataError(
                f"--data {owners[twice]} and --data {value} both name {twice}; with weights a file can "
                "belong to only one of them."
            )
        owners.update(dict.fromkeys(found, value))
        sources.append(DataSource(pattern, None if weight is None else weight / total, tuple(files)))
    return sources


def find_sources(
    patterns: Sequence[str],
    option: str,
    skipped: Counter[str] | None = None,
    text_key: str = "text",
    cache_dir: Path | None = None,
) -> list[Path | HubShard]:
    """Return the files of `find_files`, and the shards of data sets of the Hub.

    Args:
        patterns: see `find_files`, as for the other arguments; or `hf://owner/name`, see `hub_shards`.
        cache_dir: the token cache, needed for data sets of the Hub.

    Raises:
        DataError: see both; and for a data set of the Hub without `cache_dir`.
    """
    found: list[Path | HubShard] = []
    files = [pattern for pattern in patterns if not is_hub(pattern)]
    if files:
        found += find_files(files, option, skipped, text_key)
    for pattern in filter(is_hub, patterns):
        if cache_dir is None:
            raise DataError(
                f"{option} {pattern} cannot be read by this command or by --budget; pass downloaded files."
            )
        found += hub_shards(pattern, option, cache_dir)
    return found


def split_weight(value: str) -> tuple[str, float | None]:
    """Return the path and the weight of `PATH:WEIGHT`; a path that exists as written has no weight.

    Raises:
        DataError: for a weight that is not a number above 0 and below 1e100.
    """
    pattern, colon, tail = value.rpartition(":")
    if not colon or not pattern or "/" in tail or "\\" in tail or _exists(value):
        return value, None
    try:
        weight = float(tail)
    except ValueError:
        if _exists(pattern):
            raise DataError(
                f"--data {value}: '{tail}' is not a weight; write a number, as in {pattern}:0.5."
            ) from None
        return value, None
    # The sum of larger weights may overflow; NaN fails both comparisons.
    if not 0 < weight < 1e100:
        raise DataError(
            f"--data {value}: a weight must be a number above 0 and below 1e100; remove {pattern} if you "
            "do not want to train on it."
        )
    return pattern, weight


def _exists(path: str) -> bool:
    # Unlike Path.exists, False where permission is missing.
    return os.path.exists(os.path.expanduser(path))
