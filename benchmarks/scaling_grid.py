"""Train models of many shapes for many horizons, one after another: the data of the scaling law.

A point is WIDTHxLAYERS:TOKENS[:BATCH], such as 512x8:30e6 or 512x8:30e6:32768 (tokens in a batch; by default
from the rules in minimind/config/recipe.py, as are sequence length, learning rate and weight decay). Each
point appends one JSON line to --output: sizes, seconds, bits/byte on the validation data, the curve of the
training loss and a few evaluations on the way. Points that --output already has are skipped, so that a grid
can be made in several calls; --minutes ends a call before a point that would take longer.

    python benchmarks/scaling_grid.py --data train.jsonl --val-data val.jsonl --output grid.jsonl --minutes 9
    python benchmarks/scaling_grid.py --points 64x4:1e6 128x4:1e6 --output grid.jsonl    # text in Python

With --vocab-size a byte-level BPE is trained on the data first.
benchmarks/fit_scaling_law.py reads the lines.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minimind import PretrainConfig, train_tokenizer
from minimind.config import recipe
from minimind.config.recipe import ModelShape
from minimind.data.prepare import PreparedData, prepare_data
from minimind.distributed.accelerator import close_accelerator, start_accelerator
from minimind.optim.build import fit_to_horizon, set_schedule
from minimind.planning.text_sample import read_sample, text_size
from minimind.schedule import LearningRateSchedule
from minimind.training.evaluator import Evaluator
from minimind.training.setup import RunInputs, build_training, resolve_run
from minimind.training.step import train_step

# Cheap points first, so that a grid that is cut short still spans sizes and horizons.
POINTS = (
    *("128x4:4e6", "256x4:4e6", "256x4:16e6", "384x6:8e6", "512x8:8e6", "512x8:30e6", "128x4:16e6"),
    *("384x6:30e6", "256x4:60e6", "512x8:60e6", "768x12:16e6", "768x12:60e6", "384x6:60e6", "128x4:60e6"),
    *("512x8:30e6:8192", "512x8:30e6:32768", "512x8:180e6", "768x12:180e6"),
)
# Points of a training curve, and evaluations on the way.
REPORTS = 30
EVALUATIONS = 6
# More epochs than any point trains, so that --max-steps ends the run.
MOST_EPOCHS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--points", nargs="+", default=list(POINTS), metavar="WIDTHxLAYERS:TOKENS[:BATCH]")
    parser.add_argument("--data", nargs="+", default=[], help="default: the text in Python")
    parser.add_argument("--val-data", nargs="+", default=[])
    parser.add_argument("--val-fraction", type=float, default=0.05, help="without --val-data")
    parser.add_argument("--text", help="name of the text in the result; default: the names of --data")
    parser.add_argument("--vocab-size", type=int, help="train a tokenizer; default: that of the package")
    parser.add_argument("--rate", type=float, default=1.0, help="factor of the learning rate of the rule")
    parser.add_argument("--eval-tokens", type=float, default=400e3, help="evaluated on the way")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no point that would end later")
    parser.add_argument("--cache-dir")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    if (options.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    deadline = time.monotonic() + 60 * options.minutes
    done = (
        [json.loads(line) for line in options.output.read_text().splitlines()]
        if (options.output.exists())
        else []
    )
    with tempfile.TemporaryDirectory() as folder:
        grid = Grid(options, Path(folder))
        for point in options.points:
            key = {"point": point, "text": grid.text, "vocab": options.vocab_size, "rate": options.rate}
            if any(all(line[name] == value for name, value in key.items()) for line in done):
                continue
            expected = grid.expected_seconds(point, done)
            if time.monotonic() + expected > deadline:
                print(f"{point}: no time for about {expected:.0f} s", flush=True)
                continue
            result = key | grid.train(point)
            done.append(result)
            with options.output.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print({k: v for k, v in result.items() if k not in ("curve", "evaluations")}, flush=True)


class Grid:
    """Trains points on one text with one tokenizer."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.text = options.text or ",".join(Path(path).stem for path in options.data) or "python"
        self.base: dict[str, Any] = {"data": tuple(options.data), "val_data": tuple(options.val_data)}
        self.base |= {"val_fraction": options.val_fraction}
        if options.cache_dir:
            self.base["cache_dir"] = options.cache_dir
        run = PretrainConfig(**self.base)
        size = text_size(run, read_sample(run), choose_tokenizer=False, val_fraction=options.val_fraction)
        self.difficulty = size.difficulty
        # Tokens of the text, about: that of another tokenizer differs by less than a half.
        self.unique_tokens = size.num_bytes / size.tokenizers[0].bytes_per_token
        if options.vocab_size:
            tokenizer = train_tokenizer(_documents(options.data), options.vocab_size, max_bytes=8_000_000)
            tokenizer.save(folder / "tokenizer")
            self.base["tokenizer"] = str(folder / "tokenizer")

    def expected_seconds(self, point: str, done: list[dict[str, Any]]) -> float:
        """Return about how long a point takes, by the FLOPs and speeds of those done; 0 without any."""
        shape, tokens, _ = _parse(point)
        work = (shape.parameters(6400)) * tokens
        here = [line for line in done if line["device"] == _device_name()]
        if not here:
            return 0.0
        # Small models are slower per FLOP: the nearest one counts.
        near = min(here, key=lambda line: abs(math.log(line["parameters"] / shape.parameters(6400))))
        return 10 + near["seconds"] * work / (near["parameters"] * near["tokens"])

    def train(self, point: str) -> dict[str, Any]:
        """Train one point and return its result."""
        shape, tokens, batch = _parse(point)
        batch = batch or recipe.global_batch_tokens(tokens)
        length = recipe.sequence_length(
            batch,
            epochs=tokens / self.unique_tokens,
            parameters_per_token=shape.block_parameters / self.unique_tokens,
        )
        steps = max(round(tokens / batch), 2)
        config = PretrainConfig(
            **self.base,
            **shape.options(),
            max_seq_len=length,
            batch_size=max(batch // length, 1),
            max_steps=steps,
            epochs=MOST_EPOCHS,
            lr_schedule="wsd",
            decay_ratio=recipe.DECAY_RATIO,
            decay_shape="linear",
            min_lr_ratio=recipe.FINAL_RATE,
        )
        inputs = resolve_run(config)
        data = prepare_data(inputs.config, inputs.tokenizer)
        rate = inputs.with_learning_rate(data.train, 1).config.peak_learning_rate * self.options.rate
        inputs = replace(inputs, config=replace(inputs.config, learning_rate=rate))
        # The weight decay follows the learning rate.
        inputs = inputs.with_learning_rate(data.train, 1)
        accelerator = start_accelerator(inputs.config)
        try:
            return self._train(inputs, data, accelerator, steps) | {
                "device": _device_name(),
                "torch": torch.__version__,
                "date": str(datetime.date.today()),
            }
        finally:
            close_accelerator(accelerator)

    def _train(self, inputs: RunInputs, data: PreparedData, accelerator: Any, steps: int) -> dict[str, Any]:
        config, model_config = inputs.config, inputs.model_config
        assert isinstance(config.batch_size, int)
        assert data.validation is not None
        parts = build_training(
            inputs, data.train, accelerator, tokens_per_epoch=data.train.num_tokens, weights=data.weights
        )
        evaluator = Evaluator(data.validation, inputs, parts, accelerator)
        tokens_per_step = config.batch_size * config.max_seq_len
        sample = max(int(self.options.eval_tokens / tokens_per_step), 1)
        rate = LearningRateSchedule(config, steps).at
        fit_to_horizon(parts.optimizer, steps, steps / parts.loader.steps_per_epoch)
        losses: list[torch.Tensor] = []
        evaluations: list[tuple[int, float]] = []
        evaluating = 0.0
        trained = 0
        parts.model.train()
        began = time.perf_counter()
        for step, batch in zip(range(steps), parts.loader.steps(0, epochs=None), strict=False):
            set_schedule(parts.optimizer, rate(step), step)
            values = train_step(
                parts.model,
                parts.optimizer,
                batch,
                accelerator,
                grad_clip=config.grad_clip,
                graphs=parts.graphs,
            )
            trained += batch.num_tokens
            losses.append(values[0] / max(batch.num_targets, 1))
            if (step + 1) % max(steps // EVALUATIONS, 1) == 0 and step + 1 < steps:
                start = time.perf_counter()
                result = evaluator.evaluate(sample)
                evaluating += time.perf_counter() - start
                evaluations.append((trained, result.bits_per_byte if result else math.nan))
        curve = torch.stack(losses).tolist()
        seconds = time.perf_counter() - began - evaluating
        final = evaluator.evaluate(None)
        assert final is not None
        every = max(steps // REPORTS, 1)
        train = data.report.train.amount
        return {
            "parameters": model_config.num_parameters(),
            "block_parameters": model_config.num_parameters() - model_config.vocab_size * config.hidden_size,
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "model_vocab": model_config.vocab_size,
            "flops_per_token": model_config.flops_per_token(config.max_seq_len),
            "seq_len": config.max_seq_len,
            "batch": tokens_per_step,
            "tokens": trained,
            "unique_tokens": data.train.num_tokens,
            "bytes_per_token": train.text_bytes / data.train.num_tokens,
            "steps": steps,
            "optimizer": config.optimizer,
            "learning_rate": config.learning_rate,
            "weight_decay": config.weight_decay,
            "seconds": round(seconds, 2),
            "tokens_per_second": round(trained / seconds),
            "difficulty": self.difficulty,
            "bits_per_byte": final.bits_per_byte,
            "val_loss": final.loss,
            "curve": [
                (tokens_per_step * (first + every), sum(curve[first : first + every]) / every)
                for first in range(0, steps - every + 1, every)
            ],
            "evaluations": evaluations,
        }


def _parse(point: str) -> tuple[ModelShape, float, int | None]:
    shape, tokens, *batch = point.split(":")
    width, layers = map(int, shape.split("x"))
    return ModelShape.of(width, layers), float(tokens), int(batch[0]) if batch else None


def _device_name() -> str:
    if os.environ.get("ACCELERATE_USE_CPU") or not torch.cuda.is_available():
        return f"CPU x {torch.get_num_threads()}"
    return torch.cuda.get_device_name()


def _documents(data: list[str]) -> Iterator[str]:
    """Yield the documents of JSONL files, or those in Python."""
    if not data:
        from minimind.data.builtin_corpus import builtin_documents

        yield from builtin_documents()
    for path in data:
        with Path(path).open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)["text"]


if __name__ == "__main__":
    main()
