"""Generation speed, compared with `generate` of Hugging Face transformers: same weights, same process.

    python benchmarks/generation.py [--preset minimind-3] [--threads 2] [--rounds 12] [--tokens 24]
    python benchmarks/generation.py --batch 4
    python benchmarks/generation.py --device cuda --dtype bfloat16 [--batch 1 64] [--profile]

The programs alternate, so that other load on the machine affects all. They are greedy, except for the row
`sampled`, and float32 unless --dtype says otherwise. Printed are tokens per second of wall time and of
processor time (which tells more on a machine that is busy): the medians of the rounds, the best rounds, and
the ratios. Threads sleep while they wait for each other, unless OMP_WAIT_POLICY says otherwise.

On a GPU `sampled` has the default temperature and top-k, `eager` is the engine without a CUDA graph, and
--compile adds the engine with a compiled step. `eager` and transformers generate a fraction of the tokens,
since their speed does not depend on the length there. --profile adds the kernels of a decoding step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Read when torch is loaded. Threads that spin take the core that another one waits for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from minimind.config.presets import PRESETS
from minimind.formats.huggingface import load_model, save_model
from minimind.generation.engine import InferenceEngine
from minimind.generation.generate import generate
from minimind.generation.sampling import Sampling
from minimind.modeling.config import MiniMindConfig
from minimind.modeling.transformer import MiniMindForCausalLM

GREEDY = Sampling(temperature=0)


def timed(write: Callable[[], int], device: str) -> tuple[float, float]:
    """Return tokens per second of wall time and of processor time."""
    if device == "cuda":
        torch.cuda.synchronize()
    wall, processor = time.perf_counter(), time.process_time()
    tokens = write()
    if device == "cuda":
        torch.cuda.synchronize()
    return tokens / (time.perf_counter() - wall), tokens / (time.process_time() - processor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="minimind-3", choices=[*PRESETS])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="default: 12, on a GPU 3")
    parser.add_argument("--tokens", type=int, help="default: 24, on a GPU 512")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--batch", type=int, nargs="+", help="default: 1, on a GPU 1 and 64")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    on_gpu = options.device == "cuda"
    options.rounds = options.rounds or (3 if on_gpu else 12)
    options.tokens = options.tokens or (512 if on_gpu else 24)
    ours, theirs = load(options.preset, options.device, getattr(torch, options.dtype))
    began = time.perf_counter()
    decoder = InferenceEngine(ours)
    packing = time.perf_counter() - began
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {options.threads} threads"
    parameters = ours.config.num_parameters() / 1e6
    print(
        f"{options.preset} ({parameters:.0f}M), {options.dtype}, {device}, {options.prompt_tokens} + "
        f"{options.tokens} tokens, packed in {packing:.1f} s, torch {torch.__version__}"
    )
    for batch_size in options.batch or ([1, 64] if on_gpu else [1]):
        rng = torch.Generator().manual_seed(0)
        prompts = torch.randint(3, ours.config.vocab_size, (batch_size, options.prompt_tokens), generator=rng)
        fewer = max(options.tokens // 8, 1) if on_gpu else options.tokens
        programs = {"minimind": generation(decoder, prompts, options.tokens)}
        if options.compile:
            compiled = InferenceEngine(ours, compiled=True)
            programs["compiled"] = generation(compiled, prompts, options.tokens)
        if on_gpu:
            programs["sampled"] = generation(decoder, prompts, options.tokens, Sampling())
            programs["eager"] = generation(InferenceEngine(ours, capture=False), prompts, fewer)
        programs["transformers"] = their_generation(theirs, prompts.to(options.device), fewer)
        compare(programs, batch_size, options)
        if options.profile:
            for name in ("minimind", "sampled"):
                profile(name, programs[name], options.tokens)


def load(preset: str, device: str, dtype: torch.dtype) -> tuple[MiniMindForCausalLM, Any]:
    """Return the model and that of transformers with the same weights."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    names = MiniMindConfig.__dataclass_fields__
    shape = MiniMindConfig(**{k: v for k, v in PRESETS[preset].items() if k in names})
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        # As a run delivers it: both read the same half-precision file.
        save_model(MiniMindForCausalLM(shape), Path(folder))
        ours = load_model(Path(folder)).to(device, dtype).eval()
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    return ours, theirs


def generation(
    engine: InferenceEngine, prompts: torch.Tensor, count: int, sampling: Sampling = GREEDY
) -> Callable[[], int]:
    """Return what generates `count` tokens for each prompt and returns their number."""
    as_lists = prompts.tolist()
    return lambda: sum(map(len, generate(engine, as_lists, sampling, max_new_tokens=count, seed=0)))


def their_generation(model: Any, prompts: torch.Tensor, count: int) -> Callable[[], int]:
    """Return `generation` of transformers."""

    def run() -> int:
        written = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return (written.shape[1] - prompts.shape[1]) * len(prompts)

    return run


def compare(programs: dict[str, Callable[[], int]], batch_size: int, options: argparse.Namespace) -> None:
    """Run the programs in turn, and print their speeds and the ratio of the first to the last."""
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    print(
        f"\nbatch {batch_size:<8} {'wall':>10} {'best':>10} {'processor':>10} {'best':>10} tokens/s",
        flush=True,
    )
    for name, write in programs.items():
        began = time.perf_counter()
        timed(write, options.device)
        print(f"{name:<14} first call {time.perf_counter() - began:.1f} s", flush=True)
    for _ in range(options.rounds):
        for name, write in programs.items():
            speeds[name].append(timed(write, options.device))
    for name, measured in speeds.items():
        columns = [f(x[i] for x in measured) for i in (0, 1) for f in (statistics.median, max)]
        print(f"{name:<14} " + " ".join(f"{value:10.1f}" for value in columns), flush=True)
    ours, *_, theirs = speeds.values()
    ratios = []
    for i in (0, 1):
        ratios.append(statistics.median(a[i] / b[i] for a, b in zip(ours, theirs, strict=True)))
        ratios.append(max(a[i] for a in ours) / max(b[i] for b in theirs))
    print(f"{'ratio':<14} " + " ".join(f"{value:9.2f}x" for value in ratios), flush=True)


def profile(name: str, write: Callable[[], int], steps: int) -> None:
    """Print the kernels of a decoding step, with those of the prompts divided by the number of steps."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as recorded:
        write()
        torch.cuda.synchronize()
    kernels = sorted(recorded.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
    total = sum(kernel.self_device_time_total for kernel in kernels)
    print(f"\n{name}: kernels take {total / steps:.1f} us a step")
    for kernel in kernels[:24]:
        time_us = kernel.self_device_time_total
        print(
            f"{time_us / steps:8.1f} us a step {kernel.count / steps:6.1f} x {time_us / kernel.count:7.2f} us"
            f"  {kernel.key[:90]}",
            flush=True,
        )


if __name__ == "__main__":
    main()
