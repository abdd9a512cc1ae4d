"""Generation speed, compared with `generate` of Hugging Face transformers: same weights, same process.

    python benchmarks/generation.py [--preset minimind-3] [--threads 2] [--rounds 12] [--tokens 24]
    python benchmarks/generation.py --batch 4
    python benchmarks/generation.py --device cuda --dtype bfloat16 --tokens 256

The two alternate, so that other load on the machine affects both. Both are greedy, and float32 unless
--dtype says otherwise. Printed are tokens per second of wall time and of processor time (which tells more on
a machine that is busy): the medians of the rounds, the best rounds, and the ratios. On a GPU the step is
compiled. Threads sleep while they wait for each other, unless OMP_WAIT_POLICY says otherwise.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

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
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    compiled = options.device == "cuda" if options.compile is None else options.compile
    dtype = getattr(torch, options.dtype)

    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    names = MiniMindConfig.__dataclass_fields__
    shape = MiniMindConfig(**{k: v for k, v in PRESETS[options.preset].items() if k in names})
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        # As a run delivers it: both read the same half-precision file.
        save_model(MiniMindForCausalLM(shape), Path(folder))
        ours = load_model(Path(folder)).to(options.device, dtype).eval()
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(options.device).eval()
    began = time.perf_counter()
    decoder = InferenceEngine(ours, compiled=compiled)
    packing = time.perf_counter() - began
    rng = torch.Generator().manual_seed(0)
    size = (options.batch, options.prompt_tokens)
    prompts = torch.randint(3, shape.vocab_size, size, generator=rng)
    on_device, as_lists = prompts.to(options.device), prompts.tolist()

    def minimind() -> int:
        return sum(map(len, generate(decoder, as_lists, GREEDY, max_new_tokens=options.tokens)))

    def transformers() -> int:
        written = theirs.generate(
            on_device,
            attention_mask=torch.ones_like(on_device),
            max_new_tokens=options.tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return (written.shape[1] - options.prompt_tokens) * options.batch

    rows = {"minimind": minimind, "transformers": transformers}
    for write in rows.values():
        timed(write, options.device)
        if compiled:
            timed(write, options.device)
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for _ in range(options.rounds):
        for name, write in rows.items():
            speeds[name].append(timed(write, options.device))

    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} threads"
    print(
        f"{options.preset} ({shape.num_parameters() / 1e6:.0f}M), {options.dtype}, {device}, batch "
        f"{options.batch}, {options.prompt_tokens} + {options.tokens} tokens, packed in {packing:.1f} s"
        + (", step compiled" if compiled else "")
    )
    print(f"{'tokens/s':<14} {'wall':>10} {'best':>10} {'processor':>10} {'best':>10}")
    for name, measured in speeds.items():
        columns = [f(x[i] for x in measured) for i in (0, 1) for f in (statistics.median, max)]
        print(f"{name:<14} " + " ".join(f"{value:10.1f}" for value in columns))
    pairs = list(zip(speeds["minimind"], speeds["transformers"], strict=True))
    ratios = []
    for i in (0, 1):
        ratios.append(statistics.median(a[i] / b[i] for a, b in pairs))
        ratios.append(max(a[i] for a, _ in pairs) / max(b[i] for _, b in pairs))
    print(f"{'ratio':<14} " + " ".join(f"{value:9.2f}x" for value in ratios))


if __name__ == "__main__":
    main()
