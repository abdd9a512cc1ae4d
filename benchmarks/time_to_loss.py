"""Time that minimind takes to the losses of two baselines after one epoch, on the same text and device.

The baselines train Qwen3 of transformers, eager, on one document per sequence, cut to --max-seq-len and
tokenized by the workers of a DataLoader, 32 sequences a step, with the settings usual for it: AdamW at 5e-4
with torch's betas and weight decay, a cosine down to a tenth without warm-up, autocast to bf16 on a GPU.

    loop      the loop of plain_loop.py, which pads each sequence to --max-seq-len
    trainer   Trainer of transformers with its data collator for causal language modeling, which pads to the
              longest sequence of a micro-batch; its other settings are the defaults

Their weights are measured as in `pretrain`: bits per byte of the same held-out documents, packed.

minimind trains by whole `pretrain` runs, each with its schedule brought to the end; their lengths close in on
the shortest that reaches the lowest loss of the baselines. Each baseline is compared with the fastest run
that reaches its loss. The first run starts with empty caches of tokens and compiled code; its start is part
of `from the command`. `training alone` is all steps at the speed after warm-up. One GPU is used.

    python benchmarks/time_to_loss.py --preset minimind2-small --data en.jsonl zh.jsonl -- --optimizer muon
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from plain_loop import IGNORED, Documents, hugging_face_model

from minimind.config.options import PretrainConfig
from minimind.config.presets import PRESETS, preset_config
from minimind.data.builtin_corpus import builtin_documents
from minimind.data.loader import evaluation_batches
from minimind.data.prepare import prepare_data
from minimind.distributed.accelerator import close_accelerator, start_accelerator
from minimind.errors import needs_package
from minimind.evaluation.validation import evaluate
from minimind.modeling.transformer import MiniMindForCausalLM
from minimind.tokenizer import load_tokenizer
from minimind.training.build_model import resolve_model_config

LEARNING_RATE = 5e-4
WARMUP_STEPS = 5
LOG_INTERVAL = 100
HELD_OUT = 0.05
# The length of the first run, as a share of an epoch; the next ones are shorter or longer by this factor.
FIRST_SHARE = 0.25
FACTOR = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", default="tiny", choices=PRESETS)
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="FILE", help="JSONL beside the text in Python"
    )
    parser.add_argument("--max-documents", type=int, help="take so many at random; default: all")
    parser.add_argument("--baselines", nargs="+", choices=BASELINES, default=list(BASELINES))
    parser.add_argument("--plain-batch-size", type=int, default=32, help="of the baselines")
    parser.add_argument("--batch-size", type=int, default=16, help="of minimind")
    parser.add_argument("--max-seq-len", type=int, default=512)
    parser.add_argument("--runs", type=int, default=5, help="of minimind, at most")
    parser.add_argument("--minutes", type=float, default=4.0, help="begin no run that would end later")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8), help="of the DataLoader")
    parser.add_argument("--json", metavar="PATH", help="write the results there")
    parser.add_argument("--only", nargs=2, metavar=("BASELINE", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("extra", nargs="*", help="further options of pretrain for minimind, after --")
    options = parser.parse_args()
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "trainer" in options.baselines and not importlib.util.find_spec("transformers"):
        parser.error(needs_package("--baselines trainer", "transformers"))
    if options.only:
        baseline, folder = options.only
        print("RESULT " + json.dumps(run_baseline(options, baseline, Path(folder))))
        return
    began = time.perf_counter()
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {os.cpu_count()} cores"
    title = f"{name}, torch {torch.__version__}, {datetime.date.today()}; {options.preset}"
    with tempfile.TemporaryDirectory() as folder:
        documents = write_documents(options, Path(folder))
        print(f"{title}\n{documents}\n", flush=True)
        baselines = {name: run_apart(options, name, Path(folder)) for name in options.baselines}
        target = min(baseline["bits_per_byte"] for baseline in baselines.values())
        runs = shortest_run(options, Path(folder), target, deadline=began + 60 * options.minutes)
    report(baselines, runs)
    if options.json:
        summary = {"machine": title, "options": vars(options), "baselines": baselines, "minimind": runs}
        Path(options.json).write_text(json.dumps(summary, indent=1))


def write_documents(options: argparse.Namespace, folder: Path) -> str:
    """Write train.jsonl and val.jsonl, and say what is in them."""
    texts = list(builtin_documents())
    for path in options.data:
        texts += [json.loads(line)["text"] for line in Path(path).read_text("utf-8").split("\n") if line]
    random.Random(0).shuffle(texts)
    texts = texts[: options.max_documents]
    held_out = max(round(len(texts) * HELD_OUT), 1)
    for file, part in (("val.jsonl", texts[:held_out]), ("train.jsonl", texts[held_out:])):
        lines = (json.dumps({"text": text}) + "\n" for text in part)
        (folder / file).write_text("".join(lines), encoding="utf-8")
    size = sum(len(text.encode()) for text in texts[held_out:]) / 1e6
    return f"{len(texts) - held_out:,} documents of {size:.1f} MB to train on, {held_out:,} held out"


def run_apart(options: argparse.Namespace, baseline: str, folder: Path) -> dict[str, Any]:
    """Run a baseline in a separate process."""
    command = [sys.executable, __file__, "--only", baseline, folder, "--preset", options.preset]
    command += ["--baselines", baseline]
    for key in ("plain_batch_size", "max_seq_len", "device", "workers"):
        command += ["--" + key.replace("_", "-"), getattr(options, key)]
    began = time.perf_counter()
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment(options, folder)
    )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            result = json.loads(line.removeprefix("RESULT "))
            result["wall"] = time.perf_counter() - began - result["not_counted"]
            print(f"{baseline}: {json.dumps(result)}", file=sys.stderr, flush=True)
            return result
    sys.exit(done.stdout[-2000:] + done.stderr[-4000:])


def environment(options: argparse.Namespace, folder: Path) -> dict[str, str]:
    values = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    if options.device == "cpu":
        values |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    else:
        # The Trainer would split each batch over all GPUs of the machine.
        values.setdefault("CUDA_VISIBLE_DEVICES", "0")
    return values


def _data(options: argparse.Namespace, folder: Path) -> PretrainConfig:
    return preset_config(
        options.preset,
        optimizer="adamw",
        data=(str(folder / "train.jsonl"),),
        val_data=(str(folder / "val.jsonl"),),
        cache_dir=str(folder / "cache-of-baselines"),
        max_seq_len=options.max_seq_len,
    )


def run_baseline(options: argparse.Namespace, baseline: str, folder: Path) -> dict[str, float]:
    """Train one epoch and measure the result; times in seconds."""
    torch.manual_seed(0)
    model = hugging_face_model(_data(options, folder)).to(options.device).train()
    watch = Stopwatch(options.device)
    BASELINES[baseline](options, folder, model, watch)
    return {
        "share": 1.0,
        "bits_per_byte": measure(options, folder, model.state_dict()),
        "steps": watch.steps,
        "training": watch.training,
        "not_counted": time.perf_counter() - watch.ended,
    }


class Stopwatch:
    """Times an epoch: `training` is all steps at the speed after warm-up, in seconds."""

    def __init__(self, device: str) -> None:
        self.training = self.ended = 0.0
        self.steps = self._warm_up = 0
        self._device = device
        self._began = time.perf_counter()

    def begin_step(self) -> None:
        """Count a step."""
        if self.steps == WARMUP_STEPS:
            self._warm_up, self._began = WARMUP_STEPS, self._now()
        self.steps += 1

    def stop(self) -> None:
        """Set `training` and `ended`."""
        self.ended = self._now()
        self.training = (self.ended - self._began) / (self.steps - self._warm_up) * self.steps

    def _now(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def train_by_loop(
    options: argparse.Namespace, folder: Path, model: torch.nn.Module, watch: Stopwatch
) -> None:
    """Train by the loop that is commonly written."""
    device = torch.device(options.device)
    loader = torch.utils.data.DataLoader(
        Documents([str(folder / "train.jsonl")], options.max_seq_len),
        batch_size=options.plain_batch_size,
        shuffle=True,
        num_workers=options.workers,
        pin_memory=options.device == "cuda",
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for step, batch in enumerate(loader):
        watch.begin_step()
        factor = 0.1 + 0.45 * (1 + math.cos(math.pi * step / len(loader)))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * factor
        input_ids, labels = (batch[name].to(device) for name in ("input_ids", "labels"))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % LOG_INTERVAL == 0:
            print(f"step {step} loss {loss.item():.4f}")
    watch.stop()


class UnpaddedDocuments(Documents):
    """The same sequences before padding, which the data collator adds."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = super().__getitem__(index)
        return {"input_ids": item["input_ids"][item["labels"] != IGNORED]}


def train_by_trainer(
    options: argparse.Namespace, folder: Path, model: torch.nn.Module, watch: Stopwatch
) -> None:
    """Train by the Trainer of transformers."""
    import transformers

    class Counting(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            watch.begin_step()

    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=options.plain_batch_size,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        weight_decay=0.01,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        bf16=options.device == "cuda",
        use_cpu=options.device == "cpu",
        dataloader_num_workers=options.workers,
        dataloader_pin_memory=options.device == "cuda",
        logging_steps=LOG_INTERVAL,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    load_tokenizer(None).save(folder / "tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    trainer = transformers.Trainer(
        model,
        arguments,
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=UnpaddedDocuments([str(folder / "train.jsonl")], options.max_seq_len),
        callbacks=[Counting()],
    )
    trainer.train()
    watch.stop()
    # Measuring starts Accelerate again.
    close_accelerator(trainer.accelerator)


BASELINES = {"loop": train_by_loop, "trainer": train_by_trainer}


def measure(options: argparse.Namespace, folder: Path, weights: dict[str, torch.Tensor]) -> float:
    """Return the validation bits per byte of weights with Hugging Face's names, as `pretrain` has them."""
    tokenizer = load_tokenizer(None)
    config, shape = resolve_model_config(_data(options, folder), tokenizer)
    accelerator = start_accelerator(config)
    model = MiniMindForCausalLM(shape)
    model.load_state_dict(weights)
    held_out = prepare_data(config, tokenizer).validation
    assert held_out is not None
    table = torch.zeros(shape.vocab_size)
    table[: tokenizer.vocab_size] = torch.from_numpy(tokenizer.bytes_per_token())
    batches = evaluation_batches(
        held_out,
        seq_len=config.max_seq_len,
        packing=True,
        batch_size=options.batch_size,
        process_index=0,
        num_processes=1,
        device=accelerator.device,
    )
    prepared = accelerator.prepare_model(model)
    result = evaluate(prepared, batches, table.to(accelerator.device), accelerator)
    assert result is not None
    return result.bits_per_byte


def shortest_run(
    options: argparse.Namespace, folder: Path, target: float, deadline: float
) -> list[dict[str, Any]]:
    """Return minimind's runs, whose lengths close in on the shortest that reaches `target` bits per byte."""
    attempt = partial(run_minimind, options, folder)
    runs: list[dict[str, Any]] = []
    too_short, enough = 0.0, math.inf
    share = FIRST_SHARE
    while len(runs) < options.runs:
        # After the first run, starting is quick.
        if runs and time.perf_counter() + 1.5 * runs[-1]["wall"] > deadline:
            print("no time for a further run", file=sys.stderr)
            break
        run = attempt(share, number=len(runs))
        run["reached"] = run["bits_per_byte"] <= target
        runs.append(run)
        print(f"minimind: {json.dumps(run)}", file=sys.stderr, flush=True)
        if run["reached"]:
            enough = min(enough, share)
        else:
            too_short = max(too_short, share)
        if math.isinf(enough):
            share *= FACTOR
        elif too_short == 0:
            share /= FACTOR
        elif enough / too_short < 1.1:
            break
        else:
            share = math.sqrt(enough * too_short)
    return runs


def run_minimind(options: argparse.Namespace, folder: Path, share: float, number: int) -> dict[str, Any]:
    """Run `pretrain` on a share of an epoch, or several epochs, to the end of its schedule."""
    out = folder / f"run-{number}"
    tokens = _tokens(options, folder) * share
    steps = max(round(tokens / options.batch_size / options.max_seq_len), 4)
    command = [
        *(sys.executable, "-m", "minimind_cli", "pretrain", "--preset", options.preset),
        *("--data", folder / "train.jsonl", "--val-data", folder / "val.jsonl"),
        *("--batch-size", options.batch_size, "--max-seq-len", options.max_seq_len),
        *("--epochs", math.ceil(share) + 1, "--max-steps", steps, "--log-interval", max(steps // 20, 1)),
        *("--save-interval", steps, "--eval-interval", steps, "--tracker", "none"),
        # Tokenized every time: it counts in the time from the command to the loss.
        *("--output-dir", out, "--cache-dir", out / "cache", *options.extra),
    ]
    began = time.perf_counter()
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment(options, folder)
    )
    wall = time.perf_counter() - began
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    trained = max(row["tokens"] for row in rows if "tokens" in row)
    training = trained / rows[-1]["total_tokens_per_second"]
    return {
        "share": share,
        "steps": steps,
        "bits_per_byte": [row for row in rows if "val_loss" in row][-1]["val_bits_per_byte"],
        "training": training,
        "wall": wall,
        "start": wall - training,
    }


def _tokens(options: argparse.Namespace, folder: Path) -> int:
    return prepare_data(_data(options, folder), load_tokenizer(None)).train.num_tokens


def report(baselines: dict[str, dict[str, Any]], runs: list[dict[str, Any]]) -> None:
    """Print the losses reached, both times, and their ratios to each baseline."""
    print(f"{'':<10}{'bits/byte':>11}{'steps':>8}{'epochs':>8}{'training alone':>16}{'from the command':>18}")
    rows = [(name, plain, plain["wall"]) for name, plain in baselines.items()]
    rows += [("minimind", run, run["training"] + runs[0]["start"]) for run in runs]
    for name, row, whole in rows:
        print(
            f"{name:<10}{row['bits_per_byte']:>11.4f}{row['steps']:>8}{row['share']:>8.2f}"
            f"{row['training']:>14.1f} s{whole:>16.1f} s{'' if row.get('reached', True) else '  not reached'}"
        )
    for name, plain in baselines.items():
        loss = f"the {plain['bits_per_byte']:.4f} bits/byte of {name}"
        reached = [run["training"] for run in runs if run["bits_per_byte"] <= plain["bits_per_byte"]]
        if not reached:
            print(f"{loss} were not reached")
            continue
        alone = plain["training"] / min(reached)
        whole = plain["wall"] / (min(reached) + runs[0]["start"])
        print(f"{alone:.1f} times as fast to {loss}, {whole:.1f} times from the command")


if __name__ == "__main__":
    main()
