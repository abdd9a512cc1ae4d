"""Weight formats of other packages, by the entry points `minimind.formats`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config.entry_points import load_plugin, plugin_names
from ..modeling.config import MiniMindConfig
from ..tokenizer import Tokenizer

GROUP = "minimind.formats"


class WeightFormat(Protocol):
    """Writes models in another format, and may read them. The entry point names a class without arguments.

    Weights have their Hugging Face parameter names; a tied matrix is there once.
    """

    def save(
        self,
        weights: Mapping[str, Tensor],
        config: MiniMindConfig,
        tokenizer: Tokenizer | None,
        folder: Path,
        dtype: torch.dtype,
    ) -> None:
        """Write a model into an empty folder, its matrices in `dtype`; the tokenizer's files are added."""

    def load(self, folder: Path) -> Mapping[str, Tensor]:
        """Return the weights of a folder that `save` wrote; the export compares them with the source."""

    def recognizes(self, path: Path) -> bool:
        """Return whether a file or folder is of this format; optional, for reading."""

    def open(self, path: Path) -> Any:
        """Return the `open_model.ModelSource` of a path that `recognizes` accepts; optional, for reading."""


def load_format(name: str) -> Any:
    """Return the format that an installed package has registered.

    Raises:
        ConfigError: when there is none of this name, or it cannot be loaded.
    """
    return load_plugin(GROUP, name, "--format")()


def open_by_plugin(path: Path) -> Any:
    """Return the `ModelSource` at a path if the format of another package recognizes it, else None."""
    for name in plugin_names(GROUP):
        found = load_format(name)
        if hasattr(found, "recognizes") and found.recognizes(path):
            return found.open(path)
    return None
