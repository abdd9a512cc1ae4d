"""`--from-weight` with a model that transformers computes: trained, resumed, saved, and read by commands."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind.checkpoint.files import latest_checkpoint
from minimind.config.options import ModelConfig, PretrainConfig
from minimind.config.schema import schema_of
from minimind.errors import ConfigError
from minimind.evaluation.corpus import evaluate_text
from minimind.formats.export import export_model
from minimind.formats.open_model import load_with_tokenizer, open_model
from minimind.planning.budget import pretrain as pretrain_within_budget
from minimind.planning.plan import plan_run
from minimind.runs.decay import decay
from minimind.runs.info import read_info
from minimind.runs.record import read_run
from minimind.runs.reproduce import reproduce
from minimind.training.pretrain import pretrain
from support import tiny_runs
from support.foreign_models import save_shape

transformers = pytest.importorskip("transformers")

NO_SIZES = {name: None for name, field in schema_of(ModelConfig).items() if field.default is None}


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


def options(corpus: Path, out: Path, folder: Path, **changes: Any) -> PretrainConfig:
    """Return the options of a short run that continues the model in a folder, with dropout."""
    changes = {"max_steps": 8, "save_interval": 4, "lr_schedule": "constant", **changes}
    return tiny_runs.tiny(corpus, out, **{**NO_SIZES, "from_weight": str(folder), **changes})


@pytest.fixture(scope="module")
def continued(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with GPT-2 weights, `gpt2`, and a finished run that continues them, `run`."""
    folder = tmp_path_factory.mktemp("continued")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        pretrain(options(corpus, folder / "run", save_shape("gpt2", folder / "gpt2")))
    return folder


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_a_resumed_run_takes_the_same_steps_without_the_original_folder(
    corpus: Path, continued: Path, tmp_path: Path, shape: str
) -> None:
    folder = save_shape(shape, tmp_path / "original")
    straight = continued / "run" if shape == "gpt2" else tmp_path / "straight"
    config = options(corpus, straight, folder)
    if shape != "gpt2":
        pretrain(config)
    resumed = dataclasses.replace(config, output_dir=str(tmp_path / "resumed"))
    pretrain(resumed, stop_after=4)
    folder.rename(tmp_path / "moved")
    result = pretrain(dataclasses.replace(resumed, resume="auto"))
    tiny_runs.assert_same_end(tmp_path / "resumed", straight)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (result.model_dir / name).read_bytes() == (straight / "model" / name).read_bytes()


def test_a_run_killed_before_its_first_checkpoint_starts_with_the_weights_again(
    corpus: Path, continued: Path, tmp_path: Path
) -> None:
    config = options(corpus, tmp_path / "run", continued / "gpt2")
    pretrain(config, stop_after=1)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    pretrain(dataclasses.replace(config, resume="auto"))
    tiny_runs.assert_same_end(tmp_path / "run", continued / "run")


def test_the_final_model_is_the_trained_one_in_its_own_class(continued: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(continued / "run" / "model")
    assert type(model).__name__ == "GPT2LMHeadModel"
    checkpoint = latest_checkpoint(continued / "run" / "checkpoints")
    assert checkpoint is not None
    trained = transformers.AutoModelForCausalLM.from_pretrained(continued / "gpt2")
    ids = torch.arange(3, 40)[None]
    before = trained(ids).logits
    trained.load_state_dict(checkpoint.weights(), strict=False)
    assert torch.equal(model(ids).logits, trained(ids).logits)
    assert not torch.equal(model(ids).logits, before)
    assert model.lm_head.weight is model.transformer.wte.weight
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        kept = (continued / "gpt2" / name).read_bytes()
        assert (continued / "run" / "model" / name).read_bytes() == kept, name
    before_, after = (
        json.loads((continued / path / "config.json").read_text()) for path in ("gpt2", "run/model")
    )
    assert {key for key in before_ | after if before_.get(key) != after.get(key)} <= {"dtype"}
    assert after["attn_pdrop"] == 0.1  # not the dropout of the run
    tokens = transformers.AutoTokenizer.from_pretrained(continued / "run" / "model")
    assert tokens("the cat")["input_ids"]


def test_experts_are_trained_and_saved(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_shape("mixtral", tmp_path / "mixtral")
    config = options(corpus, tmp_path / "run", folder, max_steps=2)
    result = pretrain(config, quiet=False)
    assert "experts of a MixtralForCausalLM are trained without a load-balancing" in capsys.readouterr().out
    checkpoint = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    before, after, trained = (
        transformers.AutoModelForCausalLM.from_pretrained(path) for path in (folder, result.model_dir, folder)
    )
    trained.load_state_dict(checkpoint.weights(), strict=False)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor), name
        if "experts" in name:
            assert not torch.equal(before.state_dict()[name], tensor), name


def test_a_run_is_opened_by_its_checkpoint_and_by_its_model(continued: Path) -> None:
    run = continued / "run"
    ids = torch.arange(3, 40)[None]
    logits = []
    for path in (run, run / "checkpoints", run / "model"):
        _, model, tokenizer = load_with_tokenizer(path)
        assert tokenizer.vocab_size == 300
        logits.append(model.eval()(ids).logits)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    # Somewhere else, a checkpoint has the configuration, but no tokenizer.
    assert open_model(run / "checkpoints" / "step-00000008").config.num_hidden_layers == 2


def test_a_run_continues_a_checkpoint_of_such_a_run(corpus: Path, continued: Path, tmp_path: Path) -> None:
    config = options(corpus, tmp_path / "next", continued / "run" / "checkpoints", max_steps=1)
    result = pretrain(dataclasses.replace(config, learning_rate=1e-9, dropout=0.0))
    ids = torch.arange(3, 40)[None]
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(path)
        for path in (result.model_dir, continued / "run" / "model")
    ]
    torch.testing.assert_close(models[0](ids).logits, models[1](ids).logits, atol=1e-5, rtol=0)
    assert (tmp_path / "next" / "initial" / "tokenizer.json").is_file()


def test_the_learning_rate_is_annealed_from_a_checkpoint(continued: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(continued / "run", run)
    result = decay(run, 512, from_step=4, output_dir=tmp_path / "decayed")
    assert result.steps > 4
    assert transformers.AutoModelForCausalLM.from_pretrained(result.model_dir).config.n_layer == 2
    assert (tmp_path / "decayed" / "initial" / "config.json").is_file()


def test_info_describes_such_a_run_and_its_model(continued: Path) -> None:
    parts = {"all": 39168, "embedding": 13696, "attention": 8448, "MLP": 16704, "norms": 320, "head": 0}
    for path in ("gpt2", "run", "run/checkpoints/step-00000008", "run/model"):
        found = read_info(continued / path)
        assert found.values["parameters"] == parts, path
        rows = dict(found.rows)
        assert "2 layers, hidden size 32, 4 heads, 4 key/value heads" in rows["model"]
    banner = [
        row for row in (continued / "run" / "report.html").read_text().split("<") if "GPT2LMHead" in row
    ]
    assert banner


def test_the_command_that_reproduces_the_run_names_the_weights(continued: Path) -> None:
    again = reproduce(read_run(continued / "run"))
    assert again.args[again.args.index("--from-weight") + 1] == str(continued / "gpt2")
    assert not any(arg.startswith(("--hidden-size", "--rope-theta", "--vocab-size")) for arg in again.args)


def test_an_evaluation_is_the_loss_of_transformers(corpus: Path, continued: Path) -> None:
    config = dataclasses.replace(
        options(corpus, continued / "unused", continued / "gpt2"),
        **{"max_seq_len": 128, "from_weight": None, "packing": False, **NO_SIZES},
    )
    found = evaluate_text(str(continued / "run"), config, per_document=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(continued / "run" / "model")
    _, _, tokenizer = load_with_tokenizer(continued / "run")
    text = json.loads(corpus.read_text().splitlines()[0])["text"]
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text), tokenizer.eos_token_id]])
    assert found.documents[0].evaluation.loss == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)


def test_a_plan_knows_the_sizes_of_the_model(corpus: Path, continued: Path, tmp_path: Path) -> None:
    plan = plan_run(options(corpus, tmp_path / "planned", continued / "gpt2"), seconds=0.05, quiet=True)
    assert sum(plan.parts.values()) == 39168
    assert plan.flops_per_token == 6 * 39168 + 6 * 2 * 32 * 32
    # Weights in float32, and one number more for those of NorMuon, two for the others.
    matrices = 2 * (4 * 32 * 32 + 2 * 32 * 128)
    assert plan.checkpoint_bytes == 4 * (3 * 39168 - matrices)
    assert not (tmp_path / "planned").exists()


@pytest.mark.parametrize("path", ["gpt2", "run"])
def test_an_export_reads_back_and_is_loaded_by_transformers(
    continued: Path, tmp_path: Path, path: str
) -> None:
    exported = export_model(continued / path, tmp_path / "exported", max_shard_bytes=20_000)
    assert exported.dtype == "float32"
    assert "model.safetensors.index.json" in exported.files
    ids = torch.arange(3, 40)[None]
    source = continued / path if path == "gpt2" else continued / path / "model"
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(folder)
        for folder in (tmp_path / "exported", source)
    ]
    assert torch.equal(models[0](ids).logits, models[1](ids).logits)
    assert (tmp_path / "exported" / "README.md").is_file() == (path == "run")
    with pytest.raises(ConfigError, match=r"--format gguf .* convert_hf_to_gguf\.py"):
        export_model(continued / path, tmp_path / "other", "gguf")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 64}, "hidden_size 64 contradicts from_weight .*, where it is 32"),
        ({"use_moe": True}, "use_moe contradicts from_weight"),
        ({"max_seq_len": 256}, "max_seq_len 256 is more than the 128 positions"),
        ({"compile": True}, "compile is not implemented for a GPT2LMHeadModel"),
    ],
)
def test_contradicting_options_are_refused(
    corpus: Path, continued: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        pretrain(options(corpus, tmp_path / "run", continued / "gpt2", **change))


def test_what_is_known_of_miniminds_models_only_is_refused(
    corpus: Path, continued: Path, tmp_path: Path
) -> None:
    config = options(corpus, tmp_path / "run", continued / "gpt2", max_steps=None, epochs=None)
    budget = dataclasses.replace(config, budget="10s", learning_rate=None)
    with pytest.raises(ConfigError, match="budget knows the speed of minimind's own models"):
        pretrain_within_budget(budget)
    with pytest.raises(ConfigError, match="which transformers builds; omit the option, or the model factory"):
        pretrain_within_budget(
            dataclasses.replace(config, max_steps=1), model_factory=lambda _: torch.nn.Linear(1, 1)
        )


def test_activations_are_recomputed_to_the_same_steps(corpus: Path, tmp_path: Path) -> None:
    folder = save_shape("llama", tmp_path / "llama")
    for name, recomputed in (("plain", False), ("recomputed", True)):
        config = options(corpus, tmp_path / name, folder, max_steps=3, sample_interval=2)
        pretrain(dataclasses.replace(config, activation_checkpointing=recomputed))
    tiny_runs.assert_same_end(tmp_path / "recomputed", tmp_path / "plain")
    assert len((tmp_path / "plain" / "samples.jsonl").read_text().splitlines()) == 1
