"""The shortest training loop with minimind's data and model; custom_loop.py adds checkpoints.

python short_loop.py corpus.jsonl
"""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator

import minimind
from minimind.data.batch_plan import BatchPlan
from minimind.data.loader import Loader
from minimind.data.prepare import prepare_data
from minimind.training.step import train_step


def train(corpus: str, steps: int = 100) -> list[float]:
    """Train a small model and return the loss of each step, in nats per token."""
    accelerator, tokenizer = Accelerator(), minimind.load_tokenizer()
    data = prepare_data(minimind.PretrainConfig(data=(corpus,), max_seq_len=64), tokenizer)
    plan = BatchPlan(micro_batch_size=8, accumulation_steps=1, num_processes=1)
    loader = Loader(
        data.train, seq_len=64, packing=True, plan=plan, seed=42, process_index=0, device=accelerator.device
    )
    config = minimind.MiniMindConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = minimind.MiniMindForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses: list[float] = []
    while len(losses) < steps:
        for batch in loader.steps(len(losses) // loader.steps_per_epoch):
            loss_sum, *_ = train_step(model, optimizer, batch, accelerator, grad_clip=1.0)
            losses.append(loss_sum.item() / batch.num_targets)
            if len(losses) == steps:
                break
    return losses


if __name__ == "__main__":
    print(train(sys.argv[1]))
