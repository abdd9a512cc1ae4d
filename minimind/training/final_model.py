"""What a run hands over at its end: the model folder, and a short text that the model in it wrote."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from ..checkpoint.state_dict import gather_weights
from ..errors import UserError
from ..formats.huggingface import CONFIG, load_model, save_weights
from ..formats.sharded_safetensors import WEIGHTS
from ..generation.text import continue_texts
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
        save_weights(weights, shape, folder, dtype)
        tokenizer.save(folder)
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
        temporary = folder / f".{WEIGHTS}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_tensors(temporary, weights)
            # Of a run that was begun with another model.
            (folder / CONFIG).unlink(missing_ok=True)
            temporary.replace(folder / WEIGHTS)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"the weights could not be written to {folder}: {error}.") from error
        tokenizer.save(folder)
    accelerator.wait_for_everyone()


def write_sample(folder: Path, tokenizer: Tokenizer, seed: int, device: torch.device) -> str:
    """Return the beginning of a document as the delivered model writes it.

    The model is read back from its folder, so the sample also shows that the folder is sound.
    """
    model = load_model(folder).to(device)
    return continue_texts(model, tokenizer, [""], max_new_tokens=SAMPLE_TOKENS, seed=seed)[0].text.strip()
