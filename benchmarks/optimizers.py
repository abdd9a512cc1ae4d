"""AdamW against Muon at equal tokens: one model, text and order, many learning rates and schedules.

First each optimizer gets every rate of --rates with the schedule of the preset, for each of --warmups; a rate
below or above follows while the best one is the first or the last, for an optimum at the edge is none. Then
each optimizer tries the --variants at its best rate and warm-up. All points share one model and its compiled
code: the weights are put back to the same beginning. Compare validation bits per byte.

A variant is options of pretrain, such as lr_schedule=wsd,min_lr_ratio=0, with warmup_steps=10% as a share of
all steps; or one of what pretrain has no option for: embedding_lr=3 multiplies the learning rate of the
embedding and the norms, zero_init=1 begins with zeros in the matrices that write to the residual stream.

    python benchmarks/optimizers.py --preset minimind2-small --data en.jsonl zh.jsonl --output results
    python benchmarks/optimizers.py --set hidden_size=64 --warmups 2% 10% 30% --seed 1 --variants
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pretrain_throughput import write_corpus

from minimind import PretrainConfig
from minimind.config.presets import PRESETS, preset_config
from minimind.config.schema import parse_values
from minimind.data.batch_plan import BatchPlan
from minimind.data.loader import Loader, StepBatch, evaluation_batches
from minimind.data.prepare import prepare_data
from minimind.distributed.accelerator import start_accelerator, wants_compile
from minimind.evaluation.validation import evaluate
from minimind.modeling.transformer import MiniMindForCausalLM
from minimind.optim.build import build_optimizer, fit_to_horizon, set_schedule
from minimind.schedule import LearningRateSchedule
from minimind.tokenizer import load_tokenizer
from minimind.training.build_model import build_model, resolve_model_config
from minimind.training.step import forward_loss

RATES = {
    "normuon": (2e-3, 4e-3, 8e-3),
    "muon": (2e-3, 4e-3, 8e-3),
    "adamw": (2.5e-4, 5e-4, 1e-3),
}
VARIANTS = (
    "lr_schedule=linear,min_lr_ratio=0",
    "lr_schedule=wsd,min_lr_ratio=0",
    "warmup_steps=10%",
    "embedding_lr=3",
    "embedding_lr=10",
    "zero_init=1",
    "weight_decay=0.01",
)
WRITING = ("o_proj.weight", "down_proj.weight")
# Points of a training curve.
REPORTS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", default="tiny", choices=PRESETS)
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="PATH", help="JSONL beside the text in Python"
    )
    parser.add_argument("--no-embedded", action="store_true", help="leave the text in Python out")
    parser.add_argument("--max-tokens", type=float, default=10e6, help="of each point")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-seq-len", type=int, help="default: the preset's")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="options of pretrain")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and the order")
    parser.add_argument("--optimizers", nargs="+", default=["muon", "adamw"], choices=RATES)
    parser.add_argument(
        "--rates", nargs="+", type=float, help="for all optimizers; default: for each its own"
    )
    parser.add_argument(
        "--warmups", nargs="+", default=[""], metavar="SHARE", help="such as 10%%; default: the preset's"
    )
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), metavar="NAME=VALUE[,NAME=VALUE]")
    parser.add_argument("--widen", type=int, default=2, help="further rates while the best is at the edge")
    parser.add_argument("--minutes", type=float, default=6.0, help="begin no point that would end later")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--output", metavar="FOLDER", help="write optimizers.json, .md and .png there")
    options = parser.parse_args()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, device, Path(folder))
        name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        title = (
            f"{name}, torch {torch.__version__}, {datetime.date.today()}; {options.preset}, "
            f"{bench.total_steps:,} steps of {bench.config.batch_size} x {bench.config.max_seq_len}, "
            f"{bench.epochs:.1f} epochs"
        )
        out = Path(options.output) if options.output else None
        results = sweep(bench, options, lambda points: write(points, title, out))
    print(f"{title}\n\n{table(results)}")
    if out is not None:
        plot(results, title, out / "optimizers.png")


def write(results: list[dict[str, Any]], title: str, out: Path | None) -> None:
    """Write the points so far."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "optimizers.json").write_text(json.dumps({"title": title, "results": results}, indent=1))
        (out / "optimizers.md").write_text(f"{title}\n\n{table(results)}\n")


class Bench:
    """A model that is trained again and again from the same weights on the same sequences."""

    def __init__(self, options: argparse.Namespace, device: str, folder: Path) -> None:
        self.began = time.perf_counter()
        sizes = {} if options.max_seq_len is None else {"max_seq_len": options.max_seq_len}
        data = [*options.data] + ([] if options.no_embedded else [write_corpus(folder / "embedded.jsonl")])
        tokenizer = load_tokenizer(None)
        config = preset_config(
            options.preset,
            data=tuple(data),
            val_fraction=0.05,
            cache_dir=str(folder / "cache"),
            batch_size=options.batch_size,
            seed=options.seed,
            **sizes,
        )
        config = _changed(config, dict(word.split("=") for word in options.set), 1)
        self.config, shape = resolve_model_config(config, tokenizer)
        text = prepare_data(self.config, tokenizer)
        assert text.validation is not None
        if device == "cpu":
            os.environ["ACCELERATE_USE_CPU"] = "true"
        self.accelerator = start_accelerator(self.config)
        device_type = self.accelerator.device
        self.bare: MiniMindForCausalLM = build_model(self.config, shape)
        self.compiled = wants_compile(self.config, self.accelerator)
        if self.compiled:
            self.bare.compile_for_training("whole")
        self.start = {name: value.clone() for name, value in self.bare.state_dict().items()}
        self.model = self.accelerator.prepare_model(self.bare)
        self.loader = Loader(
            text.train,
            seq_len=self.config.max_seq_len,
            packing=True,
            plan=BatchPlan(options.batch_size, 1, 1),
            seed=options.seed,
            process_index=0,
            device=device_type,
        )
        self.total_steps = max(int(options.max_tokens / options.batch_size / self.config.max_seq_len), 2)
        self.epochs = self.total_steps / self.loader.steps_per_epoch
        self._held_out = lambda: evaluation_batches(
            text.validation,
            seq_len=self.config.max_seq_len,
            packing=True,
            batch_size=options.batch_size,
            process_index=0,
            num_processes=1,
            device=device_type,
        )
        table = torch.zeros(shape.vocab_size)
        table[: tokenizer.vocab_size] = torch.from_numpy(tokenizer.bytes_per_token())
        self._bytes_per_token = table.to(device_type)

    def train(
        self, config: PretrainConfig, *, embedding_lr: float = 1.0, zero_init: bool = False
    ) -> dict[str, Any]:
        """Train from the beginning and return what came of it."""
        began = time.perf_counter()
        self.bare.load_state_dict(self.start)
        self.model.train()
        if zero_init:
            with torch.no_grad():
                for name, parameter in self.bare.named_parameters():
                    if name.endswith(WRITING):
                        parameter.zero_()
        optimizer = build_optimizer(self.bare, config, self.accelerator.device, kernels=self.compiled)
        fit_to_horizon(optimizer, self.total_steps, self.epochs)
        embedding = self.bare.get_input_embeddings().weight
        for group in optimizer.param_groups:
            if any(parameter is embedding for parameter in group["params"]):
                group["lr_scale"] = embedding_lr * group.get("lr_scale", 1.0)
        rate = LearningRateSchedule(config, self.total_steps).at
        losses: list[torch.Tensor] = []
        for step, batch in zip(range(self.total_steps), self._steps(), strict=False):
            set_schedule(optimizer, rate(step), step)
            (micro_batch,) = batch.micro_batches
            loss = forward_loss(self.model, micro_batch) / max(batch.num_targets, 1)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.bare.parameters(), config.grad_clip or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        curve = torch.stack(losses).tolist()
        result = evaluate(self.model, self._held_out(), self._bytes_per_token, self.accelerator)
        assert result is not None
        every = max(self.total_steps // REPORTS, 1)
        tokens = self.config.batch_size * self.config.max_seq_len
        return {
            "bits_per_byte": result.bits_per_byte if math.isfinite(result.bits_per_byte) else None,
            "val_loss": result.loss if math.isfinite(result.loss) else None,
            "seconds": time.perf_counter() - began,
            "curve": [
                (tokens * (first + every), sum(curve[first : first + every]) / every)
                for first in range(0, self.total_steps - every + 1, every)
            ],
        }

    def _steps(self) -> Iterator[StepBatch]:
        for batch in self.loader.steps(0, epochs=None):
            # The last step of an epoch is short: its empty sequences would weigh as much as the others.
            if batch.num_sequences == self.config.batch_size:
                yield batch


def sweep(
    bench: Bench, options: argparse.Namespace, written: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Return all points: the rates of each optimizer, then the variants at its best.

    Those so far are handed to `written` after each, so that a sweep that is cut short leaves something.
    """
    results: list[dict[str, Any]] = []
    deadline = bench.began + 60 * options.minutes

    def point(optimizer: str, rate: float, warmup: str, variant: str = "") -> float:
        """Return bits per byte, infinite for a run that diverged or had no time."""
        took = max((result["seconds"] for result in results[1:]), default=0.0)
        if time.perf_counter() + took > deadline:
            print(f"no time for {optimizer} {rate:g} {variant}", file=sys.stderr, flush=True)
            return math.inf
        changes = dict(word.split("=") for word in variant.split(",") if word)
        embedding_lr = float(changes.pop("embedding_lr", 1))
        zero_init = changes.pop("zero_init", "0") == "1"
        warmups = {"warmup_steps": warmup} if warmup else {}
        values = {"optimizer": optimizer, "learning_rate": rate, **warmups, **changes}
        config = _changed(bench.config, values, bench.total_steps)
        name = f"{optimizer}, warm-up {warmup}" if warmup else optimizer
        result: dict[str, Any] = {"optimizer": name, "rate": rate, "variant": variant}
        result |= bench.train(config, embedding_lr=embedding_lr, zero_init=zero_init)
        results.append(result)
        written(results)
        shown = {key: value for key, value in result.items() if key != "curve"}
        print(json.dumps(shown), file=sys.stderr, flush=True)
        return result["bits_per_byte"] or math.inf

    best: dict[str, tuple[float, str]] = {}
    for optimizer in options.optimizers:
        everything: dict[tuple[float, str], float] = {}
        for warmup in options.warmups:
            found = {rate: point(optimizer, rate, warmup) for rate in options.rates or RATES[optimizer]}
            for _ in range(options.widen):
                lowest = min(found, key=found.__getitem__)
                if math.isinf(found[lowest]) or lowest not in (min(found), max(found)):
                    break
                further = lowest / 2 if lowest == min(found) else lowest * 2
                found[further] = point(optimizer, further, warmup)
            everything |= {(rate, warmup): value for rate, value in found.items()}
        best[optimizer] = min(everything, key=everything.__getitem__)
    for variant in options.variants:
        for optimizer in options.optimizers:
            point(optimizer, *best[optimizer], variant)
    return results


def _changed(config: PretrainConfig, values: dict[str, Any], total_steps: int) -> PretrainConfig:
    for name, value in values.items():
        if isinstance(value, str) and value.endswith("%"):
            values[name] = round(float(value.removesuffix("%")) / 100 * total_steps)
    parsed, problems = parse_values(PretrainConfig, values)
    if problems:
        sys.exit("\n".join(problems))
    return dataclasses.replace(config, **parsed)


def table(results: list[dict[str, Any]]) -> str:
    """Return validation bits per byte as markdown tables, the best rate of each optimizer in bold."""

    def cell(value: float | None, best: float) -> str:
        if value is None:
            return "diverged"
        return f"**{value:.4f}**" if value == best else f"{value:.4f}"

    lines = ["| optimizer | learning rate: bits per byte |", "|---|---|"]
    variants: dict[str, dict[str, str]] = {}
    optimizers = list(dict.fromkeys(result["optimizer"] for result in results))
    for optimizer in optimizers:
        mine = [result for result in results if result["optimizer"] == optimizer]
        rates = sorted((r for r in mine if not r["variant"]), key=lambda result: result["rate"])
        best = min((r["bits_per_byte"] for r in rates if r["bits_per_byte"]), default=math.inf)
        cells = [f"{r['rate']:g}: {cell(r['bits_per_byte'], best)}" for r in rates]
        lines.append(f"| {optimizer} | {', '.join(cells)} |")
        for result in mine:
            if result["variant"]:
                value = result["bits_per_byte"]
                variants.setdefault(result["variant"], {})[optimizer] = (
                    "diverged" if value is None else f"{value:.4f} ({value - best:+.4f})"
                )
    if variants:
        lines += [
            "",
            "| at the best rate | " + " | ".join(optimizers) + " |",
            "|---" * (len(optimizers) + 1) + "|",
        ]
        for variant, values in variants.items():
            lines.append(f"| {variant} | " + " | ".join(values.get(name, "-") for name in optimizers) + " |")
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw bits per byte over the rate, and the loss over tokens at the best rate; needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    _, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for optimizer in dict.fromkeys(result["optimizer"] for result in results):
        done = [r for r in results if r["optimizer"] == optimizer and not r["variant"] and r["bits_per_byte"]]
        if not done:
            continue
        done.sort(key=lambda result: result["rate"])
        left.plot([r["rate"] for r in done], [r["bits_per_byte"] for r in done], "o-", label=optimizer)
        best = min(done, key=lambda result: result["bits_per_byte"])
        tokens, losses = zip(*best["curve"], strict=True)
        right.plot([count / 1e6 for count in tokens], losses, label=f"{optimizer}, {best['rate']:g}")
    left.set(xlabel="peak learning rate", ylabel="validation bits per byte", xscale="log")
    rates = sorted({r["rate"] for r in results if not r["variant"]})
    left.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=45)
    left.minorticks_off()
    right.set(xlabel="million tokens", ylabel="training loss, nats per token")
    left.legend()
    right.legend()
    pyplot.suptitle(title, fontsize=9)
    pyplot.tight_layout()
    pyplot.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
