"""How well a model predicts given text: in all, by source, and by how much of a document it has seen.

Shapes: B rows, T tokens, F files, P ranges of context.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from numpy.typing import NDArray

from ..config.options import AUTO, PretrainConfig
from ..data.eval_windows import EvalBatch, document_windows, packed_windows, window_batch
from ..data.packing import IGNORED
from ..data.prepare import prepare_data
from ..data.shards import TokenShards
from ..data.sources import DataSource, read_sources
from ..distributed.accelerator import check_launch, close_accelerator, start_accelerator
from ..distributed.collectives import sum_over_processes
from ..distributed.consistency import check_same_on_all_ranks, run_signature, weights_fingerprint
from ..distributed.failures import report_peer_failures
from ..errors import ConfigError
from ..formats.open_model import load_with_tokenizer
from ..modeling.transformer import MiniMindForCausalLM
from ..tokenizer import Tokenizer
from .validation import Evaluation


@dataclass(frozen=True)
class Part:
    """The targets of one entry of --data, one file, or one range of context.

    Attributes:
        name: the entry, the file, or the range, such as `16-31`.
        evaluation: over these targets.
        files: of an entry.
    """

    name: str
    evaluation: Evaluation
    files: tuple[Part, ...] = ()


@dataclass(frozen=True)
class TextEvaluation:
    """What an evaluation found.

    Attributes:
        model: where its weights lie.
        max_seq_len: longest context.
        total: over all targets.
        sources: for each entry of --data.
        contexts: by the number of tokens that stand before the target in its document and row.
        notes: sentences about what was assumed of the model, or passed over.
    """

    model: str
    max_seq_len: int
    total: Evaluation
    sources: tuple[Part, ...]
    contexts: tuple[Part, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return everything in the types of JSON; a number that is not finite is None."""
        return {
            "model": self.model,
            "max_seq_len": self.max_seq_len,
            **_numbers(self.total),
            "sources": [
                {
                    "data": part.name,
                    **_numbers(part.evaluation),
                    "files": [{"file": file.name, **_numbers(file.evaluation)} for file in part.files],
                }
                for part in self.sources
            ],
            "contexts": [{"context": part.name, **_numbers(part.evaluation)} for part in self.contexts],
        }


def evaluate_text(
    model: str,
    config: PretrainConfig,
    *,
    stride: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TextEvaluation:
    """Evaluate a model on text; under a launcher every process calls this and has all numbers in the end.

    Every token that follows another of its document counts once. Packed, documents are cut as in training:
    what stands before the cut is not seen after it. Otherwise each document begins a row of its own, and a
    longer one has several; see `data.windows.document_windows`.

    Args:
        model: as for `model_source.open_model`.
        config: what of it concerns the text, its rows, `batch_size`, `tokenizer` and `mixed_precision`, whose
            `auto` is float32 here: a loss to be compared should not depend on the machine.
        stride: tokens between the rows of one document; None is `max_seq_len`: no context twice.
        progress: called with the rows done and all rows of this process.

    Raises:
        UserError: for a model, text or launch that cannot be used.
    """
    if config.mixed_precision == "auto":
        config = dataclasses.replace(config, mixed_precision="no")
    check_launch(config)
    entries = read_sources(config.data)
    if any(entry.weight is not None for entry in entries):
        raise ConfigError("--data has a weight, which only training can use; leave it out.")
    if config.batch_size == AUTO:
        raise ConfigError("--batch-size auto is for training; give a number of rows.")
    source, loaded, tokenizer = load_with_tokenizer(model, config.tokenizer)
    length = config.max_seq_len
    if length > loaded.config.max_position_embeddings:
        raise ConfigError(
            f"--max-seq-len {length} is more than the {loaded.config.max_position_embeddings} positions of "
            f"the model in {source.path}; lower it."
        )
    if stride is not None and (config.packing or stride > length):
        raise ConfigError(
            f"--stride {stride} is between the rows of one document: give --no-packing too, and at most "
            f"--max-seq-len {length}."
        )
    files = [file for entry in entries for file in entry.files]
    # Each file is an entry of its own, and any amount of text will do.
    text = dataclasses.replace(config, data=tuple(map(str, files)), val_fraction=0.0, max_seq_len=2)
    data = prepare_data(text, tokenizer)
    with ExitStack() as closing:
        accelerator = start_accelerator(config)
        closing.callback(close_accelerator, accelerator)
        closing.enter_context(report_peer_failures(accelerator))
        fingerprints = {
            "tokenizer": tokenizer.fingerprint,
            "text": data.fingerprint,
            "weights": weights_fingerprint(loaded),
        }
        check_same_on_all_ranks(accelerator, run_signature(accelerator, config, fingerprints))
        loaded.to(accelerator.device).eval()
        sums = _sums(
            loaded, data.train, tokenizer, config, stride or length, accelerator, progress, len(files)
        )
        shape = sums.shape
        summed = sum_over_processes(torch.from_numpy(sums.reshape(-1)), accelerator)
    found = _report(str(source.path), length, entries, np.array(summed).reshape(shape))
    return dataclasses.replace(found, notes=source.notes)


@torch.inference_mode()
def _sums(
    model: MiniMindForCausalLM,
    shards: TokenShards,
    tokenizer: Tokenizer,
    config: PretrainConfig,
    stride: int,
    accelerator: Accelerator,
    progress: Callable[[int, int], None],
    num_files: int,
) -> NDArray[np.float64]:
    """Return (F, P, 3) sums over this process's windows: nats, targets, and their bytes of text."""
    length, batch_size = config.max_seq_len, int(config.batch_size)
    windows = packed_windows(shards, length) if config.packing else document_windows(shards, length, stride)
    windows = windows.share(accelerator.process_index, accelerator.num_processes)
    ends = np.array([part.end_document for part in shards.parts])
    sizes = np.zeros(model.config.vocab_size)
    sizes[: tokenizer.vocab_size] = shards.bytes_per_token(tokenizer)
    ranges = length.bit_length()
    sums = np.zeros((3, num_files * ranges))
    for first in range(0, len(windows), batch_size):
        chosen = slice(first, first + batch_size)
        rows = window_batch(shards, windows, chosen, tokenizer.pad_token_id)
        losses = _losses(model, rows, accelerator)
        counted = rows.labels != IGNORED
        # Context of 1, 2-3, 4-7, ... tokens: the target after position p has seen p + 1.
        context = np.frexp(rows.position_ids[counted] + 1)[1] - 1
        group = np.searchsorted(ends, rows.documents[counted], side="right") * ranges + context
        values = losses[counted], np.ones(counted.sum()), sizes[rows.labels[counted]]
        for total, value in zip(sums, values, strict=True):
            total += np.bincount(group, value, len(total))
        progress(min(first + batch_size, len(windows)), len(windows))
    return sums.T.reshape(num_files, ranges, 3)


def _losses(model: MiniMindForCausalLM, rows: EvalBatch, accelerator: Accelerator) -> NDArray[np.float64]:
    """Return the (B, T) cross-entropy of each target."""
    device = accelerator.device
    documents = rows.document_ids

    def moved(array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    with accelerator.autocast():
        logits = model(
            moved(rows.input_ids),
            document_ids=None if documents is None else moved(documents),
            position_ids=None if documents is None else moved(rows.position_ids),
        ).logits
    assert logits is not None
    labels = moved(rows.labels)
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(labels).cpu().double().numpy()


def _report(
    model: str, length: int, entries: Sequence[DataSource], sums: NDArray[np.float64]
) -> TextEvaluation:
    by_file = sums.sum(1)
    sources, first = [], 0
    for entry in entries:
        last = first + len(entry.files)
        files = tuple(
            Part(str(file), Evaluation.of_sums(*numbers))
            for file, numbers in zip(entry.files, by_file[first:last].tolist(), strict=True)
        )
        sources.append(Part(entry.pattern, Evaluation.of_sums(*by_file[first:last].sum(0).tolist()), files))
        first = last
    contexts = tuple(
        Part(_range(number, length), Evaluation.of_sums(*numbers))
        for number, numbers in enumerate(sums.sum(0).tolist())
        if numbers[1]
    )
    total = Evaluation.of_sums(*by_file.sum(0).tolist())
    return TextEvaluation(model, length, total, tuple(sources), contexts)


def _range(number: int, length: int) -> str:
    low, high = 1 << number, min((2 << number) - 1, length)
    return str(low) if low == high else f"{low}-{high}"


def _numbers(evaluation: Evaluation) -> dict[str, float | int | None]:
    values = {
        "loss": evaluation.loss,
        "perplexity": evaluation.perplexity,
        "bits_per_byte": evaluation.bits_per_byte,
    }
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return {**finite, "tokens": evaluation.tokens}
