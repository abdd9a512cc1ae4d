"""An optimizer of your own in a run: Lion, with minimind's data, schedule, checkpoints and exact resume.

python custom_optimizer.py corpus.jsonl
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

import minimind


class Lion(torch.optim.Optimizer):
    """Sign of a momentum (Chen et al., arXiv:2302.06675); its state is one tensor per parameter."""

    def __init__(self, params: Any, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.99)):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update the parameters that have a gradient."""
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in (one for one in group["params"] if one.grad is not None):
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                update = momentum.lerp(parameter.grad, 1 - first).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
                momentum.lerp_(parameter.grad, 1 - second)


def lion(model: nn.Module, config: minimind.PretrainConfig) -> Lion:
    """Build the optimizer of a run; each step sets the learning rate by the schedule."""
    return Lion(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)


def train(**options: Any) -> Any:
    """Train with the preset `tiny`, changed by `options`."""
    config = minimind.preset_config("tiny", output_dir="runs/lion", learning_rate=3e-4, **options)
    return minimind.pretrain(config, optimizer=lion)


if __name__ == "__main__":
    print(train(data=(sys.argv[1],)).history.losses)
