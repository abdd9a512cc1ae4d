"""Fit the scaling law of `--budget` to the points of benchmarks/scaling_grid.py, and say how far off it is.

The law and its variables are in minimind/evaluation/scaling_law.py. Residuals are logarithms of bits/byte,
with a Huber loss; weak priors hold what few points cannot determine. The difficulty of each data set may
differ from its bits of a bigram model, by less than a percent.

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

import numpy as np
import torch

from minimind.config.recipe import effective_parameters, effective_tokens, useful_tokens
from minimind.evaluation.scaling_law import LAW, TYPICAL, Difficulty, ScalingLaw, packaged_law

# Means and deviations of the priors: E, ln A at N = 1M, a, ln B at D = 1 MB, b, v, ln U. No run of a minute
# comes near E; that of Hoffmann et al. is a quarter of what a bigram model reaches.
PRIOR = {
    "E": (0.12, 0.04),
    "lnA": (-0.7, 1.0),
    "a": (0.30, 0.15),
    "lnB": (0.7, 1.0),
    "b": (0.40, 0.15),
    "v": (0.04, 0.02),
    "lnU": (0.3, 0.5),
}
# Deviations of the difficulty over that by its bigrams, in logarithms, and where these are unknown. Between
# texts it is 0.02, but a forecast for another text has no such factor: with a smaller one here the error of
# texts that are left out is smaller.
DIFFICULTY, UNKNOWN_DIFFICULTY = 0.005, 0.5
# A residual of this size costs as much as one deviation of a prior; beyond it the loss is linear.
NOISE = 0.01
REFERENCE = 1e6
SHARES = (0.0, 1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1.0)
# Smallest deviations: of log L before the start, and in bits/byte during a run.
SMALLEST_SIGMA, SMALLEST_SIGMA_DURING = 0.02, 0.003


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--check", nargs="+", type=Path, default=[], help="runs that the law did not see")
    parser.add_argument(
        "--difficulty", nargs="+", default=[], metavar="TEXT=BITS,SLOPE", help="of points without it"
    )
    parser.add_argument("--write", action="store_true", help=f"write {LAW.name} of the package")
    options = parser.parse_args()
    known = {
        name: tuple(map(float, values.split(",")))
        for name, values in (word.split("=") for word in options.difficulty)
    }
    if options.files:
        points = read(options.files, known)
        values = describe(points)
        print(json.dumps(values, indent=1))
        if options.write:
            LAW.parent.mkdir(exist_ok=True)
            LAW.write_text(json.dumps(values, indent=1) + "\n")
    if options.check:
        law = ScalingLaw.from_dict(values) if options.files else packaged_law()
        for name, found in errors(read(options.check, known), law).items():
            print(f"{name}: rms {rms(found):.4f}, largest {max(map(abs, found)):.4f} bits/byte")


def read(files: Sequence[Path], known: dict[str, tuple[float, ...]]) -> list[dict[str, Any]]:
    """Return the points of files, with effective parameters and the bytes that their tokens are worth."""
    points = []
    for file in files:
        for line in file.read_text().splitlines():
            point = json.loads(line)
            if point.get("rate", 1.0) != 1.0 or not math.isfinite(point["bits_per_byte"]):
                continue
            difficulty = known.get(point["text"], point.get("difficulty"))
            point["difficulty"] = Difficulty(*difficulty) if difficulty else None
            useful = useful_tokens(point["tokens"], point.get("batch", 0), point["unique_tokens"])
            point["bytes"] = worth(point, useful)
            point["effective_parameters"] = effective_parameters(
                point["block_parameters"], point["unique_tokens"]
            )
            points.append(point)
    return points


def worth(point: dict[str, Any], tokens: float) -> float:
    """Return the bytes of new text that some tokens are worth."""
    return effective_tokens(tokens, point["unique_tokens"]) * point["bytes_per_token"]


def fit(points: Sequence[dict[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the constants of the law, and the difficulty of each data set over that by its bigrams."""
    sets = list(dict.fromkeys(point["text"] for point in points))
    known = {point["text"] for point in points if point["difficulty"]}
    names = list(PRIOR)
    theta = torch.tensor([PRIOR[name][0] for name in names], dtype=torch.float64, requires_grad=True)
    free = torch.zeros(len(sets), dtype=torch.float64, requires_grad=True)
    size, amount, vocabulary, reached = (
        torch.tensor([float(value(point)) for point in points], dtype=torch.float64)
        for value in (
            lambda p: p["effective_parameters"] / REFERENCE,
            lambda p: p["bytes"] / REFERENCE,
            lambda p: p["model_vocab"] / 6400,
            lambda p: math.log(p["bits_per_byte"] / (p["difficulty"] or TYPICAL).at(p["bytes"])),
        )
    )
    index = torch.tensor([sets.index(point["text"]) for point in points])
    mean, deviation = (torch.tensor([PRIOR[n][k] for n in names], dtype=torch.float64) for k in (0, 1))
    spread = torch.tensor(
        [DIFFICULTY if name in known else UNKNOWN_DIFFICULTY for name in sets], dtype=torch.float64
    )
    optimizer = torch.optim.LBFGS(
        [theta, free], max_iter=2000, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        floor, ln_a, a, ln_b, b, v, ln_u = theta
        power_law = floor.clamp(min=0.01) + ln_a.exp() * size**-a + ln_b.exp() * amount**-b
        law = 1 / ((-ln_u).exp() + 1 / power_law)
        residual = (law.log() - v * vocabulary.log() + free[index] - reached) / NOISE
        fitted = torch.nn.functional.huber_loss(residual, torch.zeros_like(residual), reduction="sum")
        prior = ((theta - mean) / deviation).square().sum() + (free / spread).square().sum()
        total = fitted + prior / 2
        total.backward()
        return total

    for _ in range(3):  # a line search may end early
        optimizer.step(loss)
    values = dict(zip(names, theta.tolist(), strict=True))
    law = {
        "U": math.exp(values["lnU"]),
        "E": max(values["E"], 0.01),
        "A": math.exp(values["lnA"]) * REFERENCE ** values["a"],
        "a": values["a"],
        "B": math.exp(values["lnB"]) * REFERENCE ** values["b"],
        "b": values["b"],
        "v": values["v"],
    }
    return law, {name: math.exp(value) for name, value in zip(sets, free.tolist(), strict=True)}


def describe(points: list[dict[str, Any]], *, errors_too: bool = True) -> dict[str, Any]:
    """Return the law as the package stores it: constants, errors and provenance."""
    constants, ratios = fit(points)
    values: dict[str, Any] = {
        "form": "bits/byte = s (V/6400)^-v / (1/U + 1/(E + A N^-a + B D^-b))",
        **{name: round(value, 6) for name, value in constants.items()},
        "sigma": SMALLEST_SIGMA,
        **{"g": gain_slope(points), "curve": [[1.0, 0.0, SMALLEST_SIGMA_DURING]]},
    }
    law = ScalingLaw.from_dict(values)
    values["curve"] = [[round(value, 5) for value in on_curve(law, points, share)] for share in SHARES]
    if not errors_too:
        return values
    residuals = [math.log(ratios[p["text"]]) + log_error(law, p) for p in points]
    before, half = left_out(points)
    values["sigma"] = round(max(rms(before), SMALLEST_SIGMA), 5)
    return values | {
        "texts": {
            name: {
                "difficulty": next(
                    p["difficulty"] and p["difficulty"][:2] for p in points if p["text"] == name
                ),
                "over_it": round(ratio, 4),
            }
            for name, ratio in ratios.items()
        },
        "fit": {
            "points": len(points),
            "rms_log_residual": round(rms(residuals), 5),
            "rms_log_error_of_texts_left_out": round(rms(before), 5),
            "rms_error_at_half_time_of_texts_left_out": round(rms(half), 5),
            "parameters": [min(p["parameters"] for p in points), max(p["parameters"] for p in points)],
            "tokens": [min(p["tokens"] for p in points), max(p["tokens"] for p in points)],
        },
        "provenance": {
            "command": "benchmarks/scaling_grid.py, then benchmarks/fit_scaling_law.py",
            "devices": sorted({f"{point['device']}, torch {point['torch']}" for point in points}),
            "optimizers": sorted({point.get("optimizer", "muon") for point in points}),
            "dates": sorted({point["date"] for point in points}),
            "fitted": str(datetime.date.today()),
        },
    }


def log_error(law: ScalingLaw, point: dict[str, Any]) -> float:
    """Return the error of log L before the start."""
    scale = (point["difficulty"] or TYPICAL).at(point["bytes"])
    relative = law.relative(point["effective_parameters"], point["bytes"], point["model_vocab"])
    return math.log(scale * relative / point["bits_per_byte"])


def left_out(points: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Return the errors on each data set of a law fitted without it: of log L, and at half time in bits."""
    before: list[float] = []
    half: list[float] = []
    for name in dict.fromkeys(point["text"] for point in points if point["difficulty"]):
        others = [point for point in points if point["text"] != name]
        law = ScalingLaw.from_dict(describe(others, errors_too=False))
        for point in points:
            if point["text"] == name:
                before.append(log_error(law, point))
                half += [error for error in [half_time_error(law, point)] if error is not None]
    return before, half


def finished(point: dict[str, Any]) -> float:
    """Return the final bits/byte on the documents of the evaluations on the way, which may be fewer."""
    tokens, bits = point["evaluations"][-1]
    return bits if tokens > 0.97 * point["tokens"] else point["bits_per_byte"]


def evaluation(point: dict[str, Any], share: float) -> float:
    """Return the bits/byte at a share of the run, between the evaluations on the way."""
    tokens, bits = zip(*point["evaluations"], strict=True)
    return float(np.interp(share * point["tokens"], tokens, bits))


def gain_slope(points: list[dict[str, Any]]) -> float:
    """Return g of `ScalingLaw.gain`, from what the second half of the runs gained."""
    known = [point for point in points if point["evaluations"]]
    rows = [[1.0, -math.log(worth(p, p["tokens"]) / p["block_parameters"])] for p in known]
    gained = [[evaluation(point, 0.5) - finished(point)] for point in known]
    inputs, outputs = (torch.tensor(values, dtype=torch.float64) for values in (rows, gained))
    d, dg = torch.linalg.lstsq(inputs, outputs).solution.flatten().tolist()
    return round(dg / d, 5)


def on_curve(law: ScalingLaw, points: list[dict[str, Any]], share: float) -> tuple[float, float, float]:
    """Return a share of a run, d of `ScalingLaw.gain` there, and the deviation of the forecast."""
    if share == 1.0:
        return share, 0.0, SMALLEST_SIGMA_DURING
    known = [point for point in points if point["evaluations"]]
    expected = [law.gain(p["block_parameters"], worth(p, p["tokens"])) for p in known]
    gained = [evaluation(point, share) - finished(point) for point in known]
    d = sum(a * b for a, b in zip(expected, gained, strict=True)) / sum(a * a for a in expected)
    sigma = rms([d * a - b for a, b in zip(expected, gained, strict=True)])
    return share, d, max(sigma * (2 if share == 0.0 else 1), SMALLEST_SIGMA_DURING)


def half_time_error(law: ScalingLaw, point: dict[str, Any]) -> float | None:
    """Return the error of the forecast from the evaluation at half time; None without one."""
    if not point["evaluations"]:
        return None
    forecast = law.during(
        point["block_parameters"],
        observed=evaluation(point, 0.5),
        num_bytes=worth(point, point["tokens"]),
        share=0.5,
    )
    return forecast.bits_per_byte - finished(point)


def errors(points: list[dict[str, Any]], law: ScalingLaw) -> dict[str, list[float]]:
    """Return the errors of forecasts in bits/byte, by when they are made, and print a table of them."""
    print("| point | text | bits/byte | before the start | at half time |\n|---|---|---|---|---|")
    found: dict[str, list[float]] = {"before the start": [], "at half time": []}
    for point in points:
        reached = point["bits_per_byte"]
        before = reached * math.expm1(log_error(law, point)) if point["difficulty"] else None
        half = half_time_error(law, point)
        for name, error in zip(found, (before, half), strict=True):
            found[name] += [error] if error is not None else []
        shown = " | ".join(f"{error:+.4f}" if error is not None else "" for error in (before, half))
        print(f"| {point['point']} V={point['model_vocab']} | {point['text']} | {reached:.4f} | {shown} |")
    return found


def rms(values: Sequence[float]) -> float:
    return math.sqrt(fmean(value * value for value in values)) if values else 0.0


if __name__ == "__main__":
    main()
