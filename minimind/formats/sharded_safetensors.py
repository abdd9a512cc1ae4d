"""Read and plan the safetensors of a Hugging Face folder: one file, or shards with an index."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ConfigError
from ..io.checksums import check_files
from ..io.reading import read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARDS = "model-?????-of-?????.safetensors"


def plan_files(sizes: Mapping[str, int], max_bytes: int | None) -> dict[str, list[str]]:
    """Return the names of the tensors of each file, in order.

    Args:
        sizes: bytes of each tensor by name.
        max_bytes: size limit of one file, except for a single larger tensor. None plans one file.
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if max_bytes is not None and groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": names
        for number, names in enumerate(groups, start=1)
    }


def index_of(files: Mapping[str, list[str]], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return the index of the files of `plan_files`."""
    weight_map = {name: file for file, names in files.items() for name in names}
    return {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}


def remove_other_weights(folder: Path, files: Collection[str]) -> None:
    """Remove the weight files and the index of an earlier save, which readers would take for `files`."""
    found = [*folder.glob(_SHARDS), folder / WEIGHTS]
    if len(files) == 1:
        found.append(folder / INDEX)
    for path in found:
        if path.name not in files:
            path.unlink(missing_ok=True)


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a model folder.

    Raises:
        ConfigError: when a file is missing.
    """
    if (folder / WEIGHTS).is_file():  # preferred to an index, as in transformers
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ConfigError(
            f"{folder} has no {WEIGHTS} and no {INDEX}; save the weights as safetensors "
            "(save_pretrained(folder) in transformers)."
        )
    names = sorted(set(_read_index(folder / INDEX).values()))
    for file in names:
        # An index must not refer outside the folder.
        if Path(file).name != file or not (folder / file).is_file():
            raise ConfigError(f"{folder} has no {file}, which {INDEX} names; copy all files of the model.")
    return [folder / file for file in names]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a model folder by name, on the CPU, in their stored precision.

    Raises:
        ConfigError: when a file is missing or damaged, or does not match the index or `checksums.json`.
    """
    files = weight_files(folder)
    check_files(folder, [INDEX, *(file.name for file in files)])
    weights = {name: tensor for file in files for name, tensor in _read_file(file).items()}
    if files == [folder / WEIGHTS]:
        return weights
    weight_map = _read_index(folder / INDEX)
    if differing := sorted(weights.keys() ^ weight_map.keys()):
        raise ConfigError(
            f"{folder}: {INDEX} and its files disagree on {differing[0]}; copy the model again."
        )
    return weights


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = read_json(path)["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read as an index of weights; copy the model again.") from error
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ConfigError(f"{path}: weight_map does not give each tensor a file; copy the model again.")
    return weight_map


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():  # a FIFO would block
        raise ConfigError(f"{path} is not a regular file; copy or save it again.")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); it is damaged, copy or save it again."
        ) from error
