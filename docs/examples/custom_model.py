"""Custom models trained by minimind, with its data, checkpoints, resuming, reports and DDP.

python custom_model.py relu
accelerate launch custom_model.py recurrent
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

import minimind
from minimind.modeling.transformer import CausalLMOutput
from minimind.training.summary import PretrainResult


class SquaredReLU(nn.Module):
    """Feed-forward layer with a squared ReLU (So et al. 2021) instead of SwiGLU."""

    def __init__(self, model_config: minimind.MiniMindConfig) -> None:
        super().__init__()
        hidden_size = model_config.hidden_size
        self.up_proj = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        self.down_proj = nn.Linear(4 * hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        return self.down_proj(self.up_proj(x).relu().square())


class ReLUMiniMind(minimind.MiniMindForCausalLM):
    """minimind's transformer with another feed-forward layer; everything else is inherited."""

    def __init__(self, model_config: minimind.MiniMindConfig) -> None:
        super().__init__(model_config)
        for layer in self.model.layers:
            layer.mlp = SquaredReLU(model_config)
        self._init_weights()  # including the new matrices


class RecurrentLM(nn.Module):
    """Any other model that predicts the next token: here a GRU."""

    def __init__(self, vocab_size: int, hidden_size: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.gru = nn.GRU(hidden_size, hidden_size, num_layers=2, batch_first=True)
        # The optimizer recognizes the output layer by this name and updates it with AdamW instead of Muon.
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int = 1,
        document_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> CausalLMOutput:
        """Return the summed loss divided by `num_items_in_batch` if labels are given, else the logits.

        A transformer masks attention between the documents of a packed sequence by `document_ids`. A GRU
        cannot do that in one call, so train it with `packing=False`, where both ids are None.
        """
        hidden, _ = self.gru(self.embedding(input_ids))
        logits = self.lm_head(hidden)
        if shift_labels is None:
            return CausalLMOutput(None, logits)
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), shift_labels.flatten(), ignore_index=-100, reduction="sum"
        )
        return CausalLMOutput(loss / num_items_in_batch, None)


def train(name: str, **options: Any) -> PretrainResult:
    """Train one of the models with the preset `tiny`, changed by `options`."""
    options = {"output_dir": f"runs/{name}", **options}
    if name == "relu":
        # Called with the model configuration that results from the options.
        config = minimind.preset_config("tiny", **options)
        return minimind.pretrain(config, model_factory=ReLUMiniMind, quiet=False)
    config = minimind.preset_config("tiny", packing=False, **options)
    return minimind.pretrain(
        config, model_factory=lambda model_config: RecurrentLM(model_config.vocab_size), quiet=False
    )


if __name__ == "__main__":
    if sys.argv[1:] not in (["relu"], ["recurrent"]):
        sys.exit("usage: python custom_model.py relu|recurrent")
    result = train(sys.argv[1])
    # Load the weights with safetensors.torch.load_model(model, file).
    print(f"{result.bits_per_byte:.4f} bits/byte on held-out data; {result.model_dir / 'model.safetensors'}")
