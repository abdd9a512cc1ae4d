"""Rules of the training recipe: shape, batch, learning rate and decay as functions of size and horizon.

Learning rate and weight decay of every run follow these rules, and with `--budget` the other options too. All
of them are plain functions of numbers. A rule is anchored at one measured point of this project, stated
beside it (`docs/experiments.md`); its exponents are from the literature. C hidden size, L layers, B tokens of
a global batch, D training tokens of the whole run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Measured anchor: `minimind2-small` (C = 512), 61M tokens in batches of 32 sequences of 512 tokens, where
# Muon at 0.004 was best of three rates and two batches.
ANCHOR_WIDTH = 512
ANCHOR_TOKENS = 61e6
ANCHOR_BATCH = 32 * 512
ANCHOR_RATES: Mapping[str, float] = {"normuon": 4e-3, "muon": 4e-3, "adamw": 5e-4}
ANCHOR_DECAY = 0.1

# B ∝ D^0.383: Power Lines (Bergsma et al. 2025, arXiv:2505.13738), which nanochat uses too.
BATCH_EXPONENT = 0.383
SMALLEST_BATCH, LARGEST_BATCH = 1024, 1 << 22
# How many times the batch of the rule a batch may be larger until it needs about twice the tokens.
BATCH_TOLERANCE = 12.0
# lr ∝ D^-0.32 at a fixed batch (Bjorck et al. 2024, arXiv:2409.19913, and arXiv:2603.28743 for Muon), and
# lr ∝ B^0.5 (Malladi et al. 2022, arXiv:2205.10782).
RATE_HORIZON_EXPONENT = -0.32
RATE_BATCH_EXPONENT = 0.5
# lr ∝ 1/C for AdamW (μP: Yang et al. 2022, arXiv:2203.03466). Muon's update has a spectral norm that depends
# less on the width; rates that were tuned by hand from C = 128 to 1792 lie on C^-0.5.
RATE_WIDTH_EXPONENT: Mapping[str, float] = {"normuon": -0.5, "muon": -0.5, "adamw": -1.0}
# Learning rate of the embedding, at most, where AdamW trains it beside NorMuon; ∝ C^-2. In 184 to 3,723 steps
# the best rate was 0.027 to 0.054 for C = 256, 0.012 to 0.024 for 512, 0.011 for 768 and 0.0024 to 0.0048 for
# 1024, where 0.0095 was far worse (docs/experiments.md).
ANCHOR_EMBEDDING_RATE = 0.02
EMBEDDING_RATE_WIDTH_EXPONENT = -2.0
# Share of the learning rate of random weights that trained weights continue with
# (docs/training-stability.md).
TRAINED_RATE = 0.3
LARGEST_RATES: Mapping[str, float] = {"normuon": 3e-2, "muon": 3e-2, "adamw": 5e-3}
# In fewer steps the rate is lower in proportion: the rule was too high by a factor of 2 in 20 and 60 steps
# and of 8 in 5, where it made the loss rise, and right in 200 (docs/experiments.md).
FEWEST_STEPS = 100
# Peak rate x weight decay x steps of one epoch: the time scale on which AdamW and Muon average over updates.
# The best one is constant in epochs (Wang and Aitchison 2024, arXiv:2405.13698). 1.5 at the anchor; 2.6 in
# the tuned Muon of modded-nanogpt. In four epochs, four times the decay of one was better by 0.012 bits/byte
# (docs/experiments.md).
DECAY_TIME = 1.5
# In one epoch.
SMALLEST_DECAY, LARGEST_DECAY = 0.005, 0.3

# The decay of the learning rate: linear to zero over the second half and more (nanochat: 65%; Bergsma et al.
# 2025, arXiv:2502.15938: linear to zero beats cosine to 10%).
DECAY_RATIO = 0.6
FINAL_RATE = 0.0

# Sequences of a batch, at least, where they are longer than the shortest.
SEQUENCES_PER_BATCH = 32
SHORTEST_SEQUENCE, LONGEST_SEQUENCE = 128, 2048
# In more epochs than this, a model with more parameters inside the blocks than the text has tokens gets
# sequences twice as long as the shortest: better by 0.01 to 0.04 bits/byte. Smaller models and shorter runs
# were worse with them, by up to 0.09 (docs/experiments.md).
LONGER_AFTER_EPOCHS = 2.5

# Beyond four epochs a repeated token is worth visibly less than a new one (Muennighoff et al. 2023,
# arXiv:2305.16264), and a model with more parameters than tokens begins to overfit.
MOST_EPOCHS = 8
# With more parameters inside the blocks than tokens of unique text fewer epochs, ∝ (N/U)^-0.44. At N/U = 1.4
# eight epochs were better than six and twelve on one text, and five nearly as good as seven on another; at
# 2.7 six were better than four, at 4.9 four better than three, and at 6 four better than eight
# (docs/experiments.md).
EPOCHS_EXPONENT = -0.44
# R* there, the number of repetitions after which all further ones together are worth 1/e of what those before
# were, is 15.4 for models of 100M parameters and more. Of 2.5 to 8, 3 fits this project's runs of several
# epochs best: small models on small text gain less from repeating it.
REPETITION_SCALE = 3.0
# R_N* there, the same for parameters beyond those that the text can use; here one per token of unique text.
EXCESS_SCALE = 5.31
# A model with more parameters than this per token of unique text is not considered: in several epochs it
# overfits, which the formula does not know.
MOST_PARAMETERS_PER_TOKEN = 8


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a dense model with a tied embedding.

    Attributes:
        hidden_size: C, a multiple of 64.
        num_hidden_layers: L.
        num_attention_heads: H.
        num_key_value_heads: divides H.
        intermediate_size: F, a multiple of 64.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int

    @classmethod
    def of(cls, width: int, layers: int) -> ModelShape:
        """Return the shape of a width and depth: heads of 32, 64 or 128, two query heads per key-value head.

        Heads of 128 were better than those of 64 by 0.013 bits/byte at the anchor (docs/experiments.md).
        Small models have small heads, so that they have several.
        """
        head = 32 if width < 256 else 64 if width < 512 else 128
        heads = max(width // head, 1)
        kv_heads = max(number for number in range(1, max(heads // 2, 1) + 1) if heads % number == 0)
        return cls(width, layers, heads, kv_heads, math.ceil(width * 8 / 3 / 64) * 64)

    @property
    def block_parameters(self) -> int:
        """Parameters of all matrices inside the blocks."""
        c, ratio = self.hidden_size, self.num_key_value_heads / self.num_attention_heads
        attention = round(2 * c * c + 2 * c * c * ratio)
        return self.num_hidden_layers * (attention + 3 * c * self.intermediate_size)

    def parameters(self, vocab_size: int) -> int:
        """Return all parameters of matrices, the tied embedding once."""
        return self.block_parameters + vocab_size * self.hidden_size

    def options(self) -> dict[str, Any]:
        """Return the options of `pretrain` that give this shape."""
        return dict(vars(self))


# The shapes that `--budget` chooses from, from 0.2M to 3G parameters inside the blocks. Depth grows with the
# width (nanochat: C = 64 L; Kaplan et al. 2020, arXiv:2001.08361, find the aspect ratio flat between 30 and
# 200), and not below 4 layers.
_WIDTHS = (64, 128, 192, 256, 384, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560)
LADDER = tuple(ModelShape.of(width, max(4, width // 64)) for width in _WIDTHS)


def global_batch_tokens(tokens: float, unique_tokens: float = math.inf) -> int:
    """Return the tokens of a global batch for a run of D tokens: B ∝ D^0.383, through the anchor.

    A power of two, for sequences of a power of two. At the anchor twice the batch was worse by 0.0075
    bits/byte. In several epochs of U tokens of text the batch is that of a run of √(D·U) tokens: in eight
    epochs of 0.6M tokens three runs with 8192 tokens ended at 1.65 to 1.67 bits/byte, two with 4096 at 1.57
    and 1.64, and in four epochs 2048 was as good as 4096 (docs/experiments.md).
    """
    power = 1 << max(round(math.log2(_wanted_batch(tokens, unique_tokens))), 0)
    return min(max(power, SMALLEST_BATCH), LARGEST_BATCH)


def _wanted_batch(tokens: float, unique_tokens: float) -> float:
    horizon = math.sqrt(max(tokens, 1.0) * min(max(tokens, 1.0), unique_tokens))
    return ANCHOR_BATCH * (horizon / ANCHOR_TOKENS) ** BATCH_EXPONENT


def useful_tokens(tokens: float, batch_tokens: float, unique_tokens: float = math.inf) -> float:
    """Return how many tokens in batches of the rule are worth as much as `tokens` in these batches.

    Smaller batches are not worth more. Up to a constant 12 + m times the tokens are needed with m times the
    batch, after the form of McCandlish et al. 2018 (arXiv:1812.06162). Measured with a hidden size of 512:
    26% more for 65536 in place of 16384 tokens at a horizon of 30M (here 30%), 20% for 32768 in place of
    16384 at 20M (11%), and 4% at 61M (8%).
    """
    excess = max(batch_tokens / _wanted_batch(tokens, unique_tokens), 1.0)
    return tokens * (1 + 1 / BATCH_TOLERANCE) / (1 + excess / BATCH_TOLERANCE)


def sequence_length(batch_tokens: int, *, epochs: float = 1.0, parameters_per_token: float = 0.0) -> int:
    """Return the sequence length for a global batch: a power of two that leaves enough sequences.

    The anchor has 32 sequences of 512, `--preset tiny` 16 of 128.

    Args:
        batch_tokens: B.
        epochs: of the whole run.
        parameters_per_token: parameters inside the blocks per token of unique text.
    """
    wanted = max(batch_tokens // SEQUENCES_PER_BATCH, 1)
    power = 1 << (wanted.bit_length() - 1)
    longer = epochs > LONGER_AFTER_EPOCHS and parameters_per_token > 1
    return min(max(power, SHORTEST_SEQUENCE * (2 if longer else 1)), LONGEST_SEQUENCE)


def learning_rate(optimizer: str, *, width: int, batch_tokens: float, tokens: float) -> float:
    """Return the peak learning rate, with two significant digits.

    lr = anchor · (C/512)^w · (B/16k)^0.5 · (D/61M)^-0.32, w = -0.5 for Muon and -1 for AdamW. Up to 350M
    parameters it gives what the presets state within a factor of 2.

    Args:
        optimizer: `normuon`, `muon` or `adamw`.
        width: C.
        batch_tokens: B.
        tokens: D.
    """
    rate = ANCHOR_RATES[optimizer]
    rate *= (width / ANCHOR_WIDTH) ** RATE_WIDTH_EXPONENT[optimizer]
    rate *= (batch_tokens / ANCHOR_BATCH) ** RATE_BATCH_EXPONENT
    rate *= (max(tokens, 1.0) / ANCHOR_TOKENS) ** RATE_HORIZON_EXPONENT
    return float(f"{min(rate, LARGEST_RATES[optimizer]):.2g}")


def largest_embedding_rate(width: int) -> float:
    """Return the highest learning rate of an embedding beside NorMuon: 0.02 · (512/C)².

    A tied embedding is also the output layer, so one step at a rate changes a logit by up to C times as much.

    Args:
        width: C.
    """
    return ANCHOR_EMBEDDING_RATE * (width / ANCHOR_WIDTH) ** EMBEDDING_RATE_WIDTH_EXPONENT


def weight_decay(rate: float, steps: int, epochs: float = 1.0) -> float:
    """Return the weight decay: peak rate x decay x steps is the same for every horizon, and ∝ epochs.

    Args:
        rate: peak learning rate.
        steps: optimizer steps of the whole run.
        epochs: of the whole run; below 1 counts as 1.
    """
    decay = min(max(DECAY_TIME / (rate * max(steps, 1)), SMALLEST_DECAY), LARGEST_DECAY)
    return float(f"{decay * max(epochs, 1.0):.2g}")


def learning_rate_and_decay(
    optimizer: str,
    *,
    width: int,
    batch_tokens: float,
    unique_tokens: float,
    epochs: float,
    rate: float | None = None,
    trained: bool = False,
) -> tuple[float, float]:
    """Return the peak learning rate and the weight decay of a run.

    Args:
        optimizer: `normuon`, `muon` or `adamw`.
        width: C.
        batch_tokens: B.
        unique_tokens: of the text.
        epochs: most epochs of the run. Eight at most count: a time limit may end a run long before them, and
            no rule was measured beyond.
        rate: peak learning rate, where it is given; None for that of the rule.
        trained: the run begins with trained weights. Their learning rate is lower, and neither it nor the
            weight decay rises above its value at the anchor in short runs or with the epochs.
    """
    epochs = min(epochs, MOST_EPOCHS)
    tokens = epochs * unique_tokens
    steps = max(round(tokens / batch_tokens), 1)
    random_rate = learning_rate(optimizer, width=width, batch_tokens=batch_tokens, tokens=tokens)
    random_rate = float(f"{random_rate * min(steps / FEWEST_STEPS, 1.0):.2g}")
    share = TRAINED_RATE if trained else 1.0
    if rate is None:
        at_anchor = learning_rate(optimizer, width=width, batch_tokens=ANCHOR_BATCH, tokens=ANCHOR_TOKENS)
        rate = share * min(random_rate, at_anchor) if trained else random_rate
    else:
        random_rate = rate / share
    decay = weight_decay(random_rate, steps, epochs)
    return rate, min(decay, ANCHOR_DECAY) if trained else decay


def most_epochs(parameters: float, unique_tokens: float) -> int:
    """Return the epochs after which a model would begin to overfit, at least 1.

    Args:
        parameters: N, inside the blocks.
        unique_tokens: U.
    """
    return max(round(MOST_EPOCHS * max(parameters / unique_tokens, 1.0) ** EPOCHS_EXPONENT), 1)


def effective_tokens(tokens: float, unique_tokens: float) -> float:
    """Return how many new tokens are worth as much as `tokens` in epochs over `unique_tokens`.

    D' = U + U·R*·(1 - exp(-R/R*)), with R = D/U - 1 repetitions and R* = 3: equation 5 of Muennighoff et al.
    2023 (arXiv:2305.16264). Increasing in both arguments.
    """
    if tokens <= unique_tokens:
        return tokens
    repetitions = tokens / unique_tokens - 1
    worth = REPETITION_SCALE * (1 - math.exp(-repetitions / REPETITION_SCALE))
    return unique_tokens * (1 + worth)


def effective_parameters(parameters: float, unique_tokens: float) -> float:
    """Return how many parameters are of use for a text: those beyond its tokens count less and less.

    N' = U_N + U_N·R_N*·(1 - exp(-R_N/R_N*)), with R_N = N/U_N - 1 and R_N* = 5.31: Muennighoff et al. 2023
    (arXiv:2305.16264), with the tokens of the unique text for U_N. Increasing in both arguments.
    """
    if parameters <= unique_tokens:
        return parameters
    excess = parameters / unique_tokens - 1
    return unique_tokens * (1 + EXCESS_SCALE * (1 - math.exp(-excess / EXCESS_SCALE)))
