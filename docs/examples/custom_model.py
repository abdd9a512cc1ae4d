"""Models of your own, trained by minimind: data, checkpoints, resuming, reports and several GPUs as ever.

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
    """A feed-forward layer with relu(x)² between two matrices (So et al. 2021) instead of SwiGLU."""

    def __init__(self, shape: minimind.MiniMindConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(shape.hidden_size, 4 * shape.hidden_size, bias=False)
        self.down_proj = nn.Linear(4 * shape.hidden_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        return self.down_proj(self.up_proj(x).relu().square())


class ReLUMiniMind(minimind.MiniMindForCausalLM):
    """minimind's transformer with one part exchanged; all the rest is inherited."""

    def __init__(self, shape: minimind.MiniMindConfig) -> None:
        super().__init__(shape)
        for layer in self.model.layers:
            layer.mlp = SquaredReLU(shape)
        self._init_weights()  # the new matrices too


class RecurrentLM(nn.Module):
    """Anything else that predicts the next token: here a GRU."""

    def __init__(self, vocab_size: int, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.gru = nn.GRU(width, width, num_layers=2, batch_first=True)
        # The optimizer knows the output matrix by this name: Muon is for those inside of a network.
        self.lm_head = nn.Linear(width, vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int = 1,
        document_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> CausalLMOutput:
        """Return the summed loss over `num_items_in_batch` where labels are given, else the logits.

        A transformer keeps documents that share a row apart by `document_ids`. A GRU cannot do that in one
        call, so train it with `packing=False`, where both ids are None.
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
    """Train one of the models with the options of the preset `tiny` and those given."""
    options = {"output_dir": f"runs/{name}", **options}
    if name == "relu":
        # Called with the shape that the options give.
        config = minimind.preset_config("tiny", **options)
        return minimind.pretrain(config, model_factory=ReLUMiniMind)
    config = minimind.preset_config("tiny", packing=False, **options)
    return minimind.pretrain(config, model_factory=lambda shape: RecurrentLM(shape.vocab_size))


if __name__ == "__main__":
    if sys.argv[1:] not in (["relu"], ["recurrent"]):
        sys.exit("usage: python custom_model.py relu|recurrent")
    result = train(sys.argv[1])
    # The weights under their names in the model: safetensors.torch.load_model(model, file) reads them back.
    print(f"{result.bits_per_byte:.4f} bits/byte on held-out text; {result.model_dir / 'model.safetensors'}")
