"""The files of a tokenizer: reading, chat template and start token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..io.reading import parse_json, read_bytes

PACKAGED = Path(__file__).parents[1] / "assets" / "tokenizer"
"""Folder of the tokenizer in the package."""

FIX = (
    "Pass a tokenizer.json or its folder; transformers writes it with "
    "AutoTokenizer.from_pretrained(...).save_pretrained(folder)."
)
_CHAT_TEMPLATE = "chat_template.jinja"


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        ConfigError: when the file cannot be read or holds anything else.
    """
    try:
        content = parse_json(read_bytes(file).decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"--tokenizer: cannot read {file} ({error.strerror}). {FIX}") from error
    except ValueError as error:
        raise ConfigError(f"--tokenizer {file} is not JSON ({error}). {FIX}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--tokenizer {file} is not a JSON object. {FIX}")
    return content


@contextmanager
def no_panic(name: str) -> Iterator[None]:
    """Raise ConfigError for a panic of the Rust extension, which is no Exception.

    Its report on stderr ("thread ... panicked") comes first. Redirecting the file descriptor meanwhile would
    also hide what other threads and a crash write there.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ConfigError(
            f"{name}: its rules fail on this text ({error}); correct its pre-tokenizer pattern "
            "or choose another."
        ) from error


def template_beside(file: Path) -> str | None:
    """Return the chat template from the separate file that transformers 5 writes, or None."""
    template = file.with_name(_CHAT_TEMPLATE)
    try:
        return read_bytes(template).decode("utf-8-sig")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--tokenizer: cannot read {template} ({error}); save it as UTF-8 text.") from error


@cache
def chatml_template() -> str:
    """Return the chat template for tokenizers whose start and end token are those of ChatML."""
    return (PACKAGED / _CHAT_TEMPLATE).read_text(encoding="utf-8")


def with_start_token(rules: Mapping[str, Any], token: str, id: int) -> dict[str, Any]:
    """Return the content of a `tokenizer.json` that begins each encoded text with a start token."""
    start, first = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    added = {
        "type": "TemplateProcessing",
        "single": [start, first],
        "pair": [start, first, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    }
    before = rules.get("post_processor")
    after = added if before is None else {"type": "Sequence", "processors": [before, added]}
    return {**rules, "post_processor": after}


def without_start_token(rules: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a `tokenizer.json` without what `with_start_token` added.

    The fingerprint covers the rules without it: folders written before it was added have the same one. Other
    programs that add a start token repeat it in the second text of a pair, so their rules stay.
    """
    processor = rules.get("post_processor") or {}
    if _adds_start_token(processor):
        return {**rules, "post_processor": None}
    parts = processor.get("processors", [])
    if processor.get("type") == "Sequence" and len(parts) == 2 and _adds_start_token(parts[1]):
        return {**rules, "post_processor": parts[0]}
    return dict(rules)


def _adds_start_token(processor: Mapping[str, Any]) -> bool:
    names = list(processor.get("special_tokens", {}))
    if processor.get("type") != "TemplateProcessing" or len(names) != 1:
        return False
    (id,) = processor["special_tokens"][names[0]]["ids"]
    return bool(processor == with_start_token({}, names[0], id)["post_processor"])
