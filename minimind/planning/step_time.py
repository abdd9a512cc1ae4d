"""Predicts the time of a data-parallel training step on many GPUs from the step of one GPU.

Symbols: N processes (one per GPU) on M nodes, L = N / M per node, P parameters, S bytes of a collective.

Collectives follow NCCL's own model (src/graph/tuning.cc of NVIDIA/nccl): a latency, and S over a bus
bandwidth that is the smallest on the way, times (N-1)/N for an all-gather or reduce-scatter and twice that
for an all-reduce (Patarasuk and Yuan 2009). A ring inside a node is extended by a tree between nodes where
that has the lower latency, which NCCL does for all-reduce only.

A step of DDP, in the order of `StepTime`:

- one GPU: the measured step, with its CUDA graph where it has one.
- launches: kernels of processes without a CUDA graph (FSDP2) have gaps between them, and the host may take
  longer than the GPU. With a graph: what is exchanged outside of it.
- communication: DDP reduces buckets of gradients while the backward pass of the last micro-batch computes the
  next ones (Li et al. 2020, arXiv:2006.15704). The last bucket, with the embedding, is not hidden, nor is
  what takes longer than the backward pass. While NCCL runs hidden, it takes a share of the GPU from compute.
  With graphs and fast links gradients are summed after the backward pass, those of Muon's matrices on their
  process only.
- Muon: gathering updates, while other matrices are orthogonalized, less the time saved where each process
  orthogonalizes its share of the matrices.
- stragglers: all wait for the slowest of N, that is, for a normal distribution, the expected maximum of N
  draws (Blom 1958).

FSDP2 gathers the weights of each block in half precision before its forward and again before its backward
pass, the next block during the compute of one, and reduces and scatters its gradients in float32 (Zhao et al.
2023, arXiv:2304.11277). HSDP does so inside each node and then reduces the shards of gradients between nodes.

`benchmarks/step_time_model.py` compares the model with what was measured; see `docs/distributed.md`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

from ..distributed.gradient_reduction import FAST

# Bytes/s of a GPU to the others of its node by NVLink, in one direction; data sheets state the sum of both.
# NVIDIA HGX B200, H100, H200, H800, A100, A800 and V100 data sheets.
_LINKS: tuple[tuple[str, float], ...] = (
    (r"G?B200", 900e9),
    (r"(H100|H200|H20|GH200)( \d+GB( HBM3e?)?)?", 450e9),
    (r"(H800|A800.*SXM4.*)", 200e9),
    (r"A100.*SXM4.*", 300e9),
    (r"V100-SXM2-\d+GB", 150e9),
)
# PCIe 4.0 with 16 lanes, of which every GPU without NVLink has at least this.
_PCIE = 32e9
# The usual number of GPUs in a node, and Gbit/s of its network per GPU: one NIC each in NVIDIA DGX H100.
GPUS_PER_NODE = 8
NETWORK_GBITS_PER_GPU = 400.0

# Share of a bandwidth that NCCL reaches. NVLink: 370 of 450 GB/s, a protocol overhead of about 20%
# (github.com/NVIDIA/nccl-tests/issues/212). Network: 46 to 48 of 50 GB/s (issue 290 there).
_LINK_EFFICIENCY = 0.82
_NETWORK_EFFICIENCY = 0.94
# Seconds of NCCL's protocol Simple (tuning.cc of NCCL 2.27): at the start, per hop in a node, and per hop
# between nodes.
_START, _LINK_HOP, _NETWORK_HOP = 8.4e-6, 3.4e-6, 14e-6
# Bytes of a float32 bucket: in a CUDA graph, and the default of DDP.
_GRAPH_BUCKET, _BUCKET = 16 << 20, 25 << 20
# NCCL's share of a Hopper GPU: up to 24 of its 132 multiprocessors.
_CONTENTION = 0.18

# Fitted to measurements (docs/performance.md), in seconds per layer and micro-batch. Gaps: 63.2 against
# 61.7 ms for forward and backward of 8 layers on one H100, without and with a graph. Host: the best part of a
# run with 4 processes and 32 sequences took 37.7 ms per step of 8 layers.
_LAUNCH_GAPS = 1.5e-3 / 8
_HOST_LAUNCHES = 37.7e-3 / 8
# Standard deviation of a rank's step. Without a graph: seconds, least squares over the four DDP measurements
# with 128 sequences and of `350m`. With one: a share of the step, and the seconds that a step of any size
# takes longer, both from the three measurements of 2 H200 with graphs.
_SPREAD, _GRAPH_SPREAD, _GRAPH_EXCHANGE = 3.9e-3, 0.032, 0.6e-3
# Muon's products reach this share of the speed of a large one: 2.1 ms for `minimind-3` on one H100. What it
# does besides, another 1.3 ms there, is not counted as shared.
_MUON_EFFICIENCY = 0.63


@dataclass(frozen=True)
class Cluster:
    """The GPUs of a run.

    Attributes:
        num_processes: N, one per GPU.
        nodes: M, with N / M GPUs each.
        link_bandwidth: of a GPU to the others of its node, in bytes/s and one direction.
        network_bandwidth: of a node to the others, in bytes/s and one direction.
    """

    num_processes: int
    nodes: int
    link_bandwidth: float
    network_bandwidth: float

    @property
    def bus_bandwidth(self) -> float:
        """Bytes/s that NCCL reaches in a large collective."""
        link = math.inf if self.num_processes == self.nodes else _LINK_EFFICIENCY * self.link_bandwidth
        between = math.inf if self.nodes == 1 else _NETWORK_EFFICIENCY * self.network_bandwidth
        return min(link, between)


@dataclass(frozen=True)
class SingleGPU:
    """A training step of one GPU.

    Attributes:
        seconds: of the step with all its micro-batches.
        forward_seconds: of a micro-batch.
        backward_seconds: of a micro-batch.
        micro_batches: of the step.
        parameters: P.
        layers: of the model.
        embedding_parameters: whose gradients are complete last.
        muon: work of Muon; None for another optimizer.
        gradient_bytes: of a number in DDP's reduction.
    """

    seconds: float
    forward_seconds: float
    backward_seconds: float
    micro_batches: int
    parameters: int
    layers: int
    embedding_parameters: int
    muon: MuonWork | None
    gradient_bytes: int = 4


@dataclass(frozen=True)
class MuonWork:
    """What Muon orthogonalizes in a step.

    Attributes:
        seconds: on one GPU.
        elements: of all matrices.
        largest: share of the matrix that takes longest; a matrix is not split.
        largest_stack: share of the stack of matrices, such as those of all experts of a layer, that does.
    """

    seconds: float
    elements: int
    largest: float
    largest_stack: float

    @classmethod
    def of(cls, shapes: Iterable[tuple[int, ...]], matmul_flops: float) -> MuonWork:
        """Return the work for matrices, or stacks of them, on a GPU with the FLOP/s of a large product."""
        stacks = [(math.prod(shape[:-2]), *sorted(shape[-2:])) for shape in shapes]
        # Five steps of three products: twice n x m by m x n, and the square of n x n.
        flops = [5 * (4 * n * n * m + 2 * n**3) for _, n, m in stacks]
        of_stacks = [stack[0] * one for stack, one in zip(stacks, flops, strict=True)]
        total = sum(of_stacks)
        elements = sum(math.prod(stack) for stack in stacks)
        seconds = total / (_MUON_EFFICIENCY * matmul_flops)
        return cls(seconds, elements, max(flops) / total, max(of_stacks) / total)

    def saved(self, num_processes: int, *, whole_stacks: bool) -> float:
        """Return the seconds that a process saves by its share of the work, balanced by cost.

        Args:
            whole_stacks: a stack belongs to one process, as under DDP; FSDP2 shards it.
        """
        largest = self.largest_stack if whole_stacks else self.largest
        return self.seconds * (1 - max(1 / num_processes, largest))


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by cause; see the module. Only that of Muon may be negative."""

    one_gpu: float
    launches: float
    communication: float
    muon: float
    stragglers: float

    @property
    def seconds(self) -> float:
        """Return the whole step."""
        return sum(dataclasses.astuple(self))

    @property
    def efficiency(self) -> float:
        """Return the throughput as a share of N times one GPU that does the same micro-batches."""
        return self.one_gpu / self.seconds


def link_bandwidth(name: str) -> float:
    """Return the bytes/s between the GPUs of a node in one direction, for a name of the driver."""
    name = re.sub(r"^(NVIDIA|Tesla)\s+", "", name.strip())
    return next((speed for pattern, speed in _LINKS if re.fullmatch(pattern, name)), _PCIE)


def all_reduce_seconds(num_bytes: float, cluster: Cluster) -> float:
    """Return the time of an all-reduce."""
    n, hops = cluster.num_processes, cluster.nodes - 1
    hops = min(hops, math.ceil(math.log2(cluster.nodes)))  # a ring, or a tree
    latency = _START + 2 * ((n / cluster.nodes - 1) * _LINK_HOP + hops * _NETWORK_HOP)
    return latency + 2 * (n - 1) / n * num_bytes / cluster.bus_bandwidth


def all_gather_seconds(num_bytes: float, cluster: Cluster) -> float:
    """Return the time of an all-gather to, or a reduce-scatter of, so many bytes on each process."""
    n, hops = cluster.num_processes, cluster.nodes - 1
    latency = _START + (n - 1 - hops) * _LINK_HOP + hops * _NETWORK_HOP
    return latency + (n - 1) / n * num_bytes / cluster.bus_bandwidth


def ddp_step(one: SingleGPU, cluster: Cluster, *, muon_shared: bool = True, graphs: bool = True) -> StepTime:
    """Return the step with DDP.

    Args:
        muon_shared: each process orthogonalizes a share of the matrices, and fp16 directions are gathered.
        graphs: the processes train with CUDA graphs.
    """
    owned = one.muon.elements if muon_shared and one.muon is not None else 0
    muon = 0.0
    if owned and one.muon is not None:
        saved = one.muon.saved(cluster.num_processes, whole_stacks=True)
        gather = all_gather_seconds(2 * owned, cluster)
        if graphs:
            gather = max(gather - (one.muon.seconds - saved), _START)
        muon = gather - saved
    if graphs and _algorithm_bandwidth(cluster) >= FAST:
        communication = all_gather_seconds(one.gradient_bytes * owned, cluster)
        communication += all_reduce_seconds(one.gradient_bytes * (one.parameters - owned), cluster)
        return _step(one, cluster, communication, muon, graphs)
    bucket = _GRAPH_BUCKET if graphs else _BUCKET
    buckets = math.ceil(4 * one.parameters / bucket)
    scale = one.gradient_bytes / 4
    last = all_reduce_seconds(
        scale * min(max(4 * one.embedding_parameters, bucket), 4 * one.parameters), cluster
    )
    each = all_reduce_seconds(scale * 4 * one.parameters / buckets, cluster)
    hidden = max(buckets * each - last, 0.0)
    exposed = last + max(hidden - one.backward_seconds, 0.0)
    communication = exposed + _CONTENTION * min(hidden, one.backward_seconds)
    return _step(one, cluster, communication, muon, graphs)


def _algorithm_bandwidth(cluster: Cluster) -> float:
    """Return the bytes/s of a large all-reduce."""
    n = cluster.num_processes
    return cluster.bus_bandwidth * n / max(2 * (n - 1), 1)


def fsdp2_step(
    one: SingleGPU,
    cluster: Cluster,
    *,
    hybrid: bool = False,
    muon_shared: bool = True,
    graphs: bool = False,
) -> StepTime:
    """Return the step with FSDP2 in half precision, with blocks as units.

    Args:
        hybrid: HSDP: weights are sharded over the processes of a node, not over all.
        muon_shared: matrices are exchanged so that each process orthogonalizes a share of them; otherwise all
            gather the momentum in float32.
        graphs: the processes train with CUDA graphs.
    """
    shards = cluster
    if hybrid:
        shards = dataclasses.replace(cluster, num_processes=cluster.num_processes // cluster.nodes, nodes=1)

    def scatter_seconds(num_bytes: float) -> float:
        """Return the time of reducing gradients, between nodes each process by its share of the network."""
        seconds = all_gather_seconds(num_bytes, shards)
        if hybrid:
            network = cluster.network_bandwidth / shards.num_processes
            replicas = Cluster(cluster.nodes, cluster.nodes, math.inf, network)
            seconds += all_reduce_seconds(num_bytes / shards.num_processes, replicas)
        return seconds

    block, rest = (one.parameters - one.embedding_parameters) / one.layers, one.embedding_parameters
    gather, scatter = all_gather_seconds(2 * block, shards), scatter_seconds(4 * block)
    # Of the first and the last unit.
    communication = all_gather_seconds(2 * rest, shards) + scatter_seconds(4 * rest) + gather + scatter
    for seconds, compute, count in (
        (gather * (one.layers - 1), one.forward_seconds, one.micro_batches),
        (gather * one.layers, one.backward_seconds, one.micro_batches - 1),
        # Gradients are reduced with the last micro-batch.
        (gather * one.layers + scatter * (one.layers - 1), one.backward_seconds, 1),
    ):
        communication += count * (max(seconds - compute, 0.0) + _CONTENTION * min(seconds, compute))
    muon = 0.0
    if one.muon is not None and not muon_shared:
        muon = all_gather_seconds(4 * one.muon.elements, shards)
    elif one.muon is not None:
        # Momentum to its owner and directions back, in float32: each process sends its shard.
        muon = all_gather_seconds(8 * one.muon.elements / shards.num_processes, shards)
        muon -= one.muon.saved(shards.num_processes, whole_stacks=False)
    return _step(one, cluster, communication, muon, graphs)


def _step(one: SingleGPU, cluster: Cluster, communication: float, muon: float, graphs: bool) -> StepTime:
    """Return the step with what does not depend on the strategy."""
    n = cluster.num_processes
    if n == 1:
        return StepTime(one.seconds, 0.0, 0.0, 0.0, 0.0)
    rounds = one.layers * one.micro_batches
    busy = one.seconds + rounds * _LAUNCH_GAPS
    launches = _GRAPH_EXCHANGE if graphs else max(busy, rounds * _HOST_LAUNCHES) - one.seconds
    slowest = NormalDist().inv_cdf((n - 0.375) / (n + 0.25))
    spread = _GRAPH_SPREAD * one.seconds if graphs else _SPREAD
    return StepTime(one.seconds, launches, communication, muon, slowest * spread)
