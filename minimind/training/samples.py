"""Samples of what the model writes while it is trained."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import nn

from ..checkpoint.state_dict import gather_weights
from ..config.options import PretrainConfig
from ..errors import ConfigError
from ..formats.huggingface import model_from_weights
from ..generation.text import continue_texts, encode_prompt
from ..modeling.config import MiniMindConfig
from ..run_folder import RunFolder
from ..tokenizer import Tokenizer
from ..tracking.metrics_file import MetricsFile

SAMPLE_TOKENS = 64


def check_prompts(config: PretrainConfig, shape: MiniMindConfig, tokenizer: Tokenizer) -> None:
    """Refuse, before a run begins, prompts that leave a sample no position to write to.

    Raises:
        ConfigError: naming the length of the first such prompt.
    """
    positions = shape.max_position_embeddings
    for prompt in config.sample_prompt if config.sample_interval is not None else ():
        if (length := len(encode_prompt(tokenizer, prompt))) >= positions:
            raise ConfigError(
                f"--sample-prompt '{prompt[:20]}...' has {length} tokens, but the model has {positions} "
                "positions; shorten it."
            )


class Samples:
    """Continues the prompts of --sample-prompt, always with the same draws; every process must call it.

    The weights are gathered on the main process as for a checkpoint, which is the same for one process, DDP
    and FSDP2, and a model of its own is made of them there: the one in training and the random numbers it
    draws are left alone. On the device this takes the memory of the weights once more. The other processes
    go on, and wait where they next meet.
    """

    def __init__(
        self,
        config: PretrainConfig,
        shape: MiniMindConfig,
        model: nn.Module,
        tokenizer: Tokenizer,
        accelerator: Accelerator,
        folder: RunFolder,
        *,
        start_step: int,
        log_text: Callable[[str, str, int], None],
    ) -> None:
        """Open `samples.jsonl`, without the samples of later steps than `start_step`.

        Args:
            config: prompts and seed.
            shape: of the model.
            model: prepared.
            tokenizer: of the run.
            accelerator: tells the main process, and joins all.
            folder: of the run.
            start_step: steps done before.
            log_text: takes name, text and step for the trackers.
        """
        self._prompts = config.sample_prompt or ("",)
        self._seed, self._shape, self._model, self._tokenizer = config.seed, shape, model, tokenizer
        self._accelerator, self._log_text = accelerator, log_text
        self._file: MetricsFile | None = None
        if accelerator.is_main_process:
            self._file = MetricsFile(folder.samples, keep_to_step=start_step)

    def write(self, step: int) -> None:
        """Write samples of the model as it is after `step`."""
        weights = gather_weights(self._accelerator, self._model)
        if weights is None or self._file is None:
            return
        device = self._accelerator.device
        half = device.type == "cuda" and self._accelerator.mixed_precision == "bf16"
        model = model_from_weights(self._shape, weights, "the model in training")
        model.to(device, torch.bfloat16 if half else torch.float32).eval()
        texts = continue_texts(
            model, self._tokenizer, self._prompts, max_new_tokens=SAMPLE_TOKENS, seed=self._seed
        )
        for number, text in enumerate(texts):
            self._file.write({"prompt": text.prompt, "text": text.text}, step)
            self._log_text(f"sample_{number}", text.prompt + text.text, step)

    def go_back(self, step: int) -> None:
        """Take back the samples of later steps."""
        if self._file is not None:
            self._file.go_back(step)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
