"""A planned run on more GPUs than this machine has: the values and the lines that `--plan` prints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data.batch_plan import BatchPlan, plan_batches
from ..data.prepare import PreparedData
from ..errors import ConfigError
from ..formats.transformers_folder import build_network
from ..formatting import count, duration
from ..launch_env import device_type, world_size
from ..modeling.config import MiniMindConfig
from ..modeling.transformer import MiniMindForCausalLM
from ..modeling.transformers_config import TransformersConfig
from ..optim.build import build_optimizer
from ..training.compilation import USUAL_MFU
from ..training.peak_flops import device_peak_flops
from ..training.setup import RunInputs
from .benchmark import BenchmarkResult, micro_batch_flops
from .step_time import (
    GPUS_PER_NODE,
    NETWORK_GBITS_PER_GPU,
    Cluster,
    MuonWork,
    SingleGPU,
    StepTime,
    ddp_step,
    fsdp2_step,
    link_bandwidth,
)

# The GPU that is assumed where there is none.
ASSUMED_GPU = "NVIDIA H100 80GB HBM3"
# A large matrix product reaches this share of the stated peak (docs/performance.md: 800 of 989 TFLOP/s).
_MATMUL_SHARE = 0.8
# Seconds per layer of the smallest step: 462,000 tokens/s of `minimind-3` with 8 sequences and a CUDA graph.
_SMALLEST_STEP = 8 * 512 / 462e3 / 8


@dataclass(frozen=True)
class ScaleRequest:
    """The options --num-processes, --nodes and --network-bandwidth.

    Attributes:
        num_processes: of all nodes together, one per GPU.
        nodes: None for nodes of 8 GPUs.
        network_gbits: Gbit/s of a node to the others; None for 400 per GPU.
    """

    num_processes: int
    nodes: int | None = None
    network_gbits: float | None = None

    def check(self) -> None:
        """Raise ConfigError for GPUs that no run can have, before anything is tokenized or measured."""
        if world_size() > 1:
            raise ConfigError("--num-processes predicts from one GPU; start --plan without a launcher.")
        self.cluster(link_bandwidth=1.0)

    def cluster(self, link_bandwidth: float) -> Cluster:
        """Return the GPUs of the run.

        Args:
            link_bandwidth: see `Cluster`.

        Raises:
            ConfigError: for processes that the nodes do not divide, or a network between nothing.
        """
        nodes = self.nodes
        if nodes is None:
            nodes = max(self.num_processes // GPUS_PER_NODE, 1)
            if self.num_processes > GPUS_PER_NODE and self.num_processes % GPUS_PER_NODE:
                raise ConfigError(
                    f"--num-processes {self.num_processes} is not a multiple of {GPUS_PER_NODE} GPUs per "
                    "node; give --nodes too."
                )
        if self.num_processes % nodes:
            raise ConfigError(
                f"--num-processes {self.num_processes} is not a multiple of --nodes {nodes}; every node has "
                "as many GPUs."
            )
        if nodes == 1 and self.network_gbits is not None:
            raise ConfigError("--network-bandwidth is between nodes, and there is one; give --nodes too.")
        gbits = self.network_gbits
        if gbits is None:
            gbits = NETWORK_GBITS_PER_GPU * self.num_processes / nodes
        return Cluster(self.num_processes, nodes, link_bandwidth, gbits * 1e9 / 8)


@dataclass(frozen=True)
class ScaledRun:
    """The prediction for a run on `cluster`.

    Attributes:
        gpu: name of the GPU.
        measured: the step of one GPU was measured here; otherwise it is estimated from the peak of `gpu`.
        graphs: DDP trains with CUDA graphs.
        one: the step of one GPU.
        steps: by strategy, `DDP`, `FSDP2` and between nodes `HSDP`.
        step_tokens: input tokens of a global batch.
        total_steps: of the run.
        other_seconds: start and evaluations.
    """

    gpu: str
    measured: bool
    graphs: bool
    cluster: Cluster
    one: SingleGPU
    steps: Mapping[str, StepTime]
    step_tokens: int
    total_steps: int
    other_seconds: float

    @classmethod
    def predict(cls, cluster: Cluster, one: SingleGPU, *, graphs: bool, **values: Any) -> ScaledRun:
        """Return the prediction for a step of one GPU; `values` are the other attributes."""
        steps = {"DDP": ddp_step(one, cluster, graphs=graphs), "FSDP2": fsdp2_step(one, cluster)}
        if 1 < cluster.nodes < cluster.num_processes:
            steps["HSDP"] = fsdp2_step(one, cluster, hybrid=True)
        return cls(cluster=cluster, one=one, graphs=graphs, steps=steps, **values)

    def tokens_per_second(self, strategy: str) -> float:
        """Return the throughput of all GPUs."""
        return self.step_tokens / self.steps[strategy].seconds

    def seconds(self, strategy: str) -> float:
        """Return the time of the run from start to end."""
        return self.total_steps * self.steps[strategy].seconds + self.other_seconds

    def to_dict(self) -> dict[str, Any]:
        """Return the prediction as JSON values."""
        strategies = {
            name: {
                "step_seconds": step.seconds,
                "parts_seconds": dataclasses.asdict(step),
                "tokens_per_second": self.tokens_per_second(name),
                "efficiency": step.efficiency,
                "seconds": self.seconds(name),
            }
            for name, step in self.steps.items()
        }
        return {
            "gpu": self.gpu,
            "measured": self.measured,
            "cuda_graphs": self.graphs,
            **dataclasses.asdict(self.cluster),
            "total_steps": self.total_steps,
            "step_tokens": self.step_tokens,
            "strategies": strategies,
        }

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield pairs of a key and a value."""
        n, nodes = self.cluster.num_processes, self.cluster.nodes
        yield (
            "scaled to",
            f"{n:,} x {self.gpu} on {nodes:,} node{'s' * (nodes > 1)}: {self.total_steps:,} step"
            f"{'s' * (self.total_steps > 1)} of {count(self.step_tokens)} tokens, predicted:",
        )
        for name, step in self.steps.items():
            yield (
                name,
                f"{count(self.tokens_per_second(name))} tokens/s, {step.efficiency:.1%} of {n:,} x one GPU, "
                f"{step.seconds * 1e3:.1f} ms per step, {duration(self.seconds(name))} in all",
            )
            parts = [f"{key.replace('_', ' ')} {value * 1e3:.1f}" for key, value in vars(step).items()]
            yield "", f"ms: {', '.join(parts)}"
        network = (
            f", network {self.cluster.network_bandwidth * 8 / 1e9:g} Gbit/s per node" if nodes > 1 else ""
        )
        speed = "measured here" if self.measured else "estimated at 40% of its peak"
        how = "CUDA graphs with DDP only" if self.graphs else "no CUDA graphs"
        yield (
            "assuming",
            f"the step of one GPU {speed}, {self.cluster.link_bandwidth / 1e9:g} GB/s between GPUs of a node"
            f"{network}; {how}; see docs/distributed.md",
        )


def empty_model(model_config: MiniMindConfig) -> nn.Module:
    """Return the model without memory for its weights."""
    with torch.device("meta"):
        if isinstance(model_config, TransformersConfig):
            return build_network(model_config)
        return MiniMindForCausalLM(model_config)


def scale_run(
    request: ScaleRequest,
    inputs: RunInputs,
    data: PreparedData,
    batches: BatchPlan,
    first_step: int,
    measured: BenchmarkResult | None,
    times: tuple[float | None, float | None],
    evaluation_batches: Callable[..., int],
) -> ScaledRun:
    """Predict a run from the step of one GPU, measured on this machine or, without a GPU, estimated.

    Args:
        batches: of the run on this machine, which has one process.
        first_step: that the run resumes from.
        measured: None where a step does not fit into the GPU.
        times: seconds of a step on this machine and of the forward pass of a micro-batch; likewise.
        evaluation_batches: of a process, for `(config, data, batches, first step, steps)`.

    Raises:
        ConfigError: for a global batch that the processes do not divide, or a GPU with unknown peak.
    """
    config = inputs.config
    scaled = plan_batches(config, request.num_processes)
    total_steps = inputs.total_steps(inputs.loader(data.train, scaled, weights=data.weights), scaled)
    gpu = torch.cuda.get_device_name() if device_type() == "cuda" else ASSUMED_GPU
    if device_type() == "cuda" and measured is not None:
        seconds, forward = times
        assert seconds is not None
        assert forward is not None
        one = _measured_gpu(inputs, scaled, batches, measured, seconds, forward)
        start = measured.start_seconds
    else:
        measured, start = None, 0.0
        one = _estimated_gpu(inputs, scaled, gpu)
    evaluations = evaluation_batches(config, data, scaled, min(first_step, total_steps), total_steps)
    return ScaledRun.predict(
        request.cluster(link_bandwidth(gpu)),
        one,
        gpu=gpu,
        measured=measured is not None,
        graphs=config.cuda_graphs is not False
        and (measured is None or measured.precision in ("bf16", "fp8")),
        step_tokens=scaled.global_batch_size * config.max_seq_len,
        total_steps=max(total_steps - first_step, 0),
        other_seconds=start + evaluations * one.forward_seconds,
    )


def _measured_gpu(
    inputs: RunInputs,
    scaled: BatchPlan,
    batches: BatchPlan,
    measured: BenchmarkResult,
    seconds: float,
    forward: float,
) -> SingleGPU:
    """Return a step with as many micro-batches as one of several processes has."""
    backward = forward * measured.backward_seconds / measured.forward_seconds
    seconds += (scaled.accumulation_steps - batches.accumulation_steps) * (forward + backward)
    one = _single_gpu(inputs, scaled, measured.matmul_flops, seconds, forward, backward)
    if one.muon is None:
        return one
    muon = dataclasses.replace(one.muon, seconds=min(one.muon.seconds, measured.optimizer_seconds))
    return dataclasses.replace(one, muon=muon)


def _estimated_gpu(inputs: RunInputs, scaled: BatchPlan, gpu: str) -> SingleGPU:
    """Return a step of a GPU that is not here, or too small for the step."""
    peak = device_peak_flops(gpu)
    if peak is None:
        raise ConfigError(
            f"--num-processes needs a step that fits into this {gpu}, whose peak is unknown; lower "
            "--batch-size."
        )
    flops = micro_batch_flops(inputs.model_config, scaled.micro_batch_size, inputs.config.max_seq_len)
    one = max(flops / (USUAL_MFU * peak), _SMALLEST_STEP * inputs.model_config.num_hidden_layers)
    seconds = one * scaled.accumulation_steps
    return _single_gpu(inputs, scaled, _MATMUL_SHARE * peak, seconds, one / 3, one * 2 / 3)


def _single_gpu(
    inputs: RunInputs, scaled: BatchPlan, matmul: float, seconds: float, forward: float, backward: float
) -> SingleGPU:
    """Return the step with the sizes of the model.

    Args:
        matmul: FLOP/s of a large product.
    """
    model_config, muon = inputs.model_config, None
    if inputs.config.optimizer != "adamw":
        groups = build_optimizer(empty_model(model_config), inputs.config, "cpu").param_groups
        shapes = [tuple(p.shape) for group in groups for p in group["params"] if group["algorithm"] == "muon"]
        muon = MuonWork.of(shapes, matmul)
    embeddings = model_config.vocab_size * model_config.hidden_size
    return SingleGPU(
        seconds=seconds,
        forward_seconds=forward,
        backward_seconds=backward,
        micro_batches=scaled.accumulation_steps,
        parameters=model_config.num_parameters(),
        layers=model_config.num_hidden_layers,
        embedding_parameters=embeddings * (1 if model_config.tie_word_embeddings else 2),
        muon=muon,
        gradient_bytes=2 if inputs.config.reduce_dtype == "bf16" else 4,
    )
