"""Fit the scaling law of `--budget` to the points of benchmarks/scaling_grid.py, and say how far off it is.

The law and its variables are in minimind/evaluation/scaling_law.py. Residuals are logarithms of bits/byte,
with a Huber loss; weak priors hold exponents that few points cannot determine. The error before the start is
that on texts that were left out; the error during a run is that of its evaluations, by share of the run.

    python benchmarks/fit_scaling_law.py grid.jsonl more.jsonl --write      # the law in the package
    python benchmarks/fit_scaling_law.py grid.jsonl --check new_runs.jsonl     # errors of the packaged law
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from minimind.config.recipe import effective_tokens
from minimind.evaluation.scaling_law import LAW, ScalingLaw, packaged_law

# Means and deviations of the priors: E, ln A at N = 1M, a, ln B at D = 1 MB, b, v.
PRIOR = {
    "E": (0.45, 0.15),
    "lnA": (math.log(0.5), 1.0),
    "a": (0.30, 0.08),
    "lnB": (math.log(0.8), 1.0),
    "b": (0.30, 0.08),
    "v": (0.03, 0.02),
}
# A residual of this size costs as much as one deviation of a prior; beyond it the loss is linear.
NOISE = 0.01
REFERENCE = 1e6
SHARES = (0.0, 1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1.0)
SMALLEST_SIGMA = 0.003
# Before the start, where there are too few texts to leave one out.
UNTESTED_SIGMA = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--check", nargs="+", type=Path, default=[], help="runs that the law did not see")
    parser.add_argument(
        "--unigram", nargs="+", default=[], metavar="TEXT=BITS", help="of points without unigram_bits"
    )
    parser.add_argument("--write", action="store_true", help=f"write {LAW.name} of the package")
    options = parser.parse_args()
    known = {name: float(bits) for name, bits in (word.split("=") for word in options.unigram)}
    if options.files:
        points = read(options.files, known)
        law = describe(points)
        print(json.dumps(law, indent=1))
        if options.write:
            LAW.parent.mkdir(exist_ok=True)
            LAW.write_text(json.dumps(law, indent=1) + "\n")
    if options.check:
        law_used = ScalingLaw.from_dict(law) if options.files else packaged_law()
        check(read(options.check, known), law_used)


def read(files: Sequence[Path], known: dict[str, float]) -> list[dict[str, Any]]:
    """Return the points of files, with the bytes that their tokens are worth."""
    points = []
    for file in files:
        for line in file.read_text().splitlines():
            point = json.loads(line)
            if point.get("rate", 1.0) != 1.0 or not math.isfinite(point["bits_per_byte"]):
                continue
            point.setdefault("unigram_bits", known.get(point["text"]))
            point["bytes"] = worth(point, point["tokens"])
            points.append(point)
    return points


def worth(point: dict[str, Any], tokens: float) -> float:
    """Return the bytes of new text that some tokens are worth."""
    return effective_tokens(tokens, point["unique_tokens"]) * point["bytes_per_token"]


def fit(points: Sequence[dict[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the constants of the law, and s of each text; the first text has s = 1."""
    texts = list(dict.fromkeys(point["text"] for point in points))
    names = list(PRIOR)
    theta = torch.tensor([PRIOR[name][0] for name in names], dtype=torch.float64, requires_grad=True)
    scales = torch.zeros(len(texts), dtype=torch.float64, requires_grad=True)
    size, amount, vocabulary, reached = (
        torch.tensor([float(value(point)) for point in points], dtype=torch.float64)
        for value in (
            lambda p: p["block_parameters"] / REFERENCE,
            lambda p: p["bytes"] / REFERENCE,
            lambda p: p["model_vocab"] / 6400,
            lambda p: math.log(p["bits_per_byte"]),
        )
    )
    text = torch.tensor([texts.index(point["text"]) for point in points])
    mean, deviation = (torch.tensor([PRIOR[n][k] for n in names], dtype=torch.float64) for k in (0, 1))
    optimizer = torch.optim.LBFGS(
        [theta, scales], max_iter=2000, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        floor, ln_a, a, ln_b, b, v = theta
        law = floor.clamp(min=0.01) + ln_a.exp() * size**-a + ln_b.exp() * amount**-b
        # s of the first text stays 1: it would be exchangeable with E, A and B.
        free = scales * torch.tensor([0.0] + [1.0] * (len(texts) - 1), dtype=torch.float64)
        residual = (law.log() - v * vocabulary.log() + free[text] - reached) / NOISE
        fitted = torch.nn.functional.huber_loss(residual, torch.zeros_like(residual), reduction="sum")
        total = fitted + 0.5 * (((theta - mean) / deviation) ** 2).sum() + 0.5 * (free / 0.5).square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    values = dict(zip(names, theta.tolist(), strict=True))
    law = {
        "E": max(values["E"], 0.01),
        "A": math.exp(values["lnA"]) * REFERENCE ** values["a"],
        "a": values["a"],
        "B": math.exp(values["lnB"]) * REFERENCE ** values["b"],
        "b": values["b"],
        "v": values["v"],
    }
    found = {name: math.exp(value) for name, value in zip(texts, scales.tolist(), strict=True)}
    found[texts[0]] = 1.0
    return law, found


def relative(law: dict[str, float], point: dict[str, Any], num_bytes: float) -> float:
    """Return L/s of a point after some bytes."""
    reached = law["E"] + law["A"] * point["block_parameters"] ** -law["a"] + law["B"] * num_bytes ** -law["b"]
    return reached * (point["model_vocab"] / 6400) ** -law["v"]


def difficulty(scales: dict[str, float], points: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Return the line from the unigram bits per byte to s; a constant for fewer than three texts."""
    bits = {point["text"]: point["unigram_bits"] for point in points if point["unigram_bits"] is not None}
    texts = [text for text in scales if text in bits]
    x, y = [bits[text] for text in texts], [scales[text] for text in texts]
    if len(texts) < 3:
        return fmean(scales.values()), 0.0
    mean_x, mean_y = fmean(x), fmean(y)
    spread = sum((value - mean_x) ** 2 for value in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / (spread + 0.1)
    return mean_y - slope * mean_x, slope


def describe(points: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the law as the package stores it: constants, errors and provenance."""
    law, scales = fit(points)
    line = difficulty(scales, points)
    residuals = [
        math.log(scales[p["text"]] * relative(law, p, p["bytes"]) / p["bits_per_byte"]) for p in points
    ]
    unseen = left_out(points)
    curve = [on_curve(law, points, share) for share in SHARES]
    devices = sorted({f"{point['device']}, torch {point['torch']}" for point in points})
    return {
        "form": "bits/byte = s (V/6400)^-v (E + A N^-a + B D^-b)",
        **{name: round(value, 6) for name, value in law.items()},
        "difficulty": [round(value, 5) for value in line],
        "sigma": round(max(rms(unseen), UNTESTED_SIGMA if not unseen else SMALLEST_SIGMA), 5),
        "curve": [[round(value, 5) for value in point] for point in curve],
        "texts": {name: round(scale, 4) for name, scale in scales.items()},
        "fit": {
            "points": len(points),
            "rms_log_residual": round(rms(residuals), 5),
            "rms_log_error_of_unseen_texts": round(rms(unseen), 5) if unseen else None,
            "parameters": [min(p["parameters"] for p in points), max(p["parameters"] for p in points)],
            "tokens": [min(p["tokens"] for p in points), max(p["tokens"] for p in points)],
        },
        "provenance": {
            "command": "benchmarks/scaling_grid.py, then benchmarks/fit_scaling_law.py",
            "devices": devices,
            "optimizers": sorted({point.get("optimizer", "muon") for point in points}),
            "dates": sorted({point["date"] for point in points}),
            "fitted": str(datetime.date.today()),
        },
    }


def left_out(points: list[dict[str, Any]]) -> list[float]:
    """Return the errors of log L on each text by a law that was fitted to others of such sizes."""
    errors: list[float] = []
    texts = list(dict.fromkeys(point["text"] for point in points))
    for text in texts if len(texts) > 2 else ():
        others = [point for point in points if point["text"] != text]
        largest = max(point["parameters"] for point in others)
        if any(point["parameters"] > 2 * largest for point in points):
            continue  # that would measure the extrapolation in size
        law, scales = fit(others)
        first, slope = difficulty(scales, others)
        for point in points:
            if point["text"] == text and point["unigram_bits"] is not None:
                scale = first + slope * point["unigram_bits"]
                errors.append(math.log(scale * relative(law, point, point["bytes"]) / point["bits_per_byte"]))
    return errors


def on_curve(law: dict[str, float], points: list[dict[str, Any]], share: float) -> tuple[float, float, float]:
    """Return a share of a run, how far log L lies above the law there, and the deviation of the forecast."""
    if share == 1.0:
        return share, 0.0, SMALLEST_SIGMA
    above = []
    for point in points:
        if not point["evaluations"]:
            continue
        tokens, bits = min(point["evaluations"], key=lambda e: abs(e[0] / point["tokens"] - share))
        done = relative(law, point, worth(point, tokens)) / relative(law, point, point["bytes"])
        above.append(math.log(bits / point["bits_per_byte"] / done))
    mean = fmean(above)
    sigma = rms([value - mean for value in above])
    return share, mean, max(sigma * (2 if share == 0.0 else 1), SMALLEST_SIGMA)


def check(points: list[dict[str, Any]], law: ScalingLaw) -> None:
    """Print the errors of forecasts before the start and at half time, in bits/byte."""
    print("| point | text | bits/byte | before the start | at half time |\n|---|---|---|---|---|")
    errors: list[tuple[float, float]] = []
    for point in points:
        reached, size = point["bits_per_byte"], point["block_parameters"]
        before = law.before_start(size, point["bytes"], point["model_vocab"], point["unigram_bits"])
        half = before
        if point["evaluations"]:
            tokens, bits = min(point["evaluations"], key=lambda e: abs(e[0] / point["tokens"] - 0.5))
            half = law.during(
                size,
                observed=bits,
                bytes_done=worth(point, tokens),
                num_bytes=point["bytes"],
                share=tokens / point["tokens"],
            )
        errors.append((before.bits_per_byte - reached, half.bits_per_byte - reached))
        print(
            f"| {point['point']} V={point['model_vocab']} | {point['text']} | {reached:.4f} "
            f"| {errors[-1][0]:+.4f} | {errors[-1][1]:+.4f} |"
        )
    for name, column in zip(("before the start", "at half time"), zip(*errors, strict=True), strict=True):
        print(f"{name}: rms {rms(column):.4f}, largest {max(map(abs, column)):.4f} bits/byte")


def rms(values: Sequence[float]) -> float:
    return math.sqrt(fmean(value * value for value in values)) if values else 0.0


if __name__ == "__main__":
    main()
