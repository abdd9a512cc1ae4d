"""AdamW against Muon at equal tokens: the same model, text, order and schedule, each at its own best rate.

Every point is a whole `pretrain` in a process of its own, on the text that Python carries and on each JSONL
file given. The table shows validation bits per byte; compare the best of each row, for the best rates differ.
An optimum at the edge of the rates is no optimum: widen --rates until it lies inside.

    python benchmarks/optimizers.py --preset tiny --max-tokens 1e6 --data en.jsonl --output results
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

EMBEDDED = "embedded text"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--max-tokens", default="1e6")
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3, 8e-3])
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "muon"])
    parser.add_argument(
        "--data", action="append", default=[], metavar="PATH", help="a JSONL file; repeatable"
    )
    parser.add_argument("--no-embedded", action="store_true", help="leave the text that Python carries out")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--output", metavar="FOLDER", help="write results.json, results.md and a plot there")
    parser.add_argument("extra", nargs="*", help="further options of pretrain, after --")
    options = parser.parse_args()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    corpora = ([] if options.no_embedded else [EMBEDDED]) + options.data
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for corpus in corpora:
            for optimizer in options.optimizers:
                for rate in options.rates:
                    result = train(options, device, corpus, optimizer, rate, Path(folder))
                    results.append(result)
                    shown = {key: value for key, value in result.items() if key != "curve"}
                    print(json.dumps(shown), file=sys.stderr, flush=True)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    title = f"{name}, torch {torch.__version__}, preset {options.preset}, {options.max_tokens} tokens"
    text = title + "\n\n" + table(results, options.rates)
    print(text)
    if options.output:
        out = Path(options.output)
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").write_text(json.dumps({"title": title, "results": results}, indent=1))
        (out / "results.md").write_text(text + "\n")
        plot(results, title, out / "results.png")


def train(
    options: argparse.Namespace, device: str, corpus: str, optimizer: str, rate: float, folder: Path
) -> dict[str, Any]:
    """Run one point and return what it reached."""
    out = Path(tempfile.mkdtemp(dir=folder)) / "run"
    command = [
        *(sys.executable, "-m", "minimind_cli", "pretrain", "--preset", options.preset),
        *("--optimizer", optimizer, "--learning-rate", rate, "--max-tokens", options.max_tokens),
        *("--epochs", 1000, "--tracker", "none", "--log-interval", 10, "--save-interval", 1_000_000),
        *("--output-dir", out, "--cache-dir", folder / "cache"),
        *(() if corpus == EMBEDDED else ("--data", corpus)),
        *options.extra,
    ]
    environment = dict(os.environ)
    if device == "cpu":
        environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    result: dict[str, Any] = {"corpus": corpus, "optimizer": optimizer, "rate": rate}
    file = out / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    curve = [(row["tokens"], row["loss"]) for row in rows if "loss" in row]
    evaluations = [row for row in rows if "val_bits_per_byte" in row]
    if done.returncode:
        # A rate too high for an optimizer is a result as well.
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return result | {"failed": reason, "curve": curve}
    totals = next(row for row in reversed(rows) if "total_tokens_per_second" in row)
    return result | {
        "bits_per_byte": evaluations[-1]["val_bits_per_byte"],
        "val_loss": evaluations[-1]["val_loss"],
        "tokens_per_second": totals["total_tokens_per_second"],
        "curve": curve,
    }


def table(results: list[dict[str, Any]], rates: list[float]) -> str:
    """Return validation bits per byte as a markdown table, the best of each row in bold."""
    head = ["text", "optimizer", *(f"{rate:g}" for rate in rates), "tokens/s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for corpus, optimizer in dict.fromkeys((r["corpus"], r["optimizer"]) for r in results):
        found = [r for r in results if (r["corpus"], r["optimizer"]) == (corpus, optimizer)]
        values = {r["rate"]: r.get("bits_per_byte") for r in found}
        best = min((value for value in values.values() if value is not None), default=None)
        cells = [
            "failed" if value is None else f"**{value:.4f}**" if value == best else f"{value:.4f}"
            for value in (values[rate] for rate in rates)
        ]
        speeds = [r["tokens_per_second"] for r in found if "tokens_per_second" in r]
        speed = f"{max(speeds):,.0f}" if speeds else "-"
        lines.append(f"| {Path(corpus).name} | {optimizer} | {' | '.join(cells)} | {speed} |")
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw training loss over tokens, the best rate of each optimizer; needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = [r for r in results if "bits_per_byte" in r]
    corpora = list(dict.fromkeys(r["corpus"] for r in done))
    _, axes = pyplot.subplots(1, len(corpora), figsize=(5 * len(corpora), 4), squeeze=False)
    for axis, corpus in zip(axes[0], corpora, strict=True):
        for optimizer in dict.fromkeys(r["optimizer"] for r in done):
            here = [r for r in done if (r["corpus"], r["optimizer"]) == (corpus, optimizer)]
            best = min(here, key=lambda r: r["bits_per_byte"])
            tokens, losses = zip(*best["curve"], strict=True)
            axis.plot(tokens, losses, label=f"{optimizer}, {best['rate']:g}")
        axis.set(title=Path(corpus).name, xlabel="tokens", ylabel="training loss")
        axis.legend()
    pyplot.suptitle(title)
    pyplot.tight_layout()
    pyplot.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
