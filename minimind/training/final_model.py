"""Writes the final model folder of a run, and a sample of what that model generates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from ..checkpoint.state_dict import gather_weights
from ..errors import UserError
from ..formats.huggingface import CONFIG, load_model, remove_other_weights, write_weights
from ..formats.sharded_safetensors import WEIGHTS
from ..generation.text import continue_texts
from ..io.atomic import replace_files
from ..io.safetensors import write_tensors
from ..modeling.config import MiniMindConfig
from ..tokenizer import Tokenizer
from .samples import SAMPLE_TOKENS


def save_final_model(
    accelerator: Accelerator, model: nn.Module, shape: MiniMindConfig, tokenizer: Tokenizer, folder: Path
) -> None:
    """Write model and tokenizer as Hugging Face transformers reads them; every process must call this.

    Raises:
        UserError: when the folder cannot be written.
    """
    weights = gather_weights(accelerator, model)
    if weights is not None:
        # A model trained in bf16 may hold what fp16 cannot; any other gains three bits by fp16.
        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float16
        with _replace_model(folder) as written:
            files = write_weights(weights, shape, written, dtype)
            tokenizer.save(written)
        remove_other_weights(folder, files)
    accelerator.wait_for_everyone()


def save_final_weights(
    accelerator: Accelerator, model: nn.Module, tokenizer: Tokenizer, folder: Path
) -> None:
    """Write the weights of any model in float32, and its tokenizer; every process must call this.

    There is no config.json, which would have other programs take them for those of a Qwen3.

    Raises:
        UserError: when the folder cannot be written.
    """
    weights = gather_weights(accelerator, model)
    if weights is not None:
        with _replace_model(folder) as written:
            write_tensors(written / WEIGHTS, weights)
            tokenizer.save(written)
        # A run that began with the package's model may have left one.
        (folder / CONFIG).unlink(missing_ok=True)
    accelerator.wait_for_everyone()


@contextmanager
def _replace_model(folder: Path) -> Iterator[Path]:
    """Replace weights, config and tokenizer together; see `replace_files`."""
    try:
        with replace_files(folder) as written:
            yield written
    except OSError as error:
        raise UserError(
            f"the model could not be written to {folder} ({error.strerror or error}); free space on the disk "
            "of --output-dir or allow writing there, then continue with --resume."
        ) from error


def write_sample(folder: Path, tokenizer: Tokenizer, seed: int, device: torch.device) -> str:
    """Return the beginning of a document as the delivered model writes it.

    The model is read back from its folder, so the sample also shows that the folder is sound.
    """
    model = load_model(folder).to(device)
    return continue_texts(model, tokenizer, [""], max_new_tokens=SAMPLE_TOKENS, seed=seed)[0].text.strip()
