"""minimind: pretraining of small language models.

The public names load on first use, so that `import minimind` costs nothing and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .config.options import PretrainConfig
    from .config.presets import PRESETS, preset_config
    from .errors import CheckpointError, ConfigError, DataError, UserError
    from .modeling.config import MiniMindConfig
    from .modeling.transformer import MiniMindForCausalLM
    from .planning.budget import pretrain
    from .tokenizer import Tokenizer, load_tokenizer, train_tokenizer
    from .tracking.plugins import Tracker
    from .training.callbacks import Callback

_NAMES = {
    "config": ("PRESETS", "PretrainConfig", "preset_config"),
    "errors": ("CheckpointError", "ConfigError", "DataError", "UserError"),
    "modeling.config": ("MiniMindConfig",),
    "modeling.transformer": ("MiniMindForCausalLM",),
    "planning.budget": ("pretrain",),
    "tokenizer": ("Tokenizer", "load_tokenizer", "train_tokenizer"),
    "tracking.plugins": ("Tracker",),
    "training.callbacks": ("Callback",),
}
_PUBLIC = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "PRESETS",
    "Callback",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "MiniMindConfig",
    "MiniMindForCausalLM",
    "PretrainConfig",
    "Tokenizer",
    "Tracker",
    "UserError",
    "__version__",
    "load_tokenizer",
    "preset_config",
    "pretrain",
    "train_tokenizer",
]


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'minimind' has no attribute '{name}'")
    value = getattr(importlib.import_module("." + _PUBLIC[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
