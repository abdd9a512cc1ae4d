"""Write GGUF files for llama.cpp, Ollama and LM Studio.

Metadata keys, tensor names and types match llama.cpp's converter for Qwen3 and Qwen3-MoE
(`conversion/qwen.py` and `conversion/base.py` there). Needs the package `gguf`, which also quantizes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, UserError, needs_package
from ..modeling.config import MiniMindConfig
from ..tokenizer import Tokenizer
from .gguf_tokenizer import vocabulary

# --dtype: the tensor type in `GGMLQuantizationType`, the file type in `LlamaFileType`.
_TYPES = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
DTYPES = tuple(_TYPES)
_OUTER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
_EXPERT_NAMES = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(\w+)\.weight")


def save_gguf(
    weights: Mapping[str, Tensor],
    config: MiniMindConfig,
    tokenizer: Tokenizer,
    path: Path,
    dtype: str = "float16",
    name: str = "minimind",
) -> None:
    """Write a model with its tokenizer.

    Args:
        weights: every parameter by its Hugging Face name, on any device; a tied matrix once.
        tokenizer: a byte-level BPE.
        dtype: precision of the matrices, one of `DTYPES`. q8_0 rounds to 8 bits with one scale per 32 values;
            matrices whose row length is not a multiple of 32 stay in float16. Norms and routers are float32.

    Raises:
        ConfigError: when `gguf` is not installed, or llama.cpp does not support the tokenizer or the model.
        UserError: when weights overflow the dtype, or the file cannot be written.
    """
    gguf = _package()
    values = metadata(config, tokenizer, dtype, name)
    try:
        writer = gguf.GGUFWriter(path, values["general.architecture"])
        for key, value in values.items():
            if key != "general.architecture":  # the writer has put it first
                kind, sub_kind = _value_type(gguf, key, value)
                writer.add_key_value(key, value, kind, sub_kind)
        for tensor_name, tensor in gguf_tensors(weights):
            data, kind = _encode(gguf, tensor_name, tensor, dtype)
            writer.add_tensor(tensor_name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except OSError as error:
        raise UserError(f"the model could not be written to {path}: {error}.") from error


def differences(
    path: Path,
    weights: Mapping[str, Tensor],
    config: MiniMindConfig,
    tokenizer: Tokenizer,
    dtype: str = "float16",
    name: str = "minimind",
) -> list[str]:
    """Return the keys and tensors of a file that differ from what `save_gguf` writes for these arguments."""
    gguf = _package()
    reader = gguf.GGUFReader(path)
    wrong = []
    for key, value in metadata(config, tokenizer, dtype, name).items():
        field = reader.get_field(key)
        stored = None if field is None else field.contents()
        # Floats are stored as float32.
        if stored != (np.float32(value) if isinstance(value, float) else value):
            wrong.append(key)
    stored_tensors = {tensor.name: tensor for tensor in reader.tensors}
    for tensor_name, tensor in gguf_tensors(weights):
        data, kind = _encode(gguf, tensor_name, tensor, dtype)
        found = stored_tensors.pop(tensor_name, None)
        shape = tuple(reversed(tensor.shape))
        if (
            found is None
            or found.tensor_type != kind
            or tuple(found.shape) != shape
            or not np.array_equal(_bytes(found.data), _bytes(data))
        ):
            wrong.append(tensor_name)
    return [*wrong, *stored_tensors]


def metadata(config: MiniMindConfig, tokenizer: Tokenizer, dtype: str, name: str) -> dict[str, Any]:
    """Return the metadata of a file: name, sizes and tokenizer of the model.

    Raises:
        ConfigError: when llama.cpp does not support the tokenizer or the model.
    """
    gguf = _package()
    architecture = "qwen3moe" if config.use_moe else "qwen3"
    sizes = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        **_rope_scaling(config.rope_scaling),
        **_experts(config),
    }
    return {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": name,
        "general.size_label": gguf.size_label(config.num_parameters(), 0, 0, 0),
        **{f"{architecture}.{key}": value for key, value in sizes.items()},
        "general.file_type": int(gguf.LlamaFileType[_TYPES[dtype][1]]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **vocabulary(tokenizer, config.vocab_size),
    }


def gguf_tensors(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors with llama.cpp's names, the experts of a block stacked.

    Args:
        weights: every parameter by its Hugging Face name, in any order: a safetensors file has expert 10
            before expert 2.
    """
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in weights.items():
        part = name.removesuffix(".weight")
        if part in _OUTER_NAMES:
            yield f"{_OUTER_NAMES[part]}.weight", tensor
        elif (expert := _EXPERT.fullmatch(name)) is not None:
            block, number, projection = expert.groups()
            stacks.setdefault(f"blk.{block}.{_EXPERT_NAMES[projection]}.weight", {})[int(number)] = tensor
        else:
            _, _, block, inner = part.split(".", 3)  # model.layers.N.
            yield f"blk.{block}.{_BLOCK_NAMES[inner]}.weight", tensor
    for name, experts in stacks.items():
        yield name, torch.stack([experts[number] for number in sorted(experts)])


def _experts(config: MiniMindConfig) -> dict[str, Any]:
    """Return the mixture-of-experts metadata."""
    if not config.use_moe:
        return {}
    if not config.norm_topk_prob:
        raise ConfigError(
            "llama.cpp normalizes the router weights of a token to a sum of 1, and this model has "
            "norm_topk_prob false; choose another --format."
        )
    return {
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
    }


def _rope_scaling(scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the YaRN metadata.

    llama.cpp multiplies cos and sin by `attn_factor`·(0.1·ln(factor) + 1); Hugging Face's `attention_factor`
    replaces the whole product.
    """
    if scaling is None:
        return {}
    fixed = {"truncate": True, "beta_fast": 32, "beta_slow": 1}
    if any(scaling.get(key, value) != value for key, value in fixed.items()):
        # llama.cpp has keys for both betas, but ignores them for Qwen3.
        raise ConfigError(
            "llama.cpp supports YaRN for Qwen3 only with beta_fast 32, beta_slow 1 and truncate true, and "
            f"this model has {dict(scaling)}; choose another --format."
        )
    factor = scaling["factor"]
    values = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": scaling["original_max_position_embeddings"],
    }
    if (attention := scaling.get("attention_factor")) is not None:
        values["rope.scaling.attn_factor"] = attention / (0.1 * math.log(factor) + 1.0)
    return values


def _encode(gguf: ModuleType, name: str, tensor: Tensor, dtype: str) -> tuple[np.ndarray, Any]:
    """Return the stored bytes of a tensor and their type."""
    numbers = tensor.detach().to("cpu", torch.float32).numpy()
    kind = gguf.GGMLQuantizationType[_TYPES[dtype][0]]
    if numbers.ndim == 1 or "ffn_gate_inp" in name:
        kind = gguf.GGMLQuantizationType.F32
    elif dtype == "q8_0" and numbers.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = gguf.GGMLQuantizationType.F16
    with np.errstate(over="ignore"):
        data = gguf.quantize(numbers, kind)
    if not np.isfinite(gguf.dequantize(data, kind)).all() and np.isfinite(numbers).all():
        raise UserError(f"{name} holds values too large for {kind.name}; use --dtype bfloat16.")
    return data, kind


def _bytes(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8)


def _value_type(gguf: ModuleType, key: str, value: Any) -> tuple[Any, Any]:
    """Return the GGUF type of a metadata value, and the element type of a list."""
    types = gguf.GGUFValueType
    if isinstance(value, list):
        # Token types are signed in llama.cpp; all other integers are sizes and ids.
        return types.ARRAY, types.STRING if isinstance(value[0], str) else types.INT32
    kinds = {bool: types.BOOL, str: types.STRING, float: types.FLOAT32, int: types.UINT32}
    return kinds[type(value)], None


def _package() -> ModuleType:
    """Return the package `gguf`."""
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(needs_package("--format gguf", "gguf")) from error
    return gguf
