"""The fused functions against float64: a program that prints the relative error of each output and gradient.

With --interpret the kernels run on the CPU in Triton's interpreter, which must be chosen before Triton is
loaded; hence a separate process.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Errors = dict[str, float]


def interpret() -> None:
    """Have kernels interpreted: functions of Python that are called with a grid."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    class OneElement(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, builtins.int)

    class Int(metaclass=OneElement):
        """`int` of an array of one element too, which NumPy no longer grants."""

        def __new__(cls, value: Any) -> Any:
            return builtins.int(value.reshape(-1)[0] if isinstance(value, np.ndarray) else value)

    interpreter.int = Int
    torch.library.wrap_triton = lambda kernel: kernel
    torch.library.triton_op = lambda name, mutates_args: lambda function: function


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def compare(name: str, ours: Callable, exact: Callable, inputs: tuple[Tensor, ...]) -> Errors:
    """Return the errors of outputs and of the gradients of all inputs, for random output gradients."""
    low = [tensor.clone().requires_grad_() for tensor in inputs]
    high = [tensor.double().requires_grad_() for tensor in inputs]
    # As with activation checkpointing, under which a function may unpack what it saved only once.
    outputs, references = checkpoint(ours, *low, use_reentrant=False), exact(*high)
    if isinstance(outputs, Tensor):
        outputs, references = (outputs,), (references,)
    grads = [torch.randn_like(reference) for reference in references]
    torch.autograd.backward(
        outputs, [grad.to(output.dtype) for grad, output in zip(grads, outputs, strict=True)]
    )
    torch.autograd.backward(references, grads)
    found = {
        f"{name} output {i}": error(*pair) for i, pair in enumerate(zip(outputs, references, strict=True))
    }
    pairs = [(a.grad, b.grad) for a, b in zip(low, high, strict=True)]
    return found | {f"{name} gradient {i}": error(a, b) for i, (a, b) in enumerate(pairs)}


def norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def norm_cases(device: str) -> Errors:
    from minimind.modeling.kernels import autograd as fused

    width = 24 if device == "cpu" else 768
    x, added = (torch.randn(3, 7, width, device=device).bfloat16() for _ in range(2))
    weight = torch.randn(width, device=device) + 1
    weight[4] = 0  # whose gradient must not be lost
    return compare(
        "sum and norm",
        lambda x, added, weight: fused.add_norm(x, added, weight, 1e-6),
        lambda x, added, weight: (x + added, norm(x + added, weight)),
        (x, added, weight),
    ) | compare("norm", lambda x, weight: fused.add_norm(x, None, weight, 1e-6)[1], norm, (x, weight))


def attention_case(
    device: str, heads: int, kv_heads: int, head_dim: int, length: int, document: int | None
) -> Errors:
    from minimind.modeling.documents import documents as documents_of
    from minimind.modeling.kernels import autograd as fused

    document_ids = None
    if document is not None:
        # The second sequence has other documents than the first.
        lengths = torch.tensor([[document], [2 * document - 1]], device=device)
        document_ids = (torch.arange(length, device=device) // lengths).int()
    seen = documents_of(document_ids, 2, length, torch.device(device))
    at = torch.arange(length, device=device)
    positions = at - seen.starts
    frequencies = 1e4 ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    angles = torch.outer(torch.arange(length, device=device).float(), frequencies)
    # Stretched, as YaRN's are.
    cos, sin = angles.cos() * 1.3, angles.sin() * 1.3
    # The interpreter cannot multiply matrices of bf16.
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    qkv = torch.randn(2, length, (heads + 2 * kv_heads) * head_dim, device=device, dtype=dtype)
    weights = [torch.randn(head_dim, device=device) + 1 for _ in range(2)]

    def exact(qkv: Tensor, query_weight: Tensor, key_weight: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (-1, head_dim)).split((heads, kv_heads, kv_heads), 2)
        turning = cos[positions].unsqueeze(2).double(), sin[positions].unsqueeze(2).double()
        q, k = turn(norm(q, query_weight), *turning), turn(norm(k, key_weight), *turning)
        mask = (at <= at[:, None]).expand(2, length, length)
        if document_ids is not None:
            mask = mask & (document_ids[:, :, None] == document_ids[:, None, :])
        q, k, v = (x.repeat_interleave(heads // x.shape[2], 2).transpose(1, 2) for x in (q, k, v))
        scores = (q @ k.mT / head_dim**0.5).masked_fill(~mask[:, None], -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    return compare(
        f"attention {heads}/{kv_heads} x {head_dim}, {length} tokens, documents of {document}",
        lambda qkv, *weights: fused.attend(qkv, *weights, cos, sin, positions, seen, heads=heads, eps=1e-6),
        exact,
        (qkv, *weights),
    )


def swiglu_case(device: str) -> Errors:
    from minimind.modeling.kernels import autograd as fused

    gate_up = torch.randn(9, 2 * 600, device=device).bfloat16()
    weight = torch.randn(16, 600, device=device).bfloat16()
    return compare(
        "swiglu",
        fused.swiglu_down,
        lambda x, weight: (F.silu(x[:, :600]) * x[:, 600:]) @ weight.T,
        (gate_up, weight),
    ) | compare("swiglu alone", fused.swiglu, lambda x: F.silu(x[:, :600]) * x[:, 600:], (gate_up,))


def cross_entropy_case(device: str, vocab_size: int) -> Errors:
    from minimind.modeling.kernels import autograd as fused

    logits = (3 * torch.randn(6, vocab_size, device=device)).bfloat16()
    targets = torch.randint(vocab_size, (6,), device=device)
    targets[2] = -100
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, targets, ignore_index=-100, reduction="none")
    losses.sum().backward()
    ours = fused.cross_entropy_(logits, targets, -100)
    name = f"cross-entropy of {vocab_size}"
    return {name: error(ours, losses), f"{name} gradient": error(logits, exact.grad)}


def all_cases(device: str) -> Errors:
    """Return the relative error of everything that is compared, by name."""
    torch.manual_seed(0)
    if device == "cpu":
        shapes = [(4, 2, 24, 21, 5), (2, 1, 32, 37, None)]
    else:
        shapes = [(8, 4, 96, 300, 50), (8, 2, 64, 333, None), (4, 2, 128, 200, 70), (4, 2, 48, 77, 9)]
    found = norm_cases(device) | swiglu_case(device)
    for shape in shapes:
        found |= attention_case(device, *shape)
    for vocab_size in (100, 9000) if device == "cpu" else (6400, 50304):
        found |= cross_entropy_case(device, vocab_size)
    return found


if __name__ == "__main__":
    if "--interpret" in sys.argv:
        interpret()
        from minimind.modeling.kernels import autograd as fused

        def small_tiles(head_dim: int, device_index: int) -> tuple[dict[str, int], ...]:
            wide = 1 << (head_dim.bit_length() - 1)
            shape = {"DIM": head_dim, "WIDE": wide, "REST": 0 if wide == head_dim else 16}
            return tuple({**shape, "QUERIES": 16, "KEYS": 16} for _ in range(3))

        # So that rows of few tokens have several tiles, and programs several rows.
        fused._attention_tiles, fused._PROGRAMS = small_tiles, 5
        import decoding_cases

        found = {f"decoding {name}": error for name, error in decoding_cases.all_cases().items()}
        print(json.dumps(all_cases("cpu") | found))
    else:
        print(json.dumps(all_cases("cuda")))
