"""The fused kernels against float64, and where they are supported."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from minimind.modeling.documents import documents
from minimind.modeling.kernels import dispatch as fused
from support import decoding_cases, fused_cases

# bf16 rounds by up to 1/256; an error of this size has been made by rounding alone.
ROUNDING = 0.01
# Both kinds run everything: sum and norm, norm, swiglu, and three or four numbers of each other case.
FEWEST = 20


@pytest.mark.slow
def test_interpreted_kernels_agree_with_float64() -> None:
    if find_spec("triton") is None or not version("triton").startswith("3.6."):
        pytest.skip("needs triton 3.6: pip install '.[interpreter]'")
    program = Path(fused_cases.__file__)
    done = subprocess.run(
        [sys.executable, program, "--interpret"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert len(errors) > FEWEST
    assert {name: error for name, error in errors.items() if not error < ROUNDING} == {}
    # float32 throughout
    exact = {name: error for name, error in errors.items() if name.startswith(("attention", "decoding"))}
    assert {name: error for name, error in exact.items() if not error < 1e-5} == {}
    decoding = len(decoding_cases.CASES) + len(decoding_cases.SAMPLINGS)
    assert sum(name.startswith("decoding") for name in exact) == decoding


def test_documents_are_runs_of_equal_ids() -> None:
    ids = torch.tensor([[0, 0, 0, 1, 2, 2], [5, 5, 5, 5, 5, 5]], dtype=torch.int32)
    found = documents(ids, 2, 6, torch.device("cpu"))
    assert found.starts.tolist() == [[0, 0, 0, 3, 4, 4], [0] * 6]
    assert found.ends.tolist() == [[3, 3, 3, 4, 6, 6], [6] * 6]
    whole = documents(None, 2, 6, torch.device("cpu"))
    assert (whole.starts == 0).all()
    assert (whole.ends == 6).all()


def test_a_cpu_uses_plain_pytorch() -> None:
    x, weight = torch.randn(2, 4), torch.randn(4, 4)
    assert not fused.supported(x, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused.compute_dtype(x, weight) == torch.bfloat16
        assert not fused.supported(x, weight)


@pytest.mark.parametrize(
    ("built", "precision", "head_dim", "dropout", "reason"),
    [
        (True, "bf16", 96, 0.0, None),
        (False, "bf16", 96, 0.0, "the package triton is missing"),
        (True, "fp16", 96, 0.0, "they need bf16"),
        (True, "bf16", 256, 0.0, "they need heads of 16 to 128"),
        (True, "bf16", 96, 0.1, "they have no dropout"),
    ],
)
def test_the_reason_for_unfused_attention_is_given(
    monkeypatch: pytest.MonkeyPatch,
    built: bool,
    precision: str,
    head_dim: int,
    dropout: float,
    reason: str | None,
) -> None:
    monkeypatch.setattr(fused, "_BUILDABLE", built)
    assert fused.unsupported_reason(precision, head_dim, dropout) == reason


def test_boundaries_of_documents_are_int32_as_kernels_read_them() -> None:
    for document_ids in (None, torch.tensor([[0, 0, 1, 1, 1]])):
        starts, ends = documents(document_ids, 1, 5, torch.device("cpu"))
        assert (starts.dtype, ends.dtype) == (torch.int32, torch.int32)
