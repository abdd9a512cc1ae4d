"""`minimind-train export`: its arguments, output and errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

Command = Callable[..., Any]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Put a recorder in place of the export."""
    import minimind.formats.export
    from minimind.modeling.config import MiniMindConfig

    made: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def export_model(*arguments: Any, **options: Any) -> SimpleNamespace:
        made.append((arguments, options))
        weights = {"huggingface": "model.safetensors", "minimind": "pretrain_512.pth", "gguf": "m.gguf"}
        return SimpleNamespace(
            source="checkpoint of step 8 (out)",
            folder=Path(arguments[1]),
            format=arguments[2],
            dtype="float16",
            config=MiniMindConfig(num_key_value_heads=4, intermediate_size=1664),
            files={weights[arguments[2]]: 52_000_000, "tokenizer.json": 329_000},
            notes=("something to know.",),
        )

    monkeypatch.setattr(minimind.formats.export, "export_model", export_model)
    return made


def test_options_reach_the_library_with_their_synonyms(run: Command, calls: list[Any]) -> None:
    done = run(
        "export out --format hf --output new --dtype bf16 --max_shard_size 2GiB --tokenizer t --overwrite"
    )
    assert (done.code, done.err) == (0, "")
    arguments, options = calls[0]
    assert arguments == ("out", "new", "huggingface")
    assert options == {
        "dtype": "bfloat16",
        "model_config": None,
        "tokenizer": "t",
        "max_shard_bytes": 2 << 30,
        "overwrite": True,
    }


def test_what_was_written_is_said_in_a_few_lines(run: Command, calls: list[Any]) -> None:
    done = run("export out --output new")
    call = "pipeline('text-generation', 'new')('Once upon a time')"
    assert done.out.splitlines() == [
        "read     checkpoint of step 8 (out)",
        "wrote    new: huggingface, float16, 30.0M parameters, 52.3 MB",
        "         model.safetensors (52.0 MB)",
        "         tokenizer.json (329 kB)",
        "verified re-read and compared with the source, all tensors equal",
        "note     something to know.",
        f'next     python -c "from transformers import pipeline; print({call})"',
        "next     vllm serve new",
    ]


@pytest.mark.parametrize(
    ("format", "command"),
    [
        (
            "pth",
            "cp new/pretrain_512.pth minimind/out/ && cp new/tokenizer*.json minimind/model/ && "
            "cd minimind && python eval_llm.py --weight pretrain --hidden_size 512 --num_hidden_layers 8",
        ),
        ("gguf", "llama-completion -m new/m.gguf -p 'Once upon a time'"),
    ],
)
def test_the_next_command_suits_the_format(run: Command, calls: list[Any], format: str, command: str) -> None:
    assert f"next     {command}" in run(f"export out --output new --format {format}").out


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ("export out", "--output is missing; give a new folder for the model."),
        (
            "export out --output x --format onnx",
            "--format onnx is not known; choose huggingface, minimind or gguf.",
        ),
        (
            "export out --output x --max-shard-size big",
            "--max-shard-size big is not a size; write for example 5GB",
        ),
        ("export out --output x --dtpye f16", "unknown option --dtpye; did you mean '--dtype'?"),
        ("export out --output x", "out does not exist; name a run folder"),
    ],
)
def test_user_errors_are_one_line_each(run: Command, args: str, sentence: str) -> None:
    done = run(args)
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith(f"error: {sentence}")
    assert len(done.err.splitlines()) == 1


def test_help_names_the_formats_and_the_choices(run: Command) -> None:
    done = run("export --help")
    assert done.code == 0
    dtypes = "auto|float32|float16|bfloat16|q8_0"
    for text in ("SOURCE", "huggingface|minimind|gguf", dtypes, "[default: 5GB]"):
        assert text in done.out


def test_an_export_is_pushed_once_it_is_verified(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded: list[list[str]] = []

    class Repository:
        def __init__(self, name: str) -> None:
            assert not (tmp_path / "out").exists(), "before the export"

        def upload(self, folder: Path) -> str:
            uploaded.append(sorted(path.name for path in folder.iterdir()))
            return "https://hub/ann/tiny"

    from minimind.formats.huggingface import save_model
    from minimind.modeling.config import MiniMindConfig
    from minimind.modeling.transformer import MiniMindForCausalLM

    monkeypatch.setattr("minimind.formats.hub.HubRepository", Repository)
    model = MiniMindForCausalLM(MiniMindConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1))
    save_model(model, tmp_path / "model")
    args = ("export", str(tmp_path / "model"), "--output", str(tmp_path / "out"))
    done = run(*args, "--push-to-hub", "tiny")
    assert done.code == 0, done.err
    assert done.out.endswith("uploaded https://hub/ann/tiny; fill in the license in its README.md\n")
    assert {"README.md", "config.json", "model.safetensors"} <= set(uploaded[0])
