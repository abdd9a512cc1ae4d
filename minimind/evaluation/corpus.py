"""Evaluate a model on a corpus: in total, by source, and by length of context.

Shapes: B sequences, T tokens, F files, P ranges of context, D documents.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
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
from ..formats.open_model import CausalLM, load_with_tokenizer
from ..tokenizer import Tokenizer
from .validation import Evaluation

# Of a document, to recognize it by.
_BEGINNING_TOKENS = 32


@dataclass(frozen=True)
class Breakdown:
    """Results for one --data entry, one file, or one range of context.

    Attributes:
        name: the entry, the file, or the range, such as `16-31`.
        evaluation: over its targets.
        files: results by file of an entry.
    """

    name: str
    evaluation: Evaluation
    files: tuple[Breakdown, ...] = ()


@dataclass(frozen=True)
class DocumentLoss:
    """Result for one document.

    Attributes:
        file: where it was read from.
        number: its position in the file, from 0; empty documents and skipped lines do not count.
        beginning: its first characters.
        evaluation: over its targets.
    """

    file: str
    number: int
    beginning: str
    evaluation: Evaluation

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON types; a number that is not finite is None."""
        named = {"file": self.file, "document": self.number, "beginning": self.beginning}
        return {**named, **_numbers(self.evaluation)}


@dataclass(frozen=True)
class CorpusEvaluation:
    """Results of an evaluation.

    Attributes:
        model: path of the weights.
        max_seq_len: maximum context in tokens.
        total: over all targets.
        sources: by --data entry.
        contexts: by the number of tokens before the target in its document and sequence.
        notes: sentences about defaults and assumptions.
        documents: by document, in the order of the data; empty unless asked for.
    """

    model: str
    max_seq_len: int
    total: Evaluation
    sources: tuple[Breakdown, ...]
    contexts: tuple[Breakdown, ...]
    notes: tuple[str, ...] = ()
    documents: tuple[DocumentLoss, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the results as JSON types; a number that is not finite is None."""
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
    per_document: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CorpusEvaluation:
    """Evaluate a model on a corpus; under a launcher every rank calls this and gets the same result.

    Every token that follows another in its document counts once. With packing, documents are split as in
    training, without context across the split. Otherwise each document starts a sequence, and a longer one
    has several; see `data.eval_windows.document_windows`.

    Args:
        model: see `open_model.open_model`.
        config: data, sequence length, `batch_size`, `tokenizer` and `mixed_precision`, whose `auto` is
            float32 here, so that losses do not depend on the machine.
        stride: tokens between the starts of a document's sequences; None is `max_seq_len`: no overlap.
        per_document: also return the loss of every document, such as to sort or filter data by it.
        progress: called with the sequences done and all sequences of this process.

    Raises:
        UserError: for an unusable model, corpus or launch.
    """
    if config.mixed_precision == "auto":
        config = dataclasses.replace(config, mixed_precision="no")
    check_launch(config)
    entries = read_sources(config.data, text_key=config.text_key)
    if any(entry.weight is not None for entry in entries):
        raise ConfigError("--data has a weight, which is for training only; remove it.")
    if config.batch_size == AUTO:
        raise ConfigError("--batch-size auto is for training only; give a number of sequences.")
    source, loaded, tokenizer = load_with_tokenizer(model, config.tokenizer)
    length = config.max_seq_len
    if length > loaded.config.max_position_embeddings:
        raise ConfigError(
            f"--max-seq-len {length} is more than the {loaded.config.max_position_embeddings} positions of "
            f"the model in {source.path}; lower it."
        )
    if stride is not None and (config.packing or stride > length):
        raise ConfigError(f"--stride {stride} needs --no-packing, and can be at most --max-seq-len {length}.")
    files = [file for entry in entries for file in entry.paths]
    # One entry per file, and no minimum size.
    corpus = dataclasses.replace(config, data=tuple(map(str, files)), val_fraction=0.0, max_seq_len=2)
    data = prepare_data(corpus, tokenizer)
    with ExitStack() as closing:
        accelerator = start_accelerator(config)
        closing.callback(close_accelerator, accelerator)
        closing.enter_context(report_peer_failures(accelerator))
        fingerprints = {
            "tokenizer": tokenizer.fingerprint,
            "text": data.fingerprint,
            "weights": weights_fingerprint(loaded),
        }
        shared = run_signature(accelerator, dataclasses.asdict(config), fingerprints)
        check_same_on_all_ranks(accelerator, shared)
        loaded.to(accelerator.device).eval()
        sums, by_document = _sums(
            loaded, data.train, tokenizer, config, stride or length, accelerator, progress, len(files)
        )
        shape = sums.shape
        summed = sum_over_processes(torch.from_numpy(sums.reshape(-1)), accelerator)
        documents: tuple[DocumentLoss, ...] = ()
        if per_document:
            flat = sum_over_processes(torch.from_numpy(by_document.reshape(-1)), accelerator)
            documents = _documents(files, data.train, tokenizer, np.array(flat).reshape(by_document.shape))
    found = _report(str(source.path), length, entries, np.array(summed).reshape(shape))
    notes = source.notes + (getattr(loaded, "notes", ()) if config.packing else ())
    return dataclasses.replace(found, notes=notes, documents=documents)


@torch.inference_mode()
def _sums(
    model: CausalLM,
    shards: TokenShards,
    tokenizer: Tokenizer,
    config: PretrainConfig,
    stride: int,
    accelerator: Accelerator,
    progress: Callable[[int, int], None],
    num_files: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return sums over this process's windows: nats, number of targets, and their bytes.

    (F, P, 3) by file and range of context, and (D, 3) by document.
    """
    length, batch_size = config.max_seq_len, int(config.batch_size)
    windows = packed_windows(shards, length) if config.packing else document_windows(shards, length, stride)
    windows = windows.share(accelerator.process_index, accelerator.num_processes)
    ends = np.array([part.end_document for part in shards.parts])
    sizes = np.zeros(model.config.vocab_size)
    sizes[: tokenizer.vocab_size] = shards.bytes_per_token(tokenizer)
    ranges = length.bit_length()
    sums = np.zeros((3, num_files * ranges))
    by_document = np.zeros((3, shards.num_documents))
    for first in range(0, len(windows), batch_size):
        chosen = slice(first, first + batch_size)
        batch = window_batch(shards, windows, chosen, tokenizer.pad_token_id)
        losses = _losses(model, batch, accelerator)
        counted = batch.labels != IGNORED
        # Context of 1, 2-3, 4-7, ... tokens: the target after position p has a context of p + 1.
        context = np.frexp(batch.position_ids[counted] + 1)[1] - 1
        document = batch.documents[counted]
        group = np.searchsorted(ends, document, side="right") * ranges + context
        values = losses[counted], np.ones(counted.sum()), sizes[batch.labels[counted]]
        for total, of_documents, value in zip(sums, by_document, values, strict=True):
            total += np.bincount(group, value, len(total))
            np.add.at(of_documents, document, value)
        progress(min(first + batch_size, len(windows)), len(windows))
    return sums.T.reshape(num_files, ranges, 3), by_document.T


def _losses(model: CausalLM, batch: EvalBatch, accelerator: Accelerator) -> NDArray[np.float64]:
    """Return the (B, T) cross-entropy of each target."""
    device = accelerator.device
    documents = batch.document_ids

    def moved(array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    with accelerator.autocast():
        logits = model(
            moved(batch.input_ids),
            document_ids=None if documents is None else moved(documents),
            position_ids=None if documents is None else moved(batch.position_ids),
        ).logits
    assert logits is not None
    labels = moved(batch.labels)
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(labels).cpu().double().numpy()


def _documents(
    files: Sequence[Path], shards: TokenShards, tokenizer: Tokenizer, sums: NDArray[np.float64]
) -> tuple[DocumentLoss, ...]:
    found, first = [], 0
    for file, part in zip(files, shards.parts, strict=True):
        for document in range(first, part.end_document):
            beginning = tokenizer.decode(shards.document(document)[:_BEGINNING_TOKENS].tolist())
            numbers = Evaluation.of_sums(*sums[document].tolist())
            found.append(DocumentLoss(str(file), document - first, beginning, numbers))
        first = part.end_document
    return tuple(found)


def _report(
    model: str, length: int, entries: Sequence[DataSource], sums: NDArray[np.float64]
) -> CorpusEvaluation:

    def part(name: str, numbers: NDArray[np.float64], files: tuple[Breakdown, ...] = ()) -> Breakdown:
        return Breakdown(name, Evaluation.of_sums(*numbers.tolist()), files)

    by_file = sums.sum(1)
    sources, first = [], 0
    for entry in entries:
        own = by_file[first : first + len(entry.files)]
        first += len(entry.files)
        files = tuple(part(str(file), numbers) for file, numbers in zip(entry.files, own, strict=True))
        sources.append(part(entry.pattern, own.sum(0), files))
    by_context = enumerate(sums.sum(0))
    contexts = tuple(part(_range(number, length), numbers) for number, numbers in by_context if numbers[1])
    total = Evaluation.of_sums(*by_file.sum(0).tolist())
    return CorpusEvaluation(model, length, total, tuple(sources), contexts)


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
