"""Render conversations as documents, by the chat template of the tokenizer."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from ..tokenizer import Tokenizer

# Columns and JSON keys whose values are lists of messages.
CHAT_KEYS = ("messages", "conversations")
# ChatML, for a tokenizer that has its tokens but no template.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + (message.content or '') "
    "+ '<|im_end|>\n' }}{% endfor %}"
)
_CHATML_TOKENS = {"<|im_start|>", "<|im_end|>"}
# Roles of the ShareGPT format.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}


class ChatText(str):
    """A rendered conversation, without the start and end token of a document.

    Attributes:
        parts: text, and ids of the template's special tokens. Their names in a message stay text.
    """

    parts: tuple[str | int, ...]

    @classmethod
    def of(cls, parts: list[str | int], names: Mapping[int, str]) -> ChatText:
        """Return the conversation of some parts, whose text names the special tokens."""
        rendered = cls("".join(names[part] if isinstance(part, int) else part for part in parts))
        rendered.parts = tuple(parts)
        return rendered


class ChatRenderer:
    """Renders lists of messages with the template of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Compile the template.

        Raises:
            ConfigError: for a tokenizer without a usable template.
        """
        from jinja2 import TemplateError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """The block `generation`, which marks what the assistant says; here every token is a target."""

            tags = {"generation"}  # noqa: RUF012

            def parse(self, parser: Any) -> Any:
                """Return the statements of the block."""
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        self._ids = dict(tokenizer.special_tokens)
        self._names = {id: name for name, id in self._ids.items()}
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        template = tokenizer.chat_template
        self.description = "the chat template of the tokenizer"
        if template is None and self._ids.keys() >= _CHATML_TOKENS:
            template, self.description = CHATML, "ChatML"
        if not isinstance(template, str):
            raise ConfigError(
                "--text-key names conversations, and the tokenizer has no chat template; add one to its "
                "tokenizer_config.json."
            )
        self.fingerprint = hashlib.sha256(template.encode()).hexdigest()[:32]
        tokens = map(re.escape, sorted(self._ids, key=len, reverse=True))
        self._split = re.compile(f"({'|'.join(tokens)})")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
        )
        environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        environment.globals["raise_exception"] = _raise
        self._errors = (TemplateError, TypeError, KeyError, ValueError)
        try:
            self._template = environment.from_string(template)
        except TemplateError as error:
            raise ConfigError(
                f"the chat template of the tokenizer is no valid Jinja template ({error}); fix it in its "
                "tokenizer_config.json."
            ) from error

    def render(self, value: Any) -> ChatText:
        """Return a conversation as a document.

        Raises:
            ValueError: with the reason, where `value` is no list of messages or the template refuses it.
        """
        messages = [_message(item) for item in value] if isinstance(value, list) else []
        if not messages:
            raise ValueError("not a list of messages with a role and a content")
        names: list[str] = []

        def hide(match: re.Match[str]) -> str:
            names.append(match[0])
            return f"\ufdd0{len(names) - 1}\ufdd1"

        hidden = _map_text(messages, lambda text: self._split.sub(hide, text))
        try:
            rendered = self._template.render(
                messages=hidden,
                tools=None,
                add_generation_prompt=False,
                bos_token=self._names.get(self._bos or -1, ""),
                eos_token=self._names.get(self._eos, ""),
            )
        except self._errors as error:
            raise ValueError(f"the chat template refuses the messages ({error})") from error
        parts: list[str | int] = []
        # Text and special tokens alternate.
        for number, piece in enumerate(self._split.split(rendered)):
            if number % 2:
                parts.append(self._ids[piece])
            elif piece:
                parts.append(re.sub("\ufdd0(\\d+)\ufdd1", lambda match: names[int(match[1])], piece))
        return ChatText.of(self._without_ends(parts), self._names)

    def _without_ends(self, parts: list[str | int]) -> list[str | int]:
        """Remove the start and end token that every document gets anyway."""
        if self._bos is not None and parts[:1] == [self._bos]:
            parts = parts[1:]
        if isinstance(parts[-1], str) and not parts[-1].strip() and parts[-2:-1] == [self._eos]:
            parts = parts[:-1]
        return parts[:-1] if parts[-1:] == [self._eos] else parts


def _message(item: Any) -> dict[str, Any]:
    """Return a message of either convention: `role` and `content`, or `from` and `value`."""
    if not isinstance(item, dict):
        raise ValueError("a message is not an object")
    # Columns of Parquet hold a null for each field that a message lacks.
    present = {key: value for key, value in item.items() if value is not None}
    role = present.pop("role", None) or present.pop("from", None)
    content = present.pop("content", None) or present.pop("value", "")
    if not isinstance(role, str) or not isinstance(content, (str, list)):
        raise ValueError("a message has no role or no content")
    return {**present, "role": _ROLES.get(role, role), "content": content}


def _map_text(value: Any, function: Any) -> Any:
    if isinstance(value, str):
        return function(value)
    if isinstance(value, list):
        return [_map_text(item, function) for item in value]
    if isinstance(value, dict):
        return {key: _map_text(item, function) for key, item in value.items()}
    return value


def _raise(message: str) -> None:
    raise ValueError(message)
