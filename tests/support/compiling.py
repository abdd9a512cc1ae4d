"""Compiled runs that take seconds on a CPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from minimind.training import build_model


def compile_blocks_without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile block by block, as on a GPU, without Inductor: Dynamo alone decides what is compiled.

    What other tests of the process have compiled does not count towards Dynamo's recompile limit.
    """
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(build_model, "compile_mode", lambda *_, **__: "blocks")
