"""Generate text from prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import nn

from ..errors import ConfigError
from ..modeling.transformer import MiniMindForCausalLM
from ..tokenizer import Tokenizer
from .engine import Decoder, InferenceEngine
from .generate import SAMPLING, generate, stream
from .sampling import Sampling

# Stands for bytes that are not a whole character.
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Completion:
    """The continuation of one prompt.

    Attributes:
        prompt_tokens: tokens of the prompt, including the bos token.
        tokens: generated tokens, including the eos token.
        ended: "end" after the eos token, "length" at the length limit.
    """

    prompt: str
    text: str
    prompt_tokens: int
    tokens: int
    ended: Literal["end", "length"]


@dataclass
class TextStream:
    """Incremental detokenization: yields text once its characters are complete.

    Attributes:
        before: ids that were output before, initially the prompt: decoders treat the first token specially.
    """

    decode: Callable[[Sequence[int]], str]
    before: list[int]
    _pending: list[int] = field(default_factory=list, init=False)

    def push(self, token: int) -> str:
        """Append a token and return the text that is complete now, possibly empty."""
        self._pending.append(token)
        text = self._new_text()
        if text.endswith(_REPLACEMENT):
            return ""
        if text:
            # Decode the next piece after this one alone, so that the cost does not grow.
            self.before, self._pending = self._pending, []
        return text

    def end(self) -> str:
        """Return the rest, with U+FFFD for incomplete characters."""
        text = self._new_text()
        self.before, self._pending = self._pending, []
        return text

    def _new_text(self) -> str:
        return self.decode(self.before + self._pending)[len(self.decode(self.before)) :]


def make_engine(
    model: nn.Module, *, device: str = "auto", dtype: str = "float32", compiled: bool = False
) -> Decoder:
    """Return an inference engine for the model on a device.

    Args:
        model: moved to the device; a `MiniMindForCausalLM`, or one that decodes by itself.
        device: a torch device type, or `auto` for the accelerator if there is one.
        dtype: torch name of the precision.
        compiled: see `InferenceEngine`.

    Raises:
        ConfigError: when there is no such device, or the model cannot be compiled.
    """
    moved = model.to(choose_device(device), getattr(torch, dtype)).eval()
    if isinstance(moved, MiniMindForCausalLM):
        return InferenceEngine(moved, compiled=compiled)
    if compiled:
        raise ConfigError("--compile is implemented for models of minimind only; omit it.")
    return cast(Decoder, moved)


def choose_device(name: str) -> torch.device:
    """Return the device of that name; for `auto` the accelerator, or else the CPU.

    Raises:
        ConfigError: when there is no such device.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return found or torch.device("cpu")
    if name != "cpu" and (found is None or found.type != name):
        raise ConfigError(f"--device {name} is not available; use --device cpu.")
    return torch.device(name)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the ids of a prompt as the beginning of a document, as in training; never empty."""
    ids = tokenizer.encode(prompt)
    if tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id, *ids]
    return ids or [tokenizer.eos_token_id]


def continue_texts(
    model: MiniMindForCausalLM | Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling = SAMPLING,
    *,
    max_new_tokens: int,
    seed: int | None = None,
) -> list[Completion]:
    """Return the continuation of each prompt; see `generate.generate`.

    Raises:
        ConfigError: when a prompt is as long as the model's positions.
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    stop_ids = (tokenizer.eos_token_id,)
    generated = generate(
        model, encoded, sampling, max_new_tokens=max_new_tokens, stop_ids=stop_ids, seed=seed
    )
    return [
        Completion(
            prompt,
            tokenizer.decode(ids + new)[len(tokenizer.decode(ids)) :],
            len(ids),
            len(new),
            "end" if new[-1:] == [tokenizer.eos_token_id] else "length",
        )
        for prompt, ids, new in zip(prompts, encoded, generated, strict=True)
    ]


def stream_text(
    model: MiniMindForCausalLM | Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling = SAMPLING,
    *,
    max_new_tokens: int,
    seed: int | None = None,
) -> Iterator[str]:
    """Yield the continuation of a prompt piece by piece; see `continue_texts`."""
    encoded = encode_prompt(tokenizer, prompt)
    text = TextStream(tokenizer.decode, encoded)
    stop_ids = (tokenizer.eos_token_id,)
    steps = stream(model, [encoded], sampling, max_new_tokens=max_new_tokens, stop_ids=stop_ids, seed=seed)
    for (token,) in steps:
        if token is not None and (piece := text.push(token)):
            yield piece
    if rest := text.end():
        yield rest
