"""Compiled runs that take seconds on a CPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from minimind.training import build_model


def compile_blocks_without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile block by block, as on a GPU, without Inductor: Dynamo alone decides what is compiled."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(build_model, "compile_mode", lambda *_, **__: "blocks")
