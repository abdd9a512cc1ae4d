"""`--mixed-precision fp8`: what is refused, what a run sets, records and leaves as in bf16."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind import ConfigError, MiniMindForCausalLM, PretrainConfig
from minimind.data.shards import random_shards
from minimind.distributed import accelerator as launch
from minimind.distributed.accelerator import close_accelerator, start_accelerator
from minimind.modeling import float8
from minimind.modeling.feed_forward import SwiGLU
from minimind.modeling.kernels import dispatch as fused
from minimind.modeling.transformers_config import TransformersConfig
from minimind.planning import budget
from minimind.tokenizer import load_tokenizer
from minimind.training.auto_batch_size import _cache_key
from minimind.training.build_model import _float8_problems, resolve_model_config
from minimind.training.setup import build_training, resolve_run
from support.tiny_runs import pretrain_as_command, tiny, write_corpus

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 1, "max_seq_len": 32, "batch_size": 2}


@pytest.fixture(autouse=True)
def gpu_that_multiplies_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the checks find one; Accelerate and the model stay on the CPU, where products are bf16."""
    monkeypatch.setattr(launch, "device_type", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(float8, "available", lambda: True)
    monkeypatch.setattr(fused, "_BUILDABLE", True)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"hidden_size": 72, "head_dim": 32}, "multiples of 16, and --hidden-size is 72; change it, or use"),
        ({"intermediate_size": 100}, "--intermediate-size is 100"),
        ({"head_dim": 20}, "--num-attention-heads x --head-dim is 40"),
        ({"head_dim": 24, "num_attention_heads": 4}, "--num-key-value-heads x --head-dim is 24"),
        ({"use_moe": True}, "not implemented for experts; use bf16, or omit --use-moe"),
        ({"dropout": 0.1}, "needs the fused attention kernels, and they have no dropout"),
    ],
)
def test_a_model_that_cannot_be_trained_in_fp8_is_refused(options: dict[str, Any], problem: str) -> None:
    config, tokenizer = PretrainConfig(**SMALL | options), load_tokenizer()
    resolve_model_config(config, tokenizer)
    with pytest.raises(ConfigError, match=problem):
        resolve_model_config(dataclasses.replace(config, mixed_precision="fp8"), tokenizer)


def test_fsdp2_and_models_of_transformers_are_refused_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    config = PretrainConfig(**SMALL, mixed_precision="fp8")
    resolve_model_config(config, load_tokenizer())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="fp8 is not supported with FSDP2"):
        resolve_model_config(config, load_tokenizer())
    other = TransformersConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, values={"architectures": ["GPT2LMHeadModel"]}
    )
    (problem,) = _float8_problems(other)
    assert "not for a GPT2LMHeadModel of transformers" in problem


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_the_products_of_blocks_are_switched_before_compiling_which_is_recommended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    compiled: list[bool] = []

    def compile_for_training(model: MiniMindForCausalLM, mode: str) -> None:
        compiled.extend(module.float8 for module in model.modules() if isinstance(module, SwiGLU))

    monkeypatch.setattr(MiniMindForCausalLM, "compile_for_training", compile_for_training)
    config = PretrainConfig(**SMALL, mixed_precision=precision)
    notes: list[str] = []
    accelerator = start_accelerator(config)
    try:
        assert accelerator.mixed_precision == "bf16"
        assert launch.shown_precision(config, accelerator) == precision
        inputs = resolve_run(config)
        key = _cache_key(config, inputs.model_config, accelerator, 2)
        assert key["precision"] == precision  # of the sizes that --batch-size auto measured
        shards = random_shards(tmp_path / "tokens", inputs.model_config.vocab_size)
        for compiles in (True, False):
            chosen = dataclasses.replace(inputs, config=dataclasses.replace(inputs.config, compile=compiles))
            parts = build_training(chosen, shards, accelerator, note=notes.append)
            switches = [module.float8 for module in parts.model.modules() if hasattr(module, "float8")]
            assert switches == 2 * [precision == "fp8"]
            assert len(notes) == (precision == "fp8" and not compiles)
    finally:
        close_accelerator(accelerator)
    assert compiled == [precision == "fp8"]
    assert all(note.startswith("--no-compile makes FP8 slow") for note in notes)


def test_only_the_record_of_a_run_says_that_it_was_fp8(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a CPU there are no kernels, so that both runs compute the same."""
    corpus, weights = write_corpus(tmp_path / "corpus.jsonl"), []
    for precision in ("bf16", "fp8"):
        changes = {**SMALL, "dropout": 0.0, "mixed_precision": precision, "max_steps": 2, "epochs": None}
        result = pretrain_as_command(tiny(corpus, tmp_path / precision, **changes))
        assert f"CPU x 1, {precision}, not compiled" in capsys.readouterr().out
        folder = result.model_dir
        weights.append([(folder / name).read_bytes() for name in ("model.safetensors", "config.json")])
        record = json.loads((tmp_path / precision / "environment.json").read_text())
        assert record["launch"]["precision"] == precision
    assert weights[0] == weights[1]


def test_a_budget_measures_without_compiling_in_bf16_and_then_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: set[tuple[str, bool | None]] = set()
    measure_machine, measure_candidate = budget.measure_machine, budget.measure_candidate

    def on_gpu(*arguments: Any) -> Any:
        return dataclasses.replace(measure_machine(*arguments), device="cuda", fused=True)

    def build(inputs: Any, *arguments: Any) -> None:
        measured.add((inputs.config.mixed_precision, inputs.config.compile))
        raise torch.OutOfMemoryError

    def measure(*arguments: Any) -> float:
        assert measure_candidate(*arguments) is None
        return 0.1

    monkeypatch.setattr(budget, "matmul_flops", lambda device, precision: 1e12)
    monkeypatch.setattr(budget, "measure_machine", on_gpu)
    monkeypatch.setattr(budget, "build_training", build)
    monkeypatch.setattr(budget, "measure_candidate", measure)
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    for precision, compiles in (("bf16", False), ("fp8", True)):
        config = PretrainConfig(
            **SMALL,
            budget="60s",
            data=(str(corpus),),
            cache_dir=str(tmp_path / "cache"),
            mixed_precision=precision,
        )
        plan = budget.plan_budget(config, quiet=True)
        assert (plan.config.mixed_precision, plan.config.compile) == (precision, compiles)
    assert measured == {("bf16", False)}
