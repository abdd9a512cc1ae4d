"""minimind against the loop that people write by hand, and against the Trainer of Hugging Face.

All contenders train a model of the same configuration on the same JSONL files, one after the other on this
machine, each in a separate process. What is compared is real tokens per second: targets that are not padding
and belong to the document of the tokens before them. On a CPU that has other work to do, look at those per
second of processor time (of the training process, without the workers of a DataLoader), and give --threads 1:
threads that wait for each other hardly move there.

    plain     Qwen3ForCausalLM of transformers (minimind's model, if that is not installed), eager; text
              tokenized by the workers of a torch DataLoader in every epoch; one document per sequence, cut
              and padded; autocast to bf16 on a GPU; AdamW; clipping; loss.item() at each log
    trainer   Trainer of transformers on the same sequences, tokenized ahead; torch_compile, and bf16 on a GPU
    trainer-packed  the same on full sequences: documents joined and cut, seeing each other
    padded    minimind with --no-packing: the same sequences
    packed    minimind as it is by default: documents laid end to end, none cut, none seeing another

A fast device needs more sequences per step than the plain loop has: --packed-batch-size sets those of the two
contenders on full sequences.

    python benchmarks/plain_loop.py --preset tiny --seconds 30 --data zh.jsonl --data en.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minimind import PretrainConfig, load_tokenizer, pretrain
from minimind.config.presets import PRESETS, preset_config
from minimind.data.builtin_corpus import builtin_documents
from minimind.data.prepare import prepare_data
from minimind.modeling.transformer import MiniMindForCausalLM
from minimind.training.build_model import resolve_model_config

CONTENDERS = ("plain", "trainer-packed", "packed", "padded", "trainer")
FULL_ROWS = ("trainer-packed", "packed")
# Steps that are not measured: they compile kernels, fill memory pools and start workers.
WARMUP_STEPS = 5
LOG_INTERVAL = 10
IGNORED = -100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", default="tiny", choices=PRESETS)
    parser.add_argument(
        "--data", action="append", help="JSONL with a text field, repeatable; default: embedded"
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="measured time of each contender")
    parser.add_argument("--rounds", type=int, default=1, help="of all contenders; the best of each counts")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--packed-batch-size", type=int, help="of contenders on full sequences; default: the same"
    )
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "muon"), help="of minimind")
    parser.add_argument("--minutes", type=float, help="begin no contender later than this")
    parser.add_argument("--max-seq-len", type=int, default=512)
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8), help="of the DataLoader")
    parser.add_argument("--threads", type=int, help="of PyTorch on a CPU; default: its own choice")
    parser.add_argument("--json", metavar="PATH", help="write the results there")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.packed_batch_size = options.packed_batch_size or options.batch_size
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        options.data = options.data or [_embedded_corpus(Path(folder))]
        if options.contender:
            result = RUNNERS[options.contender](options, Path(folder))
            print("RESULT " + json.dumps(result))
        else:
            compare(options)


def compare(options: argparse.Namespace) -> None:
    """Run each contender in a separate process and print a table."""
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {os.cpu_count()} cores"
    title = f"{name}, torch {torch.__version__}, Python {platform.python_version()}"
    print(
        f"{title}\npreset {options.preset}, {options.batch_size} sequences of {options.max_seq_len}, "
        f"{options.packed_batch_size} full ones\n",
        flush=True,
    )
    results: dict[str, dict[str, Any]] = {}
    began = time.perf_counter()
    # Round after round, so that whatever else the machine does for a while hits all alike.
    for contender in list(options.contenders) * options.rounds:
        if options.minutes and time.perf_counter() - began > 60 * options.minutes:
            print(f"no time for {contender}", file=sys.stderr, flush=True)
            continue
        result = run_apart(contender, options)
        if result is not None:
            before = results.get(contender, result)
            results[contender] = max(before, result, key=lambda r: r["tokens_per_second"])
    head = ("real tokens/s", "of plain", "of trainer", "per CPU second", "of plain", "padding", "steps/s")
    print(f"{'contender':<15}" + "".join(f"{name:>15}" for name in head))

    def ratio(contender: str, base: str, name: str) -> str:
        return f"{results[contender][name] / results[base][name]:.2f}x" if base in results else "-"

    for contender, result in results.items():
        trainer = "trainer-packed" if contender in FULL_ROWS else "trainer"
        cells = [
            f"{result['tokens_per_second']:,.0f}",
            ratio(contender, "plain", "tokens_per_second"),
            ratio(contender, trainer, "tokens_per_second"),
            f"{result['tokens_per_cpu_second']:,.0f}",
            ratio(contender, "plain", "tokens_per_cpu_second"),
            f"{result['padding']:.1%}",
            f"{result['steps_per_second']:.2f}",
        ]
        print(f"{contender:<15}" + "".join(f"{cell:>15}" for cell in cells))
    if options.json:
        summary = {"machine": title, "options": vars(options), "results": results}
        Path(options.json).write_text(json.dumps(summary, indent=1))


def run_apart(contender: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """Run a contender in a separate process; None where it failed."""
    command = [sys.executable, __file__, "--contender", contender, "--preset", options.preset]
    command += [word for path in options.data for word in ("--data", path)]
    keys = ("seconds", "device", "batch_size", "packed_batch_size", "max_seq_len", "workers", "optimizer")
    for key in keys:
        command += ["--" + key.replace("_", "-"), str(getattr(options, key))]
    environment = dict(os.environ)
    if options.device == "cpu":
        environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
        if options.threads:
            environment["OMP_NUM_THREADS"] = str(options.threads)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            print(f"{contender}: {line}", file=sys.stderr, flush=True)
            return json.loads(line.removeprefix("RESULT "))
    reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
    print(f"{contender} failed: {reason}", file=sys.stderr, flush=True)
    return None


def _embedded_corpus(folder: Path) -> str:
    path = folder / "corpus.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for text in builtin_documents():
            file.write(json.dumps({"text": text}) + "\n")
    return str(path)


def _config(options: argparse.Namespace, **changes: Any) -> PretrainConfig:
    values = {
        "data": tuple(options.data),
        "batch_size": options.batch_size,
        "max_seq_len": options.max_seq_len,
        "optimizer": "adamw",
        **changes,
    }
    return preset_config(options.preset, **values)


class Stopwatch:
    """Counts steps and real targets from the end of warm-up until the time is over.

    A document's first token inside a full sequence is no real target for the token before it.
    """

    def __init__(self, seconds: float, device: str) -> None:
        self._begins = load_tokenizer(None).bos_token_id
        self._seconds, self._device = seconds, device
        self._began = self._cpu_began = 0.0
        self._seen = 0
        self._targets: list[torch.Tensor] = []
        self._places = 0

    def step(self, labels: torch.Tensor) -> bool:
        """Count a step with its labels (B, T), which are not shifted; return whether to stop."""
        self._seen += 1
        if self._seen == WARMUP_STEPS:
            self._wait()
            self._began, self._cpu_began = time.perf_counter(), time.process_time()
        elif self._seen > WARMUP_STEPS:
            self._targets.append(((labels[:, 1:] != IGNORED) & (labels[:, 1:] != self._begins)).sum())
            self._places += labels.numel()
            return time.perf_counter() - self._began >= self._seconds
        return False

    def result(self) -> dict[str, float]:
        """Return the speed, and the share of all places that had no target."""
        self._wait()
        elapsed = time.perf_counter() - self._began
        cpu_seconds = time.process_time() - self._cpu_began
        targets = int(torch.stack(self._targets).sum())
        return {
            "tokens_per_second": targets / elapsed,
            "tokens_per_cpu_second": targets / cpu_seconds,
            "padding": 1 - targets / self._places,
            "steps_per_second": len(self._targets) / elapsed,
        }

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


class Documents(torch.utils.data.Dataset):
    """Rows of one document each, tokenized when they are asked for, cut and padded to one length."""

    def __init__(self, paths: list[str], seq_len: int) -> None:
        # Not splitlines: text may hold other characters that Python takes for the end of a line.
        lines = (line for path in paths for line in Path(path).read_text(encoding="utf-8").split("\n"))
        self._texts = [json.loads(line)["text"] for line in lines if line]
        self._tokenizer = load_tokenizer(None)
        self._seq_len = seq_len

    def __len__(self) -> int:
        return len(self._texts)

    def whole(self, index: int) -> torch.Tensor:
        """Return all tokens of a document with those around it."""
        t = self._tokenizer
        return torch.tensor([t.bos_token_id, *t.encode(self._texts[index]), t.eos_token_id])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        t = self._tokenizer
        ids = [t.bos_token_id, *t.encode(self._texts[index])[: self._seq_len - 2], t.eos_token_id]
        blank = self._seq_len - len(ids)
        input_ids = torch.tensor(ids + [t.pad_token_id] * blank)
        return {"input_ids": input_ids, "labels": torch.tensor(ids + [IGNORED] * blank)}


class FullSequences(torch.utils.data.Dataset):
    """Rows of one length cut from documents that were tokenized ahead and joined."""

    def __init__(self, documents: Documents, seq_len: int) -> None:
        ids = torch.cat([documents.whole(index) for index in range(len(documents))])
        self._sequences = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._sequences[index], "labels": self._sequences[index]}


def hugging_face_model(config: PretrainConfig) -> torch.nn.Module:
    """Return Qwen3ForCausalLM in the shape asked for, or minimind's model without transformers."""
    _, shape = resolve_model_config(config, load_tokenizer(None))
    try:
        from transformers import Qwen3Config, Qwen3ForCausalLM
    except ImportError:
        return MiniMindForCausalLM(shape)
    return Qwen3ForCausalLM(Qwen3Config.from_dict(shape.to_dict()))


def endless(sequences: torch.utils.data.Dataset) -> torch.utils.data.Sampler:
    """Return an endless order, so that workers do not restart after each epoch of a small file."""
    return torch.utils.data.RandomSampler(sequences, replacement=True, num_samples=10**8)


def run_plain(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """The loop that is commonly written."""
    config = _config(options)
    torch.manual_seed(0)
    model = hugging_face_model(config)
    device = torch.device(options.device)
    model = model.to(device).train()
    documents = Documents(options.data, options.max_seq_len)
    loader = torch.utils.data.DataLoader(
        documents,
        batch_size=options.batch_size,
        sampler=endless(documents),
        num_workers=options.workers,
        pin_memory=options.device == "cuda",
        drop_last=True,
    )
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.peak_learning_rate,
        betas=(0.9, 0.95),
        weight_decay=config.matrix_weight_decay,
    )
    watch = Stopwatch(options.seconds, options.device)
    step = 0
    while True:
        for batch in loader:
            input_ids, labels = (batch[name].to(device) for name in ("input_ids", "labels"))
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(input_ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % LOG_INTERVAL == 0:
                print(f"step {step} loss {loss.item():.4f}")
            if watch.step(batch["labels"]):
                return watch.result()


def run_trainer(options: argparse.Namespace, folder: Path, *, packing: bool) -> dict[str, float]:
    """Trainer with torch_compile, on sequences that were tokenized before the clock starts."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    config = _config(options)
    torch.manual_seed(0)
    watch = Stopwatch(options.seconds, options.device)
    over = threading.Event()

    class Counting(Trainer):
        def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
            return endless(sequences)

        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> Any:
            loss = super().training_step(model, inputs, *rest, **more)
            if watch.step(inputs["labels"]):
                over.set()
            return loss

    class Stop(TrainerCallback):
        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = over.is_set()

    documents = Documents(options.data, options.max_seq_len)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=options.packed_batch_size if packing else options.batch_size,
        max_steps=1_000_000,
        learning_rate=config.peak_learning_rate,
        weight_decay=config.matrix_weight_decay,
        max_grad_norm=config.grad_clip,
        bf16=options.device == "cuda",
        use_cpu=options.device == "cpu",
        torch_compile=True,
        dataloader_num_workers=min(options.workers, 2),
        dataloader_drop_last=True,
        logging_steps=LOG_INTERVAL,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    sequences: Any
    if packing:
        sequences = FullSequences(documents, options.max_seq_len)
    else:
        sequences = [documents[index] for index in range(len(documents))]
    trainer = Counting(hugging_face_model(config), arguments, train_dataset=sequences, callbacks=[Stop()])
    trainer.train()
    return watch.result()


def run_minimind(options: argparse.Namespace, folder: Path, *, packing: bool) -> dict[str, float]:
    """`pretrain` itself, asked to stop when the time is over; the speed is the one that it reports."""
    out = folder / "run"
    batch_size = options.packed_batch_size if packing else options.batch_size
    config = _config(
        options,
        packing=packing,
        batch_size=batch_size,
        optimizer=options.optimizer,
        cache_dir=str(folder / "cache"),
        output_dir=str(out),
        epochs=100_000,
        # A report costs a GPU little and a CPU nothing, but the slower device wants finer marks.
        log_interval=LOG_INTERVAL if options.device == "cuda" else 1,
        eval_batches=1,
        save_interval=10_000_000,
        tracker=("none",),
    )
    shards = prepare_data(config, load_tokenizer(None), None).train

    marks: list[tuple[float, int]] = []

    def mark() -> None:
        marks.append((time.process_time(), _reports(out)[-1]["tokens"]))

    def stop_in_time() -> None:
        while len(_reports(out)) < WARMUP_STEPS:
            time.sleep(0.05)
        mark()
        time.sleep(options.seconds)
        done = len(_reports(out))
        while len(_reports(out)) == done:
            time.sleep(0.05)
        mark()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_in_time, daemon=True).start()
    pretrain(config, handle_signals=True)
    first, *_, last = _reports(out)[WARMUP_STEPS - 1 :]
    elapsed, tokens = (last[name] - first[name] for name in ("elapsed", "tokens"))
    steps = last["step"] - first["step"]
    # Tokens are counted as inputs. Packed, the one before each document's first has no target.
    share = 1 - shards.num_documents / shards.num_tokens if packing else 1.0
    targets = tokens * share
    places = steps * batch_size * options.max_seq_len
    return {
        "tokens_per_second": targets / elapsed,
        "tokens_per_cpu_second": (marks[1][1] - marks[0][1]) * share / (marks[1][0] - marks[0][0]),
        "padding": 1 - targets / places,
        "steps_per_second": steps / elapsed,
    }


def _reports(out: Path) -> list[dict[str, Any]]:
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [row for row in rows if "learning_rate" in row]


RUNNERS: dict[str, Callable[[argparse.Namespace, Path], dict[str, float]]] = {
    "plain": run_plain,
    "trainer": lambda options, folder: run_trainer(options, folder, packing=False),
    "trainer-packed": lambda options, folder: run_trainer(options, folder, packing=True),
    "padded": lambda options, folder: run_minimind(options, folder, packing=False),
    "packed": lambda options, folder: run_minimind(options, folder, packing=True),
}


if __name__ == "__main__":
    main()
