"""Mixture of experts: speed against the dense model and against a loop over experts, and the load of experts.

Speed is that of minimind's own steps on random tokens, all contenders one after the other: the dense preset,
the same with experts of the MLP's size (of minimind-3 that is minimind-3-moe), that without compilation, and
a loop over experts, which cannot be compiled whole because its shapes depend on the routing; last that loop
in a model of PyTorch's own operators only, as a plain trainer has it. With --data a run of 500 steps trains
on real text instead, and prints the load of the busiest expert of any block as a multiple of the mean. Meant
for a CUDA GPU; on a CPU it shows that it works.

    python benchmarks/moe.py --batch-size 128 --seconds 10
    python benchmarks/moe.py --data corpus.jsonl --batch-size 128
    python benchmarks/moe.py --preset tiny --batch-size 4 --seconds 1
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.config.presets import preset_config
from minimind.modeling.kernels import dispatch as fused
from minimind.modeling.moe import MixtureOfExperts
from minimind.planning.benchmark import BenchmarkResult, benchmark


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", default="minimind-3", help="a dense one, to which experts are given")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--max-seq-len", type=int, default=512)
    parser.add_argument("--num-experts", type=int, default=4)
    parser.add_argument("--num-experts-per-tok", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each measured part")
    parser.add_argument("--data", help="a JSONL file: train on it and show the load of experts")
    parser.add_argument("--steps", type=int, default=500, help="with --data")
    parser.add_argument("extra", nargs="*", help="further options of pretrain with --data, after --")
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, torch {torch.__version__}, {datetime.date.today()}")
    if options.data:
        balance(options)
    else:
        speed(options)


def speed(options: argparse.Namespace) -> None:
    dense = preset_config(options.preset, batch_size=options.batch_size, max_seq_len=options.max_seq_len)
    experts = dataclasses.replace(
        dense,
        use_moe=True,
        num_experts=options.num_experts,
        num_experts_per_tok=options.num_experts_per_tok,
    )
    eager = dataclasses.replace(experts, compile=False)
    print(
        f"{'contender':<22}{'params':>8}{'batch':>6}{'T':>6}{'tokens/s':>12}{'of dense':>10}{'of loop':>9}",
        end="",
    )
    print(f"{'memory':>10}")
    results = {"dense": measured(dense, options.seconds)}
    results["experts"] = measured(experts, options.seconds)
    results["experts, not compiled"] = measured(eager, options.seconds)
    with mock.patch.object(MixtureOfExperts, "forward", looped):
        results["loop, not compiled"] = measured(eager, options.seconds)
        with mock.patch.object(fused, "_BUILDABLE", False):
            results["loop, plain PyTorch"] = measured(eager, options.seconds)
    of = {name: results[name].tokens_per_second for name in ("dense", "loop, not compiled")}
    for name, result in results.items():
        shares = [result.tokens_per_second / base for base in of.values()]
        print(
            f"{name:<22}{result.parameters / 1e6:>7.1f}M{result.batch_size:>6}{result.max_seq_len:>6}", end=""
        )
        print(f"{result.tokens_per_second:>12,.0f}{shares[0]:>10.0%}{shares[1]:>8.2f}x", end="")
        print(f"{result.memory_gb:>7.1f} GB")


def measured(config: Any, seconds: float) -> BenchmarkResult:
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return benchmark(config, seconds)


def looped(self: MixtureOfExperts, x: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Stand in for `MixtureOfExperts.forward`: each expert gathers its tokens, which the host waits for."""
    tokens, experts = x.flatten(0, 1), self.experts
    probabilities = self._probabilities(tokens)
    weights, choices = probabilities.topk(self.experts_per_token, dim=-1)
    if self.normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    if token_mask is not None:
        real = token_mask.reshape(-1, 1)
        choices = torch.where(real, choices, -1)
        probabilities = torch.where(real, probabilities, 0.0)
    out = torch.zeros_like(tokens)
    for e in range(self.gate.out_features):
        places, ranks = (choices == e).nonzero(as_tuple=True)
        mine = tokens[places]
        inner = F.silu(F.linear(mine, experts.gate_proj[e])) * F.linear(mine, experts.up_proj[e])
        rows = F.linear(inner, experts.down_proj[e]) * weights[places, ranks, None]
        out.index_add_(0, places, rows.to(out.dtype))
    counts = torch.stack([(choices == e).sum() for e in range(self.gate.out_features)])
    return out.view_as(x), torch.stack((counts.float(), probabilities.sum(0)))


def balance(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [
            *(sys.executable, "-m", "minimind_cli", "pretrain", "--preset", options.preset, "--use-moe"),
            *("--num-experts", options.num_experts, "--num-experts-per-tok", options.num_experts_per_tok),
            *("--data", options.data, "--batch-size", options.batch_size),
            *("--max-seq-len", options.max_seq_len, "--max-steps", options.steps, "--epochs", 10_000),
            *("--log-interval", max(options.steps // 10, 1), "--save-interval", 1_000_000),
            *("--eval-batches", 2, "--tracker", "none", "--output-dir", out),
            *("--cache-dir", Path(folder) / "cache", *options.extra),
        ]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    reports = [line for line in lines if "expert_load" in line]
    print(f"{'step':>6}{'loss':>9}{'max/mean':>10}{'balancing loss':>16}{'dropped':>9}")
    for line in reports:
        print(f"{line['step']:>6}{line['loss']:>9.4f}{line['expert_load']:>10.3f}", end="")
        print(f"{line['balance_loss']:>16.4f}{line['dropped_share']:>9.2%}")


if __name__ == "__main__":
    main()
