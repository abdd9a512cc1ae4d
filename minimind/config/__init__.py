"""The configuration of a run: options, presets, and how they are read and written."""

from __future__ import annotations

from .options import PretrainConfig
from .presets import PRESETS, preset_config

__all__ = ["PRESETS", "PretrainConfig", "preset_config"]
