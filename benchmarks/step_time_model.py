"""Compare the model of step time with what was measured, and print its curve to 1,024 GPUs.

    python benchmarks/step_time_model.py

Runs on a CPU in seconds and prints the tables of docs/distributed.md. The model is in
`minimind/planning/step_time.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from minimind.config.presets import preset_config
from minimind.modeling.config import MiniMindConfig
from minimind.modeling.transformer import MiniMindForCausalLM
from minimind.optim.build import build_optimizer
from minimind.planning.step_time import Cluster, MuonWork, SingleGPU, StepTime, ddp_step, fsdp2_step

# Of one GPU, H100 and H200 alike: bytes/s over NVLink in one direction, and FLOP/s of a large product.
LINK, MATMUL = 450e9, 800e12
# Bytes/s of the network per GPU, for the curve: 400 Gbit/s.
NETWORK = 50e9
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
)


class Measured(NamedTuple):
    """Tokens/s of one and of several GPUs of a node (docs/performance.md)."""

    gpu: str
    preset: str
    sequences: int
    strategy: str
    gpus: int
    one: float
    several: float
    # Steps in CUDA graphs, and Muon's work shared by the processes.
    graphs: bool = False


MEASURED = (
    Measured("H200", "minimind-3", 128, "DDP", 2, 1_023_000, 1_939_000),
    Measured("H200", "minimind-3", 128, "DDP", 4, 1_023_000, 3_659_000),
    Measured("H200", "minimind-3", 32, "DDP", 4, 795_000, 1_607_000),
    Measured("H200", "350m", 16, "DDP", 4, 187_000, 708_000),
    Measured("H200", "350m", 16, "FSDP2", 4, 187_000, 665_000),
    Measured("H100", "minimind-3", 128, "DDP", 2, 948_560, 1_815_411),
    Measured("H100", "350m", 16, "FSDP2", 2, 181_313, 278_431),
    Measured("H200", "minimind-3", 128, "DDP", 2, 1_018_406, 1_991_568, graphs=True),
    Measured("H200", "minimind-3", 32, "DDP", 2, 830_998, 1_638_483, graphs=True),
    Measured("H200", "350m", 16, "DDP", 2, 173_226, 351_654, graphs=True),
    Measured("H200", "350m", 16, "DDP", 2, 173_715, 346_992, graphs=True),
    Measured("H200", "350m", 16, "FSDP2", 2, 173_715, 329_638),
)
CURVE = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def single_gpu(preset: str, sequences: int, tokens_per_second: float) -> tuple[SingleGPU, int]:
    """Return the step of one GPU with one micro-batch, and its tokens. Two thirds of it are backward."""
    config = preset_config(preset)
    sizes: dict[str, Any] = {name: getattr(config, name) for name in SIZES}
    model_config = MiniMindConfig(**sizes, head_dim=config.head_dim)
    with torch.device("meta"):
        model = MiniMindForCausalLM(model_config)
    matrices = build_optimizer(model, config, "cpu").param_groups[0]["params"]
    muon = MuonWork.of([tuple(p.shape) for p in matrices], MATMUL)
    tokens = sequences * config.max_seq_len
    seconds = tokens / tokens_per_second
    passes = seconds - muon.seconds
    return SingleGPU(
        seconds=seconds,
        forward_seconds=passes / 3,
        backward_seconds=passes * 2 / 3,
        micro_batches=1,
        parameters=model_config.num_parameters(),
        layers=model_config.num_hidden_layers,
        embedding_parameters=model_config.vocab_size * model_config.hidden_size,
        muon=muon,
    ), tokens


def nodes_of(gpus: int, per_node: int = 8) -> Cluster:
    """Return GPUs in nodes of eight."""
    return Cluster(gpus, max(gpus // per_node, 1), LINK, NETWORK * min(gpus, per_node))


def predicted(row: Measured) -> tuple[StepTime, float]:
    """Return the predicted step of a measurement, and the relative error of its throughput."""
    one, tokens = single_gpu(row.preset, row.sequences, row.one)
    step = (ddp_step if row.strategy == "DDP" else fsdp2_step)(
        one, nodes_of(row.gpus), muon_shared=row.graphs, graphs=row.graphs
    )
    return step, row.gpus * tokens / step.seconds / row.several - 1


def checks() -> Iterator[str]:
    """Yield the table of measurements."""
    yield "| GPUs | preset | sequences | | measured tokens/s | predicted | error |"
    yield "|---|---|---:|---|---:|---:|---:|"
    for row in MEASURED:
        _, error = predicted(row)
        strategy = f"{row.strategy}, graphs" if row.graphs else row.strategy
        run = f"{row.gpus} x {row.gpu} | `{row.preset}` | {row.sequences} | {strategy}"
        yield f"| {run} | {row.several:,} | {row.several * (1 + error):,.0f} | {error:+.1%} |"


def curve(preset: str, sequences: int, tokens_per_second: float) -> Iterator[str]:
    """Yield the table of scaling efficiency."""
    one, tokens = single_gpu(preset, sequences, tokens_per_second)
    yield "| GPUs | DDP: tokens/s | DDP | DDP without graphs | FSDP2 | HSDP |"
    yield "|---:|---:|---:|---:|---:|---:|"
    for gpus in CURVE:
        cluster = nodes_of(gpus)
        steps = [ddp_step(one, cluster), ddp_step(one, cluster, graphs=False), fsdp2_step(one, cluster)]
        if cluster.nodes > 1:
            steps.append(fsdp2_step(one, cluster, hybrid=True))
        shares = [f" {step.efficiency:.0%}" for step in steps] + [""] * (4 - len(steps))
        yield f"| {gpus:,} | {gpus * tokens / steps[0].seconds:,.0f} |{' |'.join(shares)} |"


def main() -> None:
    print(*checks(), sep="\n")
    for row in (MEASURED[0], MEASURED[3]):
        print(f"\n{row.preset}, {row.sequences} sequences per GPU, {row.one:,} tokens/s on one {row.gpu}:\n")
        print(*curve(row.preset, row.sequences, row.one), sep="\n")


if __name__ == "__main__":
    main()
