"""What a budget of training time buys on three machines: the picture of README.md.

    python benchmarks/budget_curve.py --data train.jsonl --output docs/budget.png

Lines are the forecasts of `--budget` before the start, bands their 90% intervals, from FLOP/s alone: nothing
is trained. Points are runs that were measured (docs/budget.md). A line ends where more epochs over the text
would add nothing. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from minimind.config.budget import Budget
from minimind.config.options import PretrainConfig
from minimind.evaluation.scaling_law import packaged_law
from minimind.planning.candidates import Candidate, Machine, TextSize
from minimind.planning.choice import Chooser
from minimind.planning.text_sample import read_sample, text_size

SHORTEST, LONGEST, POINTS = 20.0, 2 * 3600.0, 25
TICKS = {20: "20 s", 60: "1 min", 300: "5 min", 1200: "20 min", 3600: "1 h", 7200: "2 h"}


class Line(NamedTuple):
    """A machine, and seconds and bits per byte of runs measured on one of this kind."""

    label: str
    machine: Machine
    measured: tuple[tuple[float, float], ...] = ()


# FLOP/s of a large product: measured on the CPU and the H100, 90% of the data sheet of an RTX 4090.
LINES = (
    Line(
        "laptop: two CPU cores",
        Machine("cpu", "CPU", 1, 220e9, 16e9, "no"),
        measured=((60.0, 2.157), (180.0, 1.957)),
    ),
    Line("consumer GPU: RTX 4090", Machine("cuda", "RTX 4090", 1, 150e12, 24e9, "bf16", fused=True)),
    Line(
        "H100 (points: H200)",
        Machine("cuda", "H100", 1, 800e12, 80e9, "bf16", fused=True),
        measured=((19.7, 1.027), (60.1, 0.865)),
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE", help="training text")
    parser.add_argument("--output", type=Path, required=True, metavar="PNG")
    options = parser.parse_args()
    config = PretrainConfig(data=tuple(options.data))
    text = text_size(config, read_sample(config), choose_tokenizer=True)
    lines = {line: curve(line.machine, text) for line in LINES}
    for line, points in lines.items():
        for seconds, best in points:
            size = f"{best.shape.hidden_size:>4} x {best.shape.num_hidden_layers:<3}"
            tokens = f"{best.tokens / 1e6:>7.1f}M tokens"
            print(f"{line.label:<24}{seconds:>7.0f} s  {size}{tokens}  {best.forecast.text} bits/byte")
    draw(lines, f"{text.num_bytes / 1e6:.0f} MB of text", options.output)


def curve(machine: Machine, text: TextSize) -> list[tuple[float, Candidate]]:
    """Return seconds and the best candidate, for budgets up to the first that the text limits."""
    points: list[tuple[float, Candidate]] = []
    for number in range(POINTS):
        seconds = SHORTEST * (LONGEST / SHORTEST) ** (number / (POINTS - 1))
        best = Chooser(Budget(seconds=seconds), text, machine, packaged_law(), {}).ranked()[0]
        points.append((seconds, best))
        if best.limited:
            break
    return points


def draw(lines: dict[Line, list[tuple[float, Candidate]]], title: str, path: Path) -> None:
    """Write the picture."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("the picture needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4))
    for line, points in lines.items():
        seconds = [second for second, _ in points]
        forecasts = [best.forecast for _, best in points]
        (drawn,) = axes.plot(seconds, [f.bits_per_byte for f in forecasts], label=line.label)
        low, high = [f.low for f in forecasts], [f.high for f in forecasts]
        axes.fill_between(seconds, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)
        for second, value in line.measured:
            axes.plot(second, value, "o", color=drawn.get_color())
    axes.set_xscale("log")
    axes.set_xticks(list(TICKS), list(TICKS.values()))
    axes.minorticks_off()
    axes.set(xlabel="--budget: time of training", ylabel="validation bits per byte")
    axes.set_title(f"{title}: forecast (lines) and measured (points)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
