"""Format and parse counts, sizes and durations."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Mapping
from typing import Any, TextIO

# C0 and C1 controls, line and paragraph separators, and the marks that reorder text.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str, keep: str = "") -> str:
    """Return text for a terminal, with control characters escaped, such as `\\x1b`.

    Args:
        text: from a file or a model, which may try to move the cursor, forge lines or reorder text.
        keep: control characters to keep, such as newlines.
    """

    def escape(match: re.Match[str]) -> str:
        code = ord(match[0])
        return match[0] if match[0] in keep else f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"

    return _CONTROLS.sub(escape, text)


def paint(text: str, colour: str, stream: TextIO) -> str:
    """Return text in an ANSI colour (SGR parameters, `31` for red) where a stream is a terminal with colours.

    `NO_COLOR` (https://no-color.org) and `TERM=dumb` ask for none.
    """
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or sys.platform == "win32"
    return text if plain or not stream.isatty() else f"\x1b[{colour}m{text}\x1b[0m"


def json_line(value: Any) -> str:
    """Return JSON in one line in any script, with all control characters escaped as JSON does."""
    line = json.dumps(value, ensure_ascii=False)
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", line)


def option_text(value: Any) -> str:
    """Return the value of an option as tables show it."""
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def count(number: float) -> str:
    """Return a count with three digits, such as `950`, `12.3k` or `1.25G`."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit * 0.9995:
            scaled = number / limit
            digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            return f"{scaled:.{digits}f}{unit}"
    return f"{number:.0f}"


def parse_duration(text: str) -> float:
    """Parse a duration such as `3h30m`, `90m`, `1d12h` or `45s` into seconds.

    Raises:
        ValueError: for anything else.
    """
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip().lower())
    numbers = match.groups() if match is not None else ()
    seconds = sum(
        int(number or 0) * unit for number, unit in zip(numbers, (86400, 3600, 60, 1), strict=False)
    )
    if not seconds:
        raise ValueError(f"{text!r} is not a time such as 3h30m")
    return float(seconds)


def size(num_bytes: float) -> str:
    """Return a number of bytes with three digits, such as `950 B`, `12.3 MB` or `1.25 GB`."""
    digits, unit = re.fullmatch(r"([-\d.]+)(\D?)", count(num_bytes)).groups()  # type: ignore[union-attr]
    return f"{digits} {unit}B"


def parse_size(text: str) -> int:
    """Parse a size such as `5GB`, `500MB`, `2GiB` or `1000000` into bytes.

    Raises:
        ValueError: for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i)?b?|b)?", text.strip().lower())
    if match is None:
        raise ValueError(f"{text!r} is not a size such as 5GB")
    number, unit, binary = match.groups()
    num_bytes = int(float(number) * (1024 if binary else 1000) ** ("kmgt".index(unit) + 1 if unit else 0))
    if num_bytes < 1:
        raise ValueError(f"{text!r} is less than a byte")
    return num_bytes


def duration(seconds: float) -> str:
    """Return a duration in its two largest units, such as `8s`, `3m12s`, `2h05m` or `1d04h`."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(round(seconds), 0)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def format_train_metrics(values: Mapping[str, Any]) -> list[str]:
    """Return the parts of a training report that `values` has."""
    forms = {
        "loss": lambda v: f"loss {v:.4f}",
        "learning_rate": lambda v: f"lr {v:.1e}",
        "tokens_per_second": lambda v: f"{count(v)} tok/s",
        "mfu": lambda v: f"mfu {v:.0%}",
        "memory_gb": lambda v: f"{v:.1f} GB",
        "eta_seconds": lambda v: f"eta {duration(v)}",
        "val_forecast_bits_per_byte": lambda v: f"forecast {v:.3f} bits/byte",
    }
    return [form(values[name]) for name, form in forms.items() if name in values]


def format_evaluation_metrics(values: Mapping[str, Any]) -> list[str]:
    """Return the parts of an evaluation report that `values` has."""
    forms = {
        "val_loss": lambda v: f"val loss {v:.4f}",
        "val_perplexity": lambda v: f"perplexity {v:.4g}",
        "val_bits_per_byte": lambda v: f"{v:.4f} bits/byte",
        "val_forecast_bits_per_byte": lambda v: (
            f"forecast {v:.3f} ({values['val_forecast_low']:.3f} to {values['val_forecast_high']:.3f})"
        ),
    }
    return [form(values[name]) for name, form in forms.items() if name in values]
