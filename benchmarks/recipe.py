"""Compare changes of the training recipe: many short runs, several seeds, at equal tokens.

A run is given as `NAME=VALUE,...`; `baseline` is the recipe of the defaults. Names are options of pretrain
(batch_size, learning_rate, lr_schedule, weight_decay, rope_theta, ...) and those of `Recipe` below, which has
candidates for which pretrain has no option. Every run starts from weights and an order that only its seed
decides, so runs of one seed are paired.

Results are appended to --output, one JSON object per line; runs that are already there are skipped, so that
a matrix can be made in several calls. With --jobs several processes share the GPU: compare losses only, not
times.

    python benchmarks/recipe.py --preset minimind2-small --data train.jsonl --max-tokens 30e6 --seeds 0 1 2 \\
        --output results.jsonl --runs baseline embedding_lr=3 normuon=1,embedding_lr=3
    python benchmarks/recipe.py --output results.jsonl --table
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minimind.config.options import PretrainConfig
from minimind.config.presets import PRESETS, preset_config
from minimind.config.schema import parse_values, schema_of
from minimind.data.batch_plan import BatchPlan
from minimind.data.loader import Loader, MicroBatch, evaluation_batches
from minimind.data.prepare import prepare_data
from minimind.distributed.accelerator import start_accelerator, wants_compile
from minimind.evaluation.validation import evaluate
from minimind.modeling.transformer import MiniMindForCausalLM
from minimind.optim.orthogonalize import orthogonalize
from minimind.schedule import LearningRateSchedule
from minimind.tokenizer import load_tokenizer
from minimind.training.build_model import build_model, resolve_model_config
from minimind.training.step import forward_loss

# Projections into the residual stream.
_RESIDUAL = ("o_proj.weight", "down_proj.weight")
_UP = ("gate_proj.weight", "up_proj.weight")
_QK_NORM = ("q_norm.weight", "k_norm.weight")
# Points of a training curve.
_POINTS = 40


@dataclass(frozen=True)
class Recipe:
    """Candidates for which pretrain has no option; the defaults are the recipe of version 0.2.0.

    Attributes:
        embedding_lr: learning rate of the embedding over that of the matrices.
        head_lr: that of an output layer that is not tied.
        norm_lr: that of the norms; 0 for that of the embedding.
        embedding_decay: weight decay of the embedding.
        adam_beta1: decay rate of AdamW's first moment.
        adam_beta2: decay rate of AdamW's second moment.
        normuon: divide each row of Muon's update by its running root mean square (arXiv:2510.05491).
        normuon_beta: decay rate of that mean square.
        cautious: decay weights only where the update shrinks them (arXiv:2510.12402).
        decay_follows: multiply the weight decay by the learning rate's share of its peak once more.
        momentum: of Muon.
        momentum_warmup: share of the steps over which the momentum rises from 0.85.
        momentum_cooldown: share of the steps over which it falls to 0.85.
        lookahead: EMA-Nesterov's step size (arXiv:2605.25395), scaled with the learning rate; 0 for none.
        lookahead_beta: decay rate of its mean of steps.
        lookahead_from: share of the steps before it begins.
        lookahead_to: share of the steps after which it rests.
        tail: horizon in steps of the mean of the last weights; 0 for none.
        tail_weight: share of that mean in the final weights.
        zero_init: begin with zeros in the projections into the residual stream.
        up_init: factor of the initial gate and up projections.
        embedding_init: factor of the initial embedding.
        qk_gain: initial weight of the query and key norms.
        ramp: micro-batches per step, rising in equal shares of the tokens, such as `1:2:4`.
        ramp_lr: factor of the learning rate for each doubling of the batch against the last stage.
        clip: maximum gradient norm; 0 for none.
    """

    embedding_lr: float = 1.0
    head_lr: float = 1.0
    norm_lr: float = 0.0
    embedding_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    normuon: bool = False
    normuon_beta: float = 0.95
    cautious: bool = False
    decay_follows: bool = False
    momentum: float = 0.95
    momentum_warmup: float = 0.0
    momentum_cooldown: float = 0.0
    lookahead: float = 0.0
    lookahead_beta: float = 0.99
    lookahead_from: float = 0.15
    lookahead_to: float = 0.75
    tail: int = 0
    tail_weight: float = 0.6
    zero_init: bool = False
    up_init: float = 1.0
    embedding_init: float = 1.0
    qk_gain: float = 1.0
    ramp: str = "1"
    ramp_lr: float = 1.0
    clip: float = 1.0


class RecipeOptimizer:
    """Muon and AdamW with the candidates of `Recipe`, in plain operations.

    Args:
        model: to train.
        config: betas, weight decay and peak learning rate.
        recipe: candidates.
    """

    def __init__(self, model: MiniMindForCausalLM, config: PretrainConfig, recipe: Recipe) -> None:
        self.recipe, self.config = recipe, config
        self.matrices: list[list[torch.nn.Parameter]] = []
        by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
        embedding, head, norms = [], [], []
        for name, parameter in model.named_parameters():
            if name.endswith("embed_tokens.weight"):
                embedding.append(parameter)
            elif name.startswith("lm_head"):
                head.append(parameter)
            elif parameter.ndim < 2:
                norms.append(parameter)
            else:
                by_shape.setdefault(parameter.shape, []).append(parameter)
        self.matrices = list(by_shape.values())
        groups = [
            {"params": embedding, "scale": recipe.embedding_lr, "weight_decay": recipe.embedding_decay},
            {"params": norms, "scale": recipe.norm_lr or recipe.embedding_lr, "weight_decay": 0.0},
            {"params": head, "scale": recipe.head_lr, "weight_decay": recipe.embedding_decay},
        ]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            betas=(recipe.adam_beta1, recipe.adam_beta2),
            fused=True,
        )
        self.momenta = [torch.zeros((len(b), *b[0].shape), device=b[0].device) for b in self.matrices]
        self.squares = [torch.zeros((len(b), b[0].shape[0], 1), device=b[0].device) for b in self.matrices]
        self.all = list(model.parameters())
        self.mean_step = [torch.zeros_like(p) for p in self.all] if recipe.lookahead else []
        self.tail: list[torch.Tensor] = []

    @torch.no_grad()
    def look_ahead(self, share: float, factor: float) -> None:
        """Move the weights along their mean step before the gradient is computed."""
        recipe = self.recipe
        if recipe.lookahead:
            self.before = [p.detach().clone() for p in self.all]
            if recipe.lookahead_from <= share < recipe.lookahead_to:
                torch._foreach_add_(self.all, self.mean_step, alpha=recipe.lookahead * factor)

    @torch.no_grad()
    def step(self, lr: float, share: float, factor: float, total_steps: int) -> None:
        """Update the weights.

        Args:
            lr: learning rate of the matrices.
            share: of all steps that are done.
            factor: learning rate over its peak.
            total_steps: of the run.
        """
        recipe, config = self.recipe, self.config
        for group in self.adamw.param_groups:
            group["lr"] = lr * group["scale"]
        self.adamw.step()
        momentum = recipe.momentum
        if recipe.momentum_warmup and share < recipe.momentum_warmup:
            momentum = 0.85 + (momentum - 0.85) * share / recipe.momentum_warmup
        if recipe.momentum_cooldown and share > 1 - recipe.momentum_cooldown:
            momentum = momentum + (0.85 - momentum) * (1 - (1 - share) / recipe.momentum_cooldown)
        decay = config.matrix_weight_decay * (factor if recipe.decay_follows else 1.0)
        for batch, buffer, square in zip(self.matrices, self.momenta, self.squares, strict=True):
            gradient = torch.stack([p.grad for p in batch])
            buffer.lerp_(gradient, 1 - momentum)
            direction = orthogonalize(gradient.lerp_(buffer, momentum)).float()
            if recipe.normuon:
                norm = direction.norm(dim=(-2, -1), keepdim=True)
                square.lerp_(direction.square().mean(-1, keepdim=True), 1 - recipe.normuon_beta)
                direction /= square.sqrt() + 1e-8
                direction *= norm / direction.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-8)
            update = list((direction * (0.2 * max(batch[0].shape) ** 0.5)).unbind())
            if recipe.cautious:
                for p, u in zip(batch, update, strict=True):
                    p.mul_(1 - lr * decay * (u * p > 0))
            else:
                torch._foreach_mul_(batch, 1 - lr * decay)
            torch._foreach_add_(batch, update, alpha=-lr)
        if recipe.lookahead:
            steps = torch._foreach_sub(self.all, self.before)
            torch._foreach_lerp_(self.mean_step, steps, 1 - recipe.lookahead_beta)
        if recipe.tail and share * total_steps >= total_steps - 4 * recipe.tail - 1:
            if not self.tail:
                self.tail = [p.detach().clone() for p in self.all]
            torch._foreach_lerp_(self.tail, self.all, 1 / recipe.tail)

    @torch.no_grad()
    def finish(self) -> None:
        """Blend the final weights with their mean."""
        if self.tail:
            torch._foreach_lerp_(self.all, self.tail, self.recipe.tail_weight)


class Bench:
    """Text, accelerator and the model of one shape, trained again and again."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        device = "cuda" if torch.cuda.is_available() and options.device != "cpu" else "cpu"
        if device == "cpu":
            os.environ["ACCELERATE_USE_CPU"] = "true"
        self.accelerator: Any = None
        self.tokenizer = load_tokenizer(options.tokenizer)
        self.models: dict[Any, MiniMindForCausalLM] = {}
        self.text = prepare_data(resolve_model_config(self.config({}), self.tokenizer)[0], self.tokenizer)

    def config(self, values: dict[str, Any]) -> PretrainConfig:
        """Return the configuration of a run."""
        options = self.options
        base: dict[str, Any] = {"tokenizer": options.tokenizer} if options.tokenizer else {}
        base |= {"data": tuple(options.data), "val_fraction": options.val_fraction}
        base |= {"cache_dir": options.cache_dir} if options.cache_dir else {}
        base |= {"compile": False} if options.no_compile else {}
        parsed, problems = parse_values(PretrainConfig, {**base, **values})
        if problems:
            sys.exit("\n".join(problems))
        return preset_config(options.preset, **parsed)

    def train(self, run: str, seed: int) -> dict[str, Any]:
        """Train one run and return its result."""
        values = dict(word.split("=") for word in run.split(",") if word != "baseline")
        fields = {field.name: field.type for field in dataclasses.fields(Recipe)}
        chosen = {name: values.pop(name) for name in list(values) if name in fields}
        casts = {"float": float, "int": int, "bool": lambda v: v == "1", "str": str}
        recipe = Recipe(**{name: casts[str(fields[name])](value) for name, value in chosen.items()})
        config, model_config = resolve_model_config(self.config(values | {"seed": seed}), self.tokenizer)
        if self.accelerator is None:
            self.accelerator = start_accelerator(config)
        device = self.accelerator.device
        model, prepared = self._model(config, model_config, recipe)
        optimizer = RecipeOptimizer(model, config, recipe)
        counts = [int(count) for count in recipe.ramp.split(":")]
        tokens_per_micro_batch = config.batch_size * config.max_seq_len
        share_tokens = self.options.max_tokens / len(counts)
        stages = [max(round(share_tokens / (count * tokens_per_micro_batch)), 1) for count in counts]
        total_steps = sum(stages)
        schedule = LearningRateSchedule(config, total_steps)
        micro_batches = self._micro_batches(config, seed, device)
        losses: list[torch.Tensor] = []
        began, step = time.perf_counter(), 0
        for count, steps in zip(counts, stages, strict=True):
            for _ in range(steps):
                share, lr = step / total_steps, schedule.at(step)
                factor = lr / config.peak_learning_rate
                lr *= recipe.ramp_lr ** math.log2(count / counts[-1])
                optimizer.look_ahead(share, factor)
                batch = [next(micro_batches) for _ in range(count)]
                targets = sum(number for _, number in batch)
                loss = torch.zeros((), device=device)
                for micro_batch, _ in batch:
                    part = forward_loss(prepared, micro_batch) / targets
                    part.backward()
                    loss += part.detach()
                if recipe.clip:
                    torch.nn.utils.clip_grad_norm_(optimizer.all, recipe.clip, foreach=True)
                optimizer.step(lr, share, factor, total_steps)
                for p in optimizer.all:
                    p.grad = None
                losses.append(loss)
                step += 1
        curve = torch.stack(losses).tolist()
        seconds = time.perf_counter() - began
        last = self._validate(config, prepared)
        optimizer.finish()
        final = self._validate(config, prepared) if optimizer.tail else last
        every = max(total_steps // _POINTS, 1)
        return {
            "preset": self.options.preset,
            "tokens": self.options.max_tokens,
            "run": run,
            "seed": seed,
            "bits_per_byte": final,
            "without_tail": last,
            "seconds": round(seconds, 2),
            "steps": total_steps,
            "parameters": sum(p.numel() for p in optimizer.all),
            "curve": [sum(curve[i : i + every]) / every for i in range(0, total_steps - every + 1, every)],
        }

    def _model(self, config: PretrainConfig, model_config: Any, recipe: Recipe) -> tuple[Any, Any]:
        """Return the model of a shape with the initial weights of the run's seed, bare and prepared."""
        fresh = build_model(config, model_config)
        if model_config not in self.models:
            bare: Any = build_model(config, model_config)
            if wants_compile(config, self.accelerator):
                bare.compile_for_training("whole")
            self.models[model_config] = bare, self.accelerator.prepare_model(bare)
        bare, prepared = self.models[model_config]
        with torch.no_grad():
            for name, parameter in fresh.named_parameters():
                if recipe.zero_init and name.endswith(_RESIDUAL):
                    parameter.zero_()
                elif name.endswith(_UP):
                    parameter.mul_(recipe.up_init)
                elif name.endswith("embed_tokens.weight"):
                    parameter.mul_(recipe.embedding_init)
                elif name.endswith(_QK_NORM):
                    parameter.fill_(recipe.qk_gain)
        bare.load_state_dict(fresh.state_dict())
        prepared.train()
        return bare, prepared

    def _micro_batches(
        self, config: PretrainConfig, seed: int, device: torch.device
    ) -> Iterator[tuple[MicroBatch, int]]:
        loader = Loader(
            self.text.train,
            seq_len=config.max_seq_len,
            packing=True,
            plan=BatchPlan(config.batch_size, 1, 1),
            seed=seed,
            process_index=0,
            device=device,
        )
        for batch in loader.steps(0, epochs=None):
            if batch.num_sequences == config.batch_size:
                yield batch.micro_batches[0], batch.num_targets

    def _validate(self, config: PretrainConfig, model: torch.nn.Module) -> float | None:
        device = self.accelerator.device
        held_out = evaluation_batches(
            self.text.validation,
            seq_len=config.max_seq_len,
            packing=True,
            batch_size=config.batch_size,
            process_index=0,
            num_processes=1,
            device=device,
        )
        table = torch.from_numpy(self.tokenizer.bytes_per_token()).to(device)
        result = evaluate(model, held_out, table, self.accelerator)
        assert result is not None
        model.train()
        return result.bits_per_byte if math.isfinite(result.bits_per_byte) else None


def _key(result: dict[str, Any]) -> tuple[Any, ...]:
    return result["preset"], float(result["tokens"]), result["run"], result["seed"]


def _read(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []


def work(options: argparse.Namespace) -> None:
    """Train the runs that no other process has claimed, until the time is over."""
    began = time.perf_counter()
    output = Path(options.output)
    bench: Bench | None = None
    took: list[float] = []
    claims = Path(f"{output}.claims")
    for seed in options.seeds:
        for run in options.runs:
            key = (options.preset, options.max_tokens, run, seed)
            with claims.open("a+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(0)
                if repr(key) in file.read().splitlines() or key in map(_key, _read(output)):
                    continue
                if time.perf_counter() - began + max(took, default=0.0) > 60 * options.minutes:
                    print(f"no time for {run}, seed {seed}", flush=True)
                    return
                file.write(f"{key!r}\n")
            started = time.perf_counter()
            bench = bench or Bench(options)
            result = bench.train(run, seed)
            took.append(time.perf_counter() - started)
            with output.open("a") as file:
                file.write(json.dumps(result) + "\n")
            shown = {name: value for name, value in result.items() if name != "curve"}
            print(json.dumps(shown), flush=True)


def table(results: list[dict[str, Any]]) -> str:
    """Return mean bits per byte of each run, and the mean paired difference to the baseline ± its error."""
    lines = ["| preset | tokens | run | seeds | bits/byte | against baseline |", "|---|---|---|---|---|---|"]
    groups: dict[tuple[Any, ...], dict[str, dict[int, float]]] = {}
    for r in results:
        group = groups.setdefault((r["preset"], float(r["tokens"])), {})
        group.setdefault(r["run"], {})[r["seed"]] = r["bits_per_byte"] or math.inf
    for (preset, tokens), runs in groups.items():
        base = runs.get("baseline", {})
        for run, values in sorted(runs.items(), key=lambda item: statistics.fmean(item[1].values())):
            paired = [value - base[seed] for seed, value in values.items() if seed in base]
            change = "-" if not paired or run == "baseline" else f"{statistics.fmean(paired):+.4f}"
            if len(paired) > 1 and run != "baseline":
                change += f" ± {statistics.stdev(paired) / len(paired) ** 0.5:.4f}"
            mean = statistics.fmean(values.values())
            lines.append(f"| {preset} | {tokens / 1e6:g}M | {run} | {len(values)} | {mean:.4f} | {change} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", default="minimind2-small", choices=PRESETS)
    parser.add_argument("--data", nargs="+", default=[], metavar="PATH")
    parser.add_argument("--tokenizer", help="default: the packaged one")
    parser.add_argument("--cache-dir")
    parser.add_argument("--val-fraction", type=float, default=0.01)
    parser.add_argument("--max-tokens", type=float, default=30e6, help="of each run")
    parser.add_argument("--runs", nargs="+", default=["baseline"], metavar="NAME=VALUE,...")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the device")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no run that would end later")
    parser.add_argument("--no-compile", action="store_true", help="start sooner; for several jobs")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--output", default="recipe.jsonl", metavar="FILE")
    parser.add_argument("--table", action="store_true", help="only print the table of --output")
    options = parser.parse_args()
    if options.table:
        print(table(_read(Path(options.output))))
        return
    unknown = {
        word.split("=")[0]
        for run in options.runs
        for word in run.split(",")
        if word != "baseline"
        and word.split("=")[0] not in {*schema_of(PretrainConfig), *Recipe.__dataclass_fields__}
    }
    if unknown:
        sys.exit(f"unknown names in --runs: {', '.join(sorted(unknown))}")
    if "RECIPE_WORKER" not in os.environ:
        # Those of an earlier call that did not end.
        Path(f"{options.output}.claims").unlink(missing_ok=True)
    if options.jobs > 1:
        os.environ["RECIPE_WORKER"] = "1"
        position = sys.argv.index("--jobs")
        arguments = sys.argv[:position] + sys.argv[position + 2 :]
        workers = []
        for job in range(options.jobs):
            gpu = (
                {"CUDA_VISIBLE_DEVICES": str(job % torch.cuda.device_count())}
                if torch.cuda.is_available()
                else {}
            )
            workers.append(subprocess.Popen([sys.executable, *arguments], env=os.environ | gpu))
            # The first process writes the token cache that the others read.
            time.sleep(1.0)
        for worker in workers:
            worker.wait()
        return
    work(options)


if __name__ == "__main__":
    main()
