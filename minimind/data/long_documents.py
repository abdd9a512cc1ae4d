"""Cut long documents where no tokenizer rule joins what is before and after, so that ids stay the same.

The tokenizers library needs about 165 bytes of memory per byte of text, so a long document is encoded in
pieces. Cuts are before a space, after a single line end and before punctuation, and only for pre-tokenizers
that are known to split there. Other tokenizers encode each document as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

PIECE_CHARACTERS = 1 << 16

# Words of the scripts that every Unicode version of every regular-expression engine knows as letters.
_LETTER = "A-Za-z\u0410-\u044f\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
# Before a space that follows a visible character: no known rule joins these two.
_SPACE = r"(?<=[^\s\x1c-\x1f])(?= )"
# After a single line end between visible characters; before punctuation after a letter, except apostrophes.
_LINE = rf"(?<=[^\s\x1c-\x1f]\n)(?=[{_LETTER}])"
_PUNCTUATION = rf"(?<=[{_LETTER}])(?=[,.;:!?()\uff0c\u3002\u3001\uff1b\uff1a\uff1f\uff01\uff08\uff09])"
# Patterns of GPT-4 (cl100k), Llama 3 and Qwen2: contractions, letters, numbers, marks, white space.
_KNOWN_PATTERN = re.compile(
    r"\(\?i:'s\|'t\|'re\|'ve\|'m\|'ll\|'d\)\|\[\^\\r\\n\\p\{L\}\\p\{N\}\]\?\\p\{L\}\+\|\\p\{N\}(\{1,3\})?"
    r"\| \?\[\^\\s\\p\{L\}\\p\{N\}\]\+\[\\r\\n\]\*\|\\s\*\[\\r\\n\]\+\|\\s\+\(\?!\\S\)\|\\s\+"
)
_LOCAL_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer", "Nmt"}
_WORDS = {"Whitespace", "BertPreTokenizer"}
_NEUTRAL = {"Digits", "Punctuation"}


def cut_pattern(rules: Mapping[str, Any]) -> re.Pattern[str] | None:
    """Return where text may be cut for the rules of a `tokenizer.json`, or None if that is not known."""
    if not all(
        part.get("type") in _LOCAL_NORMALIZERS for part in _parts(rules.get("normalizer"), "normalizers")
    ):
        return None
    for token in rules.get("added_tokens") or ():
        # A token that contains or takes white space could be matched across a cut.
        joins = token.get("lstrip") or token.get("rstrip") or any(map(str.isspace, token["content"]))
        if not token.get("special") and joins:
            return None
    cuts: set[str] = set()
    pre_tokenizers = _parts(rules.get("pre_tokenizer"), "pretokenizers")
    for part in pre_tokenizers:
        kind = part.get("type")
        if kind in _WORDS or (kind == "ByteLevel" and part.get("use_regex", True)) or _splits_as_known(part):
            cuts |= {_SPACE, _LINE, _PUNCTUATION}
        elif kind == "WhitespaceSplit":
            cuts |= {_SPACE, _LINE}
        elif kind == "Metaspace" and part.get("split", True):
            cuts.add(_SPACE)
        elif kind not in _NEUTRAL and kind != "ByteLevel":
            return None
    if any(part.get("add_prefix_space") or part.get("type") == "Metaspace" for part in pre_tokenizers):
        cuts &= {_SPACE}  # elsewhere the next piece would begin with a space that the text does not have
    return re.compile("|".join(sorted(cuts))) if cuts else None


def pieces(text: str, cut: re.Pattern[str] | None, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Yield the pieces of a document, each at least `size` characters except the last."""
    start = 0
    while cut is not None and (found := cut.search(text, start + size)) is not None:
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]


def _parts(rule: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    if rule is None:
        return []
    return list(rule[name]) if rule.get("type") == "Sequence" else [rule]


def _splits_as_known(part: Mapping[str, Any]) -> bool:
    return (
        part.get("type") == "Split"
        and not part.get("invert")
        and part.get("behavior") == "Isolated"
        and _KNOWN_PATTERN.fullmatch(part.get("pattern", {}).get("Regex", "")) is not None
    )
