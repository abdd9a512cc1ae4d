"""What --data names: paths, each with the share of the training tokens it is to give, if one is asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from .readers import find_files


@dataclass(frozen=True)
class Entry:
    """One --data.

    Attributes:
        pattern: the file, folder or glob, without its weight.
        weight: its share of the training tokens, of 1 over all entries; None where none has a weight.
        files: what the pattern stands for.
    """

    pattern: str
    weight: float | None
    files: tuple[Path, ...]


def read_entries(values: Sequence[str], option: str = "--data") -> list[Entry]:
    """Return what the values of --data name; `corpus.jsonl:0.7` is a path and a weight.

    Without weights a file that several entries name belongs to the first of them.

    Raises:
        DataError: for a path that leads nowhere, weights that are not above 0 or that some entries lack, and
            for a file that two entries with weights name.
    """
    read = [split_weight(value, option) for value in values]
    weighted = [value for value, (_, weight) in zip(values, read, strict=True) if weight is not None]
    if weighted and len(weighted) < len(values):
        plain = next(value for value, (_, weight) in zip(values, read, strict=True) if weight is None)
        raise DataError(
            f"{option} {weighted[0]} has a weight and {option} {plain} has none; give every {option} one, "
            f"as in {plain}:0.5, or none of them."
        )
    total = math.fsum(weight for _, weight in read if weight is not None)
    owners: dict[Path, str] = {}
    entries = []
    for value, (pattern, weight) in zip(values, read, strict=True):
        files = [path for path in find_files([pattern], option) if weighted or path not in owners]
        if weighted and (twice := next((path for path in files if path in owners), None)) is not None:
            raise DataError(
                f"{option} {owners[twice]} and {option} {value} both name {twice}; with weights a file can "
                "belong to only one of them."
            )
        owners.update(dict.fromkeys(files, value))
        entries.append(Entry(pattern, None if weight is None else weight / total, tuple(files)))
    return entries


def split_weight(value: str, option: str = "--data") -> tuple[str, float | None]:
    """Return the path and the weight of `PATH:WEIGHT`; a path that exists as it is written has no weight.

    Raises:
        DataError: for a weight that is not a number above 0 and below 1e100.
    """
    pattern, colon, tail = value.rpartition(":")
    if not colon or not pattern or "/" in tail or "\\" in tail or Path(value).expanduser().exists():
        return value, None
    try:
        weight = float(tail)
    except ValueError:
        if Path(pattern).expanduser().exists():
            raise DataError(
                f"{option} {value}: '{tail}' is not a weight; write a number, as in {pattern}:0.5."
            ) from None
        return value, None
    # Of larger ones the sum might be none; not a number is neither above nor below.
    if not 0 < weight < 1e100:
        raise DataError(
            f"{option} {value}: a weight must be a number above 0 and below 1e100; leave {pattern} out if it "
            "shall not be trained on."
        )
    return pattern, weight
