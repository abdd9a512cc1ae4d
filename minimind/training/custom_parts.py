"""Parts of a run that the caller of `pretrain` replaces, and what is checked of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..config.options import AUTO, PretrainConfig
from ..data.documents import Documents
from ..errors import ConfigError
from ..modeling.transformer import MiniMindForCausalLM
from ..optim.build import OptimizerFactory
from ..schedule import Schedule
from ..tracking.plugins import Tracker
from .build_model import ModelFactory
from .callbacks import Callback


@dataclass(frozen=True)
class CustomParts:
    """Parts of the caller; None, or the class of minimind's model, where there is none. See `pretrain`."""

    model_factory: ModelFactory = MiniMindForCausalLM
    optimizer: OptimizerFactory | None = None
    schedule: Schedule | None = None
    data: Documents | None = None
    callbacks: Sequence[Callback] = ()
    trackers: Sequence[Tracker] = ()

    def check(self, config: PretrainConfig) -> None:
        """Refuse parts that contradict the options.

        Raises:
            ConfigError: naming the part and the option.
        """
        problems = []
        if config.batch_size == AUTO and (self.model_factory is not MiniMindForCausalLM or self.optimizer):
            # The results of `auto` are cached by the sizes of minimind's model.
            problems.append(
                "--batch-size auto supports minimind's own model and optimizers only; give a number."
            )
        if self.optimizer is not None and config.learning_rate is None:
            problems.append(
                "optimizer= needs the option learning_rate: the defaults are those of muon and adamw."
            )
        if self.data is not None and config.data:
            problems.append("data= and the option data both name training data; give only one of them.")
        for name in ("optimizer", "schedule"):
            part = getattr(self, name)
            if part is not None and not callable(part):
                problems.append(
                    f"{name}= got a {type(part).__name__}, which cannot be called; pass a function."
                )
        if problems:
            raise ConfigError(problems)

    @property
    def given(self) -> dict[str, Any]:
        """The parts by the names of the arguments of `pretrain`, None where there is none."""
        own_model = None if self.model_factory is MiniMindForCausalLM else self.model_factory
        return {
            "model_factory": own_model,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "data": self.data,
        }

    def names(self, custom_model: str | None) -> dict[str, Any]:
        """Return the name of each part, None where it is not replaced, as a checkpoint keeps them.

        Args:
            custom_model: name of the model's class unless it is minimind's own, else None.
        """
        return {name: _name(part) for name, part in self.given.items()} | {"model_factory": custom_model}


def _name(part: Any) -> str | None:
    if part is None:
        return None
    return str(getattr(part, "__name__", None) or type(part).__name__)
