"""Options that say which text a run reads, and how it becomes tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from .schema import FieldInfo


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data"""

    data: Annotated[
        tuple[str, ...],
        FieldInfo(
            "Training data: a .jsonl(.gz), .txt, .parquet or .arrow file, a folder, a glob or "
            "hf://OWNER/NAME. Repeatable; PATH:0.7 sets an entry's share of the training tokens.",
            aliases=("--data-path",),
            metavar="PATH",
            default_text="the documentation built into Python",
            common=True,
        ),
    ] = ()
    val_data: Annotated[
        tuple[str, ...],
        FieldInfo("Validation data, in the same formats as --data. Repeatable.", metavar="PATH", common=True),
    ] = ()
    val_fraction: Annotated[
        float,
        FieldInfo(
            "Fraction of the documents held out for validation, by a hash of their content; unused with "
            "--val-data.",
            minimum=0.0,
            below=1.0,
        ),
    ] = 0.01
    tokenizer: Annotated[
        str | None,
        FieldInfo(
            "A tokenizer.json, or its folder.",
            metavar="PATH",
            default_text="the built-in tokenizer",
            common=True,
        ),
    ] = None
    text_key: Annotated[str, FieldInfo("JSON key or column of the text, or of conversations (messages).")] = (
        "text"
    )
    max_seq_len: Annotated[int, FieldInfo("Sequence length in tokens.", minimum=2, common=True)] = 512
    packing: Annotated[
        bool,
        FieldInfo("Concatenate documents into full sequences; off: one document each, padded or truncated."),
    ] = True
    cache_dir: Annotated[
        str | None,
        FieldInfo("Folder of the token cache.", metavar="FOLDER", default_text="~/.cache/minimind"),
    ] = None
    bad_lines: Annotated[
        Literal["error", "skip"], FieldInfo("Stop at an invalid line, or skip and count it.")
    ] = "error"
