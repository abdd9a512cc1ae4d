"""Read names, shapes and precisions of the tensors in weight files, without reading the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..errors import ConfigError


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


def _safetensors(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
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
        from .original_minimind import load_error_reason

        reason = load_error_reason(error)
        raise ConfigError(f"{path} cannot be read as a state dict: {reason}.") from error
