"""Which tensors a file of weights holds, without reading any of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..io.reading import open_regular, parse_json

# A header of this size would hold a million tensors.
_LARGEST_HEADER = 100 << 20


@dataclass(frozen=True)
class WeightHeader:
    """Tensors by name.

    Attributes:
        shapes: of each tensor.
        dtypes: the precisions that occur, as the file names them.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: tuple[str, ...]


def read_headers(paths: list[Path]) -> WeightHeader:
    """Return the tensors of safetensors files that belong together, or of one `.pth`.

    Raises:
        ConfigError: for a file that is neither, or is damaged.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: set[str] = set()
    for path in paths:
        read = _pth if path.suffix in (".pth", ".pt") else _safetensors
        for name, (dtype, shape) in read(path).items():
            shapes[name] = shape
            dtypes.add(dtype)
    return WeightHeader(shapes, tuple(sorted(dtypes)))


def _safetensors(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    try:
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(_LARGEST_HEADER, path.stat().st_size):
                raise ValueError("its header is longer than the file")
            header: dict[str, Any] = parse_json(file.read(length))
        return {
            name: (values["dtype"], tuple(values["shape"]))
            for name, values in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} cannot be read as safetensors ({error}); copy or save it again."
        ) from error


def _pth(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    import torch

    try:
        values = torch.load(path, map_location="meta", weights_only=True)
        return {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in values.items()}
    except Exception as error:  # bytes that are no pickle can fail in the unpickler in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{path} cannot be read as a state dict: {reason}.") from error
