"""minimind: pretraining of small language models.

The public names load on first use, so that `import minimind` costs nothing and needs no torch.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import PretrainConfig
    from .errors import CheckpointError, ConfigError, DataError, UserError
    from .model_config import MiniMindConfig
    from .modeling.transformer import MiniMindForCausalLM
    from .presets import PRESETS, preset_config
    from .pretrain import pretrain
    from .tokenizer import Tokenizer, load_tokenizer, train_tokenizer

_PUBLIC = {
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "MiniMindConfig": "model_config",
    "MiniMindForCausalLM": "modeling.transformer",
    "PRESETS": "presets",
    "PretrainConfig": "config",
    "Tokenizer": "tokenizer",
    "UserError": "errors",
    "load_tokenizer": "tokenizer",
    "preset_config": "presets",
    "pretrain": "pretrain",
    "train_tokenizer": "tokenizer",
}

__all__ = [
    "PRESETS",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "MiniMindConfig",
    "MiniMindForCausalLM",
    "PretrainConfig",
    "Tokenizer",
    "UserError",
    "__version__",
    "load_tokenizer",
    "preset_config",
    "pretrain",
    "train_tokenizer",
]

try:
    __version__ = version("minimind-train")  # the distribution; `minimind` is somebody else's
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'minimind' has no attribute '{name}'")
    value = getattr(importlib.import_module("." + _PUBLIC[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps `minimind.pretrain` the function, which importing the module of that name would replace."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _PUBLIC.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
