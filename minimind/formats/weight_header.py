"""Read names, shapes and precisions of the tensors in weight files, without reading the tensors."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..errors import ConfigError
from ..modeling.config import MiniMindConfig

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT = re.compile(r"model\.layers\.0\.mlp\.experts\.(\d+)\.")


@dataclass(frozen=True)
class WeightHeader:
    """Tensors by name.

    Attributes:
        shapes: shape of each tensor.
        dtypes: the precisions that occur, as the file names them.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: tuple[str, ...]


def read_headers(paths: Sequence[Path]) -> WeightHeader:
    """Return the tensors of the safetensors files of one model, or of one `.pth`.

    Raises:
        ConfigError: for a file that is neither, or is damaged.
    """
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in paths:
        found |= (_pth if path.suffix in (".pth", ".pt") else _safetensors)(path)
    shapes = {name: shape for name, (_, shape) in found.items()}
    return WeightHeader(shapes, tuple(sorted({dtype for dtype, _ in found.values()})))


def check_layers(config: MiniMindConfig, names: Collection[str], source: Path | str) -> None:
    """Compare the numbers of layers and experts with the tensors, before a model of that size is built.

    Args:
        names: of the tensors, as in files.
        source: path of the weights, for errors.

    Raises:
        ConfigError: when the numbers differ.
    """
    stored = {"num_hidden_layers": {match[1] for name in names if (match := _LAYER.match(name))}}
    experts = {match[1] for name in names if (match := _EXPERT.match(name))}
    # A checkpoint stacks the experts, and its shapes are checked with the weights.
    if config.use_moe and experts:
        stored["num_experts"] = experts
    for name, numbers in stored.items():
        if (expected := getattr(config, name)) != len(numbers):
            raise ConfigError(
                f"{source} has {len(numbers)} {'layers' if 'layers' in name else 'experts'}, but {name} is "
                f"{expected}. Use the config.json that belongs to these weights."
            )


def _safetensors(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    if not path.is_file():  # a FIFO would block
        raise ConfigError(f"{path} is not a regular file; copy or save it again.")
    try:
        with safe_open(path, framework="numpy") as file:  # needs no torch for dtypes and shapes
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{path} cannot be read as safetensors ({error}); copy or save it again."
        ) from error


def _pth(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    import torch

    try:
        values = torch.load(path, map_location="meta", weights_only=True)
        return {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in values.items()}
    except Exception as error:  # bytes that are no pickle can fail in the unpickler in any way
        raise ConfigError(f"{path} cannot be read as a state dict: {load_failure(error)}.") from error


def load_failure(error: Exception) -> str:
    """Return why torch could not read a file."""
    text = str(error)
    if "weights_only" in text or "Weights only" in text:
        # torch's message advises weights_only=False, which runs code.
        found = re.search(r"GLOBAL (\S+)", text)
        if found is None:
            return "torch.save did not write it, or it is damaged"
        return f"it contains {found[1]}, which is not a tensor"
    return text.splitlines()[0].rstrip(".") if text else f"{type(error).__name__}, it is empty or cut off"
