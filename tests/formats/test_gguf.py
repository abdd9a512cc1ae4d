"""GGUF files against the package of llama.cpp, and against llama.cpp itself where it is installed."""

from __future__ import annotations

import builtins
import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from minimind.errors import ConfigError, UserError
from minimind.formats.gguf import DTYPES, differences, gguf_tensors, metadata, save_gguf
from minimind.formats.gguf_tokenizer import pre_tokenizer_name, vocabulary
from minimind.formats.huggingface import load_config, load_weights, save_model, to_checkpoint_names
from minimind.generation.generate import generate
from minimind.generation.sampling import Sampling
from minimind.modeling.config import MiniMindConfig
from minimind.modeling.transformer import MiniMindForCausalLM
from minimind.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

gguf = pytest.importorskip("gguf")

SHAPE = {
    "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96, "max_position_embeddings": 512,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the cat sat on the mat, and the hat that the cat had sat there. " * 20], 290)


def build(**changes) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(**{**SHAPE, "initializer_range": 0.1, **changes}))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    return model.eval()


def weights_of(model: MiniMindForCausalLM) -> dict[str, torch.Tensor]:
    weights = to_checkpoint_names(model.state_dict())
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


def save(model: MiniMindForCausalLM, tokenizer: Tokenizer, path: Path, dtype: str = "float16") -> Path:
    save_gguf(weights_of(model), model.config, tokenizer, path, dtype)
    return path


MOE = {"use_moe": True, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.mark.parametrize("tied", [True, False])
def test_tensors_have_the_names_that_llama_cpp_gives_them(tied):
    weights = weights_of(build(tie_word_embeddings=tied))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 2)
    expected = [names.get_name(name, try_suffixes=(".weight",)) for name in weights]
    ours = [name for name, _ in gguf_tensors(weights)]
    assert None not in expected
    assert ours == expected
    allowed = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.QWEN3]}
    assert {
        name.removesuffix(".weight").replace("blk.1.", "blk.0.").replace("blk.0.", "blk.{bid}.")
        for name in ours
    } <= allowed


# Half a unit in the last place of each type, relative to the largest number. The scale of q8_0 is a float16.
ROUNDING = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8, "q8_0": 0.5 / 127 + 2**-11}


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_come_back_as_exact_as_their_type(dtype, tokenizer, tmp_path):
    model = build()
    reader = gguf.GGUFReader(save(model, tokenizer, tmp_path / "m.gguf", dtype))
    stored = {tensor.name: tensor for tensor in reader.tensors}
    expected = dict(gguf_tensors(weights_of(model)))
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        numbers = gguf.dequantize(stored[name].data, stored[name].tensor_type)
        assert stored[name].shape.tolist() == list(reversed(tensor.shape))
        if tensor.dim() == 1:
            assert np.array_equal(numbers, tensor.numpy())
        else:
            np.testing.assert_allclose(
                numbers, tensor.numpy(), rtol=0, atol=ROUNDING[dtype] * tensor.abs().max().item()
            )
    kinds = {tensor.tensor_type.name for tensor in stored.values() if len(tensor.shape) == 2}
    assert kinds == {{"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]}


def test_experts_are_stacked_and_their_router_stays_exact(tokenizer, tmp_path):
    model = build(**MOE)
    reader = gguf.GGUFReader(save(model, tokenizer, tmp_path / "m.gguf"))
    stored = {tensor.name: tensor for tensor in reader.tensors}
    allowed = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.QWEN3MOE]}
    assert {
        name.removesuffix(".weight").replace("blk.1.", "blk.{bid}.") for name in stored if "blk.0" not in name
    } <= allowed
    for projection in ("gate", "up", "down"):
        stack = model.state_dict()[f"model.layers.1.mlp.experts.{projection}_proj"]
        assert np.array_equal(stored[f"blk.1.ffn_{projection}_exps.weight"].data, stack.half().numpy())
    router = stored["blk.1.ffn_gate_inp.weight"]
    assert np.array_equal(router.data, model.state_dict()["model.layers.1.mlp.gate.weight"].numpy())
    read = {key: field.contents() for key, field in reader.fields.items()}
    assert read["general.architecture"] == "qwen3moe"
    counts = [read[f"qwen3moe.expert_{name}"] for name in ("count", "used_count", "feed_forward_length")]
    assert counts == [4, 2, 32]


def test_more_than_ten_experts_keep_their_order_whatever_that_of_the_file(tmp_path):
    model = build(**{**MOE, "num_experts": 12})
    save_model(model, tmp_path, dtype=torch.float32)
    weights = load_weights(tmp_path, load_config(tmp_path))
    tenth, second = (list(weights).index(f"model.layers.1.mlp.experts.{e}.up_proj.weight") for e in (10, 2))
    assert tenth < second, "a safetensors file has them in the order of the alphabet"
    stacks = dict(gguf_tensors(weights))
    for projection in ("gate", "up", "down"):
        ours = model.state_dict()[f"model.layers.1.mlp.experts.{projection}_proj"]
        assert torch.equal(stacks[f"blk.1.ffn_{projection}_exps.weight"], ours)


def test_experts_whose_weights_llama_cpp_would_change_are_refused(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="norm_topk_prob false"):
        save(build(**MOE, norm_topk_prob=False), tokenizer, tmp_path / "m.gguf")


def test_rows_that_do_not_divide_into_blocks_stay_in_float16(tokenizer, tmp_path):
    model = build(intermediate_size=40)
    reader = gguf.GGUFReader(save(model, tokenizer, tmp_path / "m.gguf", "q8_0"))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"


def test_the_file_says_what_llama_cpp_has_to_know(tokenizer, tmp_path):
    model = build(rope_theta=5e5, rms_norm_eps=1e-5)
    reader = gguf.GGUFReader(save(model, tokenizer, tmp_path / "m.gguf"))
    read = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert read["general.architecture"] == "qwen3"
    assert read["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    general = [read[f"general.{name}"] for name in ("type", "name", "size_label")]
    assert general == ["model", "minimind", "106K"]
    shape = {key.removeprefix("qwen3."): value for key, value in read.items() if key.startswith("qwen3.")}
    assert shape == {
        "block_count": 2,
        "context_length": 512,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "rope.dimension_count": 32,
        "rope.freq_base": 5e5,
    }
    assert read["tokenizer.ggml.model"] == "gpt2"
    assert read["tokenizer.ggml.pre"] == "qwen2"
    roles = [read[f"tokenizer.ggml.{role}_token_id"] for role in ("bos", "eos", "padding")]
    assert roles == [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    tokens, types = read["tokenizer.ggml.tokens"], read["tokenizer.ggml.token_type"]
    assert tokens[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokens[290:] == [f"[PAD{id}]" for id in range(290, 300)]
    expected = [gguf.TokenType.CONTROL] * 16 + [gguf.TokenType.NORMAL] * 274 + [gguf.TokenType.UNUSED] * 10
    assert types == expected


def test_entries_and_merges_are_those_of_the_tokenizer(tokenizer):
    values = vocabulary(tokenizer, 290)
    rules = tokenizer.rules()["model"]
    assert {token: id for id, token in enumerate(values["tokenizer.ggml.tokens"])} == rules["vocab"]
    assert [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]] == [
        tuple(pair) for pair in rules["merges"]
    ]


def test_the_originals_tokenizer_keeps_its_split_its_marks_and_its_template(shared):
    tokenizer = load_tokenizer(shared / "compat" / "minimind3_tokenizer.json")
    values = vocabulary(tokenizer, tokenizer.vocab_size)
    assert values["tokenizer.ggml.pre"] == "gpt-2"
    types = dict(zip(values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"], strict=True))
    assert types["<|im_end|>"] == types["<|buffer1|>"] == gguf.TokenType.CONTROL
    assert types["<think>"] == gguf.TokenType.USER_DEFINED
    assert "im_start" in values["tokenizer.chat_template"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": {"type": "Unigram"}}, "no byte-level BPE"),
        ({"model": {"type": "BPE", "byte_fallback": True}}, "no byte-level BPE"),
        ({"model": {"type": "BPE", "ignore_merges": True}}, "no byte-level BPE"),
        ({"normalizer": {"type": "Lowercase"}}, r"normalizes text \(Lowercase\)"),
        ({"pre_tokenizer": None}, r"none of those supported \(qwen2, gpt-2\)"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "none of those supported"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "none of those supported"),
    ],
)
def test_a_tokenizer_without_an_equal_in_llama_cpp_is_refused(change, sentence, tokenizer):
    assert pre_tokenizer_name({**tokenizer.rules(), "normalizer": {"type": "NFC"}}) == "qwen2"
    with pytest.raises(ConfigError, match=sentence):
        pre_tokenizer_name({**tokenizer.rules(), **change})


def test_yarn_is_written_in_llama_cpps_factors(tokenizer):
    def scaling(**numbers: float) -> dict[str, object]:
        config = MiniMindConfig(**SHAPE, rope_scaling={**YARN, **numbers})
        values = metadata(config, tokenizer, "float16", "m")
        return {
            key.removeprefix("qwen3.rope.scaling."): values[key] for key in values if ".rope.scaling." in key
        }

    plain = {"type": "yarn", "factor": 4.0, "original_context_length": 128}
    assert scaling() == plain
    # llama.cpp multiplies by 0.1 ln 4 + 1 = 1.1386 in any case.
    assert scaling(attention_factor=1.0) == {**plain, "attn_factor": pytest.approx(1 / 1.138629)}
    for numbers in ({"beta_slow": 2.0}, {"beta_fast": 16.0}, {"truncate": False}):
        with pytest.raises(ConfigError, match="supports YaRN for Qwen3 only with beta_fast 32"):
            scaling(**numbers)


def test_a_file_that_differs_is_found_out(tokenizer, tmp_path):
    model = build()
    path = save(model, tokenizer, tmp_path / "m.gguf", "q8_0")
    arguments = (weights_of(model), model.config, tokenizer)
    assert differences(path, *arguments, "q8_0") == []
    assert "general.file_type" in differences(path, *arguments, "float16")
    other = dataclasses.replace(model.config, rope_theta=1e4)
    assert differences(path, arguments[0], other, tokenizer, "q8_0") == ["qwen3.rope.freq_base"]
    fewer = {name: tensor for name, tensor in arguments[0].items() if name != "model.norm.weight"}
    assert differences(path, fewer, *arguments[1:], "q8_0") == ["output_norm.weight"]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    last = list(gguf_tensors(arguments[0]))[-1][0]
    assert differences(path, *arguments, "q8_0") == [last]


def test_weights_that_float16_cannot_hold_are_not_written_as_infinity(tokenizer, tmp_path):
    model = build()
    torch.nn.init.constant_(model.model.layers[0].mlp.up_proj.weight, 1e5)
    with pytest.raises(UserError, match=r"blk.0.ffn_up.weight holds values too large for F16"):
        save(model, tokenizer, tmp_path / "m.gguf")
    save(model, tokenizer, tmp_path / "m.gguf", "bfloat16")


def test_without_the_package_the_error_names_the_command(tokenizer, tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name: str, *arguments, **options):
        if name == "gguf":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(
        ConfigError, match=r"needs the package gguf, which is not installed; pip install gguf"
    ):
        save(build(), tokenizer, tmp_path / "m.gguf")


def load_in_llama_cpp(path: Path):
    llama_cpp = pytest.importorskip("llama_cpp")
    exact = {"type_k": 0, "type_v": 0}  # the cache in float32
    from_file = dict.fromkeys(("yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow"), -1.0)
    return llama_cpp.Llama(
        str(path), n_ctx=512, logits_all=True, verbose=False, n_threads=1, **exact, **from_file
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"rope_scaling": YARN},
        {"rope_scaling": {**YARN, "attention_factor": 1.0}},
        MOE,
    ],
    ids=["tied", "untied", "yarn", "yarn with a factor", "experts"],
)
def test_llama_cpp_gives_our_logits_and_our_greedy_text(changes, tokenizer, tmp_path):
    model = build(**changes)
    theirs = load_in_llama_cpp(save(model, tokenizer, tmp_path / "m.gguf", "float32"))
    ids = torch.randint(290, (1, 200), generator=torch.Generator().manual_seed(0))
    theirs.eval(ids[0].tolist())
    with torch.no_grad():
        expected = model(ids).logits[0].numpy()
    np.testing.assert_allclose(np.array(theirs.scores[:200]), expected, atol=1e-4, rtol=0)
    (written,) = generate(model, ids[:, :20].tolist(), Sampling(temperature=0), max_new_tokens=30)
    theirs.reset()
    greedy = theirs.generate(ids[0, :20].tolist(), temp=0.0, top_k=1, repeat_penalty=1.0)
    assert [token for token, _ in zip(greedy, written, strict=False)] == written


def test_llama_cpp_splits_text_as_our_tokenizer_does(tmp_path, shared):
    tokenizer = load_tokenizer()
    theirs = load_in_llama_cpp(save(build(vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "m.gguf"))
    lines = [
        line for name in ("en", "zh") for line in (shared / "data" / f"{name}.jsonl").open(encoding="utf-8")
    ]
    draw = random.Random(0)
    texts = [json.loads(line)["text"] for line in draw.sample(lines, 500)]
    characters = " \n\r\t'0aAsSétſ天\u0301😀\u200d\u0661\u00a0\u3000\u2028.-"
    texts += ["".join(draw.choices(characters, k=30)) for _ in range(1000)]
    for text in texts:
        ours = tokenizer.encode(text)
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == ours, text
        assert theirs.detokenize(ours).decode() == text
