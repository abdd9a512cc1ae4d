"""Prompts in, text out: what `generation` does with token ids, for people."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from ..errors import ConfigError
from ..modeling.transformer import MiniMindForCausalLM
from ..tokenizer import Tokenizer
from .engine import InferenceEngine
from .generate import SAMPLING, stream
from .sampling import Sampling

# What bytes that are no whole character are shown as.
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Written:
    """What a model made of one prompt.

    Attributes:
        prompt: as it was given.
        text: what follows it.
        prompt_tokens: tokens read, the start token included.
        tokens: tokens written, the end token included.
        ended: "end" where the model wrote its end token, "length" where it was cut off.
    """

    prompt: str
    text: str
    prompt_tokens: int
    tokens: int
    ended: Literal["end", "length"]


@dataclass
class TextStream:
    """Token ids in, text out as soon as it is certain: half a character waits for its other half.

    Attributes:
        decode: text of some ids.
        before: ids that are shown already, the prompt at first: decoders treat the beginning of a text in
            their own way.
    """

    decode: Callable[[Sequence[int]], str]
    before: list[int]
    _waiting: list[int] = field(default_factory=list, init=False)

    def push(self, token: int) -> str:
        """Return the text that is certain with one more token, empty where none is."""
        self._waiting.append(token)
        text = self._new_text()
        if text.endswith(_REPLACEMENT):
            return ""
        if text:
            # A piece that is whole serves as what stands before the next, however long the text becomes.
            self.before, self._waiting = self._waiting, []
        return text

    def end(self) -> str:
        """Return what still waits, with U+FFFD in place of what is no character."""
        text = self._new_text()
        self.before, self._waiting = self._waiting, []
        return text

    def _new_text(self) -> str:
        return self.decode(self.before + self._waiting)[len(self.decode(self.before)) :]


def make_decoder(
    model: MiniMindForCausalLM, *, device: str = "auto", dtype: str = "float32", compiled: bool = False
) -> InferenceEngine:
    """Return a decoder of the model on a device.

    Args:
        model: moved there.
        device: `auto`, which takes an accelerator if there is one, or the name of one in torch.
        dtype: name of the precision in torch.
        compiled: see `InferenceEngine`.

    Raises:
        ConfigError: when there is no such device.
    """
    return InferenceEngine(model.to(choose_device(device), getattr(torch, dtype)).eval(), compiled=compiled)


def choose_device(name: str) -> torch.device:
    """Return the device of that name, for `auto` the accelerator of this machine or else the CPU.

    Raises:
        ConfigError: when there is no such device.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return found or torch.device("cpu")
    if name != "cpu" and (found is None or found.type != name):
        raise ConfigError(f"--device {name}: torch finds no such device here; use --device cpu.")
    return torch.device(name)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the ids of a prompt as a document begins in training; an empty one is the beginning alone."""
    ids = tokenizer.encode(prompt)
    if tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id, *ids]
    return ids or [tokenizer.eos_token_id]


def continue_texts(
    model: MiniMindForCausalLM | InferenceEngine,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling = SAMPLING,
    *,
    max_new_tokens: int,
    seed: int | None = None,
) -> list[Written]:
    """Return the continuation of each prompt; see `generation.generate`.

    Raises:
        ConfigError: when a prompt leaves no position to write to.
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    written: list[list[int]] = [[] for _ in prompts]
    stop_ids = (tokenizer.eos_token_id,)
    for tokens in stream(
        model, encoded, sampling, max_new_tokens=max_new_tokens, stop_ids=stop_ids, seed=seed
    ):
        for text, token in zip(written, tokens, strict=True):
            if token is not None:
                text.append(token)
    return [
        Written(
            prompt,
            tokenizer.decode(read + ids)[len(tokenizer.decode(read)) :],
            len(read),
            len(ids),
            "end" if ids[-1:] == [tokenizer.eos_token_id] else "length",
        )
        for prompt, read, ids in zip(prompts, encoded, written, strict=True)
    ]


def stream_text(
    model: MiniMindForCausalLM | InferenceEngine,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling = SAMPLING,
    *,
    max_new_tokens: int,
    seed: int | None = None,
) -> Iterator[str]:
    """Yield the continuation of a prompt piece by piece, as it is written; see `continue_texts`."""
    encoded = encode_prompt(tokenizer, prompt)
    text = TextStream(tokenizer.decode, encoded)
    for (token,) in stream(
        model,
        [encoded],
        sampling,
        max_new_tokens=max_new_tokens,
        stop_ids=(tokenizer.eos_token_id,),
        seed=seed,
    ):
        if token is not None and (piece := text.push(token)):
            yield piece
    if rest := text.end():
        yield rest
