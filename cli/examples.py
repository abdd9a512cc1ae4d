"""Examples at the end of `--help`.

A command is registered with `epilog=examples(name)`. An example is a complete command line of at most 92
characters. Tests check its options.
"""

from __future__ import annotations

from collections.abc import Mapping

EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "": (
        "minimind-train pretrain",
        "minimind-train pretrain --data corpus.jsonl --output-dir runs/mine",
        "minimind-train pretrain --help",
    ),
    "pretrain": (
        "minimind-train pretrain --data corpus.jsonl --output-dir runs/mine",
        "minimind-train pretrain --data web:0.8 --data code:0.2 --preset minimind-3 --max-tokens 2e9",
        "minimind-train pretrain --data corpus.jsonl --budget 30m --plan",
        "minimind-train pretrain --config runs/mine/config.toml --seed 7 --output-dir runs/seed7",
        "minimind-train pretrain --resume --output-dir runs/mine",
        "minimind-train pretrain --preset 350m --data corpus.jsonl --plan --price-per-hour 2.5",
        "minimind-train pretrain --preset 350m --data corpus.jsonl --plan --num-processes 64",
        "accelerate launch -m minimind_cli pretrain --data corpus.jsonl --preset minimind-3",
    ),
    "decay": (
        "minimind-train decay runs/trunk --tokens 1e8",
        "minimind-train decay runs/trunk --from-step 20000 --tokens 4e8 --output-dir runs/20k",
    ),
    "bench": (
        "minimind-train bench --preset minimind-3",
        "minimind-train bench --preset 350m --batch-size 8 --activation-checkpointing --seconds 30",
        "minimind-train bench --config runs/mine/config.toml --json",
    ),
    "tokenize": (
        "minimind-train tokenize --data corpus.jsonl",
        "minimind-train tokenize --data corpus/ --tokenizer runs/tokenizer --cache-dir /fast/disk",
    ),
    "info": ("minimind-train info runs/mine", "minimind-train info runs/mine/model --json"),
    "compare": (
        "minimind-train compare runs/a runs/b",
        "minimind-train compare runs/* --html comparison.html",
    ),
    "reproduce": ("minimind-train reproduce runs/mine", "minimind-train reproduce runs/mine --check-data"),
    "checkpoints": (
        "minimind-train checkpoints runs/mine",
        "minimind-train checkpoints runs/mine --no-verify",
    ),
    "export": (
        "minimind-train export runs/mine --output mine-hf",
        "minimind-train export runs/mine --format gguf --dtype q8_0 --output mine-gguf",
        "minimind-train export pretrain_768.pth --output from-the-original",
    ),
    "generate": (
        "minimind-train generate runs/mine 'Once upon a time' --temperature 0.7 --top-p 0.9",
        "minimind-train generate runs/mine 'One' 'Two' --max-new-tokens 50 --seed 1 --json",
        "minimind-train generate runs/mine",
    ),
    "eval": (
        "minimind-train eval runs/mine --data held_out.jsonl",
        "minimind-train eval runs/mine --data web.jsonl --data code.jsonl --no-packing --json",
    ),
    "verify-resume": (
        "minimind-train verify-resume --preset tiny",
        "minimind-train verify-resume --config runs/mine/config.toml --steps 20 --processes 2",
    ),
    "tokenizer": (
        "minimind-train tokenizer train --data corpus.jsonl --output-dir runs/tokenizer",
        "minimind-train tokenizer inspect runs/tokenizer",
    ),
    "tokenizer train": (
        "minimind-train tokenizer train --data corpus.jsonl --output-dir runs/tokenizer",
        "minimind-train tokenizer train --data corpus/ --vocab-size 32000",
    ),
    "tokenizer inspect": (
        "minimind-train tokenizer inspect",
        'minimind-train tokenizer inspect runs/tokenizer --text "How is this split?"',
    ),
}


def examples(command: str) -> str:
    """Return the examples of a command, one per line."""
    return "\n".join(EXAMPLES[command])
