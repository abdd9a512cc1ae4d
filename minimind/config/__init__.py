"""Configuration of a run: options, presets, and their TOML and command-line formats."""

from __future__ import annotations

from .options import PretrainConfig
from .presets import PRESETS, preset_config

__all__ = ["PRESETS", "PretrainConfig", "preset_config"]
