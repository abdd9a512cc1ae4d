"""Options of a pretraining run: names, types, defaults, help and checks, in one place.

The command line, the TOML reader, the documentation and the library all read the dataclasses below.
Nothing here imports torch or touches a disk, so that `--help` is immediate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from ..errors import ConfigError
from ..formatting import parse_duration
from .schema import FieldInfo, range_problems

# Peak learning rate where neither the user nor a preset gives one; what suits one optimizer does not suit
# the other.
LEARNING_RATES: Mapping[str, float] = {"muon": 4e-3, "adamw": 5e-4}

AUTO = "auto"
DEFAULT_BATCH_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data"""

    data: Annotated[
        tuple[str, ...],
        FieldInfo(
            "Training text: a .jsonl(.gz), .txt or .parquet file, a folder or a glob. Repeatable; PATH:0.7 "
            "gives an entry that share of the training tokens.",
            aliases=("--data-path",),
            metavar="PATH",
            default_text="text embedded in Python",
            common=True,
        ),
    ] = ()
    val_data: Annotated[
        tuple[str, ...],
        FieldInfo("Validation text, in the same formats as --data. Repeatable.", metavar="PATH", common=True),
    ] = ()
    val_fraction: Annotated[
        float,
        FieldInfo(
            "Share of documents held out for validation, chosen by content; unused with --val-data.",
            minimum=0.0,
            below=1.0,
        ),
    ] = 0.01
    tokenizer: Annotated[
        str | None,
        FieldInfo(
            "A tokenizer.json, or a folder that holds one.",
            metavar="PATH",
            default_text="the one in the package",
            common=True,
        ),
    ] = None
    text_key: Annotated[str, FieldInfo("Field of a JSONL object or parquet row that holds the text.")] = (
        "text"
    )
    max_seq_len: Annotated[int, FieldInfo("Tokens in one row.", minimum=2, common=True)] = 512
    packing: Annotated[
        bool,
        FieldInfo("Lay documents end to end in full rows; off: one document a row, truncated and padded."),
    ] = True
    cache_dir: Annotated[
        str | None,
        FieldInfo("Where tokenized text is kept.", metavar="FOLDER", default_text="~/.cache/minimind"),
    ] = None
    bad_lines: Annotated[
        Literal["error", "skip"], FieldInfo("Stop at a line that cannot be read, or count it and go on.")
    ] = "error"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Model"""

    hidden_size: Annotated[int, FieldInfo("Width of the model.", minimum=1, common=True)] = 512
    num_hidden_layers: Annotated[int, FieldInfo("Transformer blocks.", minimum=1, common=True)] = 8
    num_attention_heads: Annotated[int, FieldInfo("Query heads.", minimum=1, common=True)] = 8
    num_key_value_heads: Annotated[
        int, FieldInfo("Key and value heads, shared by groups of query heads.", minimum=1)
    ] = 2
    head_dim: Annotated[
        int | None,
        FieldInfo("Width of one head.", minimum=2, default_text="hidden size / attention heads"),
    ] = None
    intermediate_size: Annotated[
        int | None,
        FieldInfo(
            "Width of the SwiGLU layer.",
            minimum=1,
            default_text="8/3 of the hidden size, up to a multiple of 64",
        ),
    ] = None
    use_moe: Annotated[
        bool, FieldInfo("Give every block a mixture of experts in place of one SwiGLU layer.", common=True)
    ] = False
    num_experts: Annotated[int, FieldInfo("Experts in a block.", minimum=1)] = 4
    num_experts_per_tok: Annotated[int, FieldInfo("Experts that each token passes.", minimum=1)] = 1
    moe_intermediate_size: Annotated[
        int | None,
        FieldInfo("Width of one expert.", minimum=1, default_text="the intermediate size"),
    ] = None
    router_aux_loss_coef: Annotated[
        float, FieldInfo("Weight of the loss that keeps the experts equally busy.", minimum=0.0)
    ] = 0.01
    vocab_size: Annotated[
        int | None,
        FieldInfo("Rows of the embedding.", minimum=1, default_text="the tokenizer's"),
    ] = None
    dropout: Annotated[float, FieldInfo("Dropout probability.", minimum=0.0, below=1.0)] = 0.0
    rope_theta: Annotated[float, FieldInfo("Base of the rotary position embedding.", above=0.0)] = 1e6
    tie_word_embeddings: Annotated[bool, FieldInfo("Use one matrix for the embedding and the output.")] = True
    from_weight: Annotated[
        str | None,
        FieldInfo(
            "Start from the weights of this model folder, run, checkpoint or .pth of the original minimind.",
            metavar="PATH",
            default_text="random weights",
            common=True,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """Optimization"""

    epochs: Annotated[int, FieldInfo("Passes over the training text.", minimum=1, common=True)] = 1
    max_steps: Annotated[
        int | None, FieldInfo("Stop after this many optimizer steps.", minimum=1, common=True)
    ] = None
    max_tokens: Annotated[
        int | None, FieldInfo("Stop after this many training tokens.", minimum=1, common=True)
    ] = None
    batch_size: Annotated[
        int | Literal["auto"],
        FieldInfo(
            "Rows in one micro-batch of one process; auto takes the fastest, measured.",
            minimum=1,
            common=True,
        ),
    ] = DEFAULT_BATCH_SIZE
    accumulation_steps: Annotated[
        int | None,
        FieldInfo(
            "Micro-batches in one optimizer step.", minimum=1, default_text="1, or from --global-batch-size"
        ),
    ] = None
    global_batch_size: Annotated[
        int | None,
        FieldInfo(
            "Rows in one optimizer step over all processes; sets --accumulation-steps.",
            minimum=1,
            default_text="batch size x accumulation x processes",
            common=True,
        ),
    ] = None
    optimizer: Annotated[
        Literal["muon", "adamw"],
        FieldInfo("What updates the matrices inside the blocks; all else is always updated by AdamW."),
    ] = "muon"
    learning_rate: Annotated[
        float | None,
        FieldInfo(
            "Peak learning rate.",
            above=0.0,
            default_text=", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items()),
            common=True,
        ),
    ] = None
    lr_schedule: Annotated[
        Literal["cosine", "linear", "wsd", "constant"],
        FieldInfo("How the learning rate falls after warm-up; wsd is warm-up, stable, decay.", common=True),
    ] = "cosine"
    warmup_steps: Annotated[
        int | None,
        FieldInfo("Steps of linear warm-up.", minimum=0, default_text="2% of the steps, at most 1000"),
    ] = None
    min_lr_ratio: Annotated[
        float, FieldInfo("Final learning rate as a share of the peak.", minimum=0.0, maximum=1.0)
    ] = 0.1
    decay_ratio: Annotated[
        float, FieldInfo("Share of the steps that wsd spends decaying.", above=0.0, maximum=1.0)
    ] = 0.2
    decay_steps: Annotated[
        int | None,
        FieldInfo("Steps that wsd spends decaying.", minimum=1, default_text="from --decay-ratio"),
    ] = None
    decay_shape: Annotated[
        Literal["sqrt", "linear"],
        FieldInfo("How wsd decays: 1 - sqrt of the way through the decay, or a straight line."),
    ] = "sqrt"
    weight_decay: Annotated[
        float, FieldInfo("Weight decay on matrices; norms and embeddings have none.", minimum=0.0)
    ] = 0.1
    beta1: Annotated[float, FieldInfo("AdamW decay of the first moment.", minimum=0.0, below=1.0)] = 0.9
    beta2: Annotated[float, FieldInfo("AdamW decay of the second moment.", minimum=0.0, below=1.0)] = 0.95
    grad_clip: Annotated[float, FieldInfo("Largest norm of the gradient; 0 does not clip.", minimum=0.0)] = (
        1.0
    )
    seed: Annotated[
        int, FieldInfo("Seed of weights, order and dropout.", minimum=0, maximum=2**32 - 1, common=True)
    ] = 42


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Run"""

    mixed_precision: Annotated[
        Literal["auto", "no", "bf16", "fp16"],
        FieldInfo(
            "Precision of the matrix products; auto takes bf16 where the GPU, or the CPU of a wide model, "
            "has it.",
            aliases=("--dtype",),
            synonyms=(("bfloat16", "bf16"), ("float16", "fp16"), ("float32", "no")),
            common=True,
        ),
    ] = "auto"
    compile: Annotated[
        bool | None,
        FieldInfo(
            "Compile the model: a later first step, faster ones.",
            default_text="on a GPU, but for a short run with CUDA graphs",
        ),
    ] = None
    cuda_graphs: Annotated[
        bool | None,
        FieldInfo(
            "Launch the two passes of a micro-batch in one go, which keeps their memory to them.",
            default_text="on one GPU, where a run takes up to 60% of its memory",
        ),
    ] = None
    activation_checkpointing: Annotated[
        bool,
        FieldInfo(
            "Keep one tensor a block and compute the rest again in the backward pass: less memory, slower."
        ),
    ] = False
    profile: Annotated[
        bool,
        FieldInfo("Record steps 10 to 14 in the folder profile of the output folder, for ui.perfetto.dev."),
    ] = False
    log_interval: Annotated[int, FieldInfo("Steps between two reports.", minimum=1, common=True)] = 100
    eval_interval: Annotated[
        int | None,
        FieldInfo("Steps between two evaluations.", minimum=1, default_text="the save interval", common=True),
    ] = None
    eval_batches: Annotated[
        int | None, FieldInfo("Stop an evaluation after this many batches.", minimum=1, default_text="all")
    ] = None
    sample_interval: Annotated[
        int | None,
        FieldInfo(
            "Steps between two samples of what the model writes.", minimum=1, default_text="no samples"
        ),
    ] = None
    sample_prompt: Annotated[
        tuple[str, ...],
        FieldInfo(
            "Text for a sample to continue. Repeatable.",
            metavar="TEXT",
            default_text="the beginning of a document",
        ),
    ] = ()
    save_interval: Annotated[int, FieldInfo("Steps between two checkpoints.", minimum=1, common=True)] = 1000
    on_spike: Annotated[
        Literal["report", "skip", "rewind"],
        FieldInfo(
            "At a loss that is not finite or jumps: report the texts, also leave the update out, or also go "
            "back to the last checkpoint and on without these rows."
        ),
    ] = "report"
    spike_sigma: Annotated[
        float, FieldInfo("Deviations above the median of late losses that make a jump.", above=0.0)
    ] = 8.0
    keep_checkpoints: Annotated[int, FieldInfo("Newest checkpoints kept, besides the best.", minimum=1)] = 2
    keep_every: Annotated[
        int | None,
        FieldInfo("Also save every so many steps, and never remove these checkpoints.", minimum=1),
    ] = None
    output_dir: Annotated[
        str, FieldInfo("Folder of the run.", aliases=("--save-dir",), metavar="FOLDER", common=True)
    ] = "out"
    resume: Annotated[
        str | None,
        FieldInfo(
            "Go on from the newest valid checkpoint in the output folder (auto), or from the one named.",
            metavar="[PATH]",
            common=True,
        ),
    ] = None
    on_save_error: Annotated[
        Literal["continue", "stop"],
        FieldInfo("After a checkpoint that could not be written, train on to the next one, or stop."),
    ] = "continue"
    max_time: Annotated[
        str | None,
        FieldInfo(
            "Stop after this time, such as 3h30m, with the state saved; the wsd schedule finishes by then.",
            metavar="TIME",
            common=True,
        ),
    ] = None
    dist_timeout: Annotated[
        str,
        FieldInfo("How long several processes wait for one that does not answer.", metavar="TIME"),
    ] = "10m"
    tracker: Annotated[
        tuple[Literal["tensorboard", "wandb", "swanlab", "none"], ...],
        FieldInfo("Where metrics go besides metrics.jsonl. Repeatable.", common=True),
    ] = ("tensorboard",)
    project: Annotated[
        str, FieldInfo("Project name shown by WandB and SwanLab.", aliases=("--wandb-project",))
    ] = "minimind"
    run_name: Annotated[
        str | None, FieldInfo("Name of the run.", default_text="the output folder's name")
    ] = None


# Fields of the last base come first.
@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig, OptimizationConfig, ModelConfig, DataConfig):
    """Everything one pretraining run depends on.

    Raises:
        ConfigError: with all values that are wrong on their own, else with all that do not fit together.
    """

    def __post_init__(self) -> None:
        problems = [*range_problems(self)] or [*self._cross_problems()]
        if problems:
            raise ConfigError(problems)

    @property
    def peak_learning_rate(self) -> float:
        """The peak learning rate in force: as given, else what suits the optimizer."""
        return LEARNING_RATES[self.optimizer] if self.learning_rate is None else self.learning_rate

    @property
    def evaluation_interval(self) -> int:
        """Steps between two evaluations."""
        return self.eval_interval or self.save_interval

    def saves_after(self, step: int) -> bool:
        """Return whether a checkpoint is due after `step`."""
        return step % self.save_interval == 0 or (self.keep_every is not None and step % self.keep_every == 0)

    def _cross_problems(self) -> Iterator[str]:
        """Yield what is wrong between options that are right on their own."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            yield (
                f"--num-key-value-heads {kv_heads} does not divide --num-attention-heads {heads}; "
                f"use one of {_divisors(heads)}."
            )
        if self.head_dim is None and self.hidden_size % heads:
            yield (
                f"--hidden-size {self.hidden_size} is not a multiple of --num-attention-heads {heads}; "
                "change one of them or set --head-dim."
            )
        elif (self.head_dim or self.hidden_size // heads) % 2:
            yield (
                "the width of one head must be even for rotary positions; set --head-dim to an even number."
            )
        yield from self._expert_problems()
        if self.accumulation_steps and self.global_batch_size:
            yield (
                "--accumulation-steps and --global-batch-size both set the size of a step; "
                "give only one of them."
            )
        if self.val_data and not self.data:
            yield "--val-data needs --data: name the training text too."
        for name, text in (("--max-time", self.max_time), ("--dist-timeout", self.dist_timeout)):
            try:
                parse_duration(text if text is not None else "1s")
            except ValueError:
                yield f"{name} {text} is not a time; write for example 3h30m, 90m or 45s."
        if "none" in self.tracker and len(self.tracker) > 1:
            yield "--tracker none cannot go with another tracker; leave one of them out."

    def _expert_problems(self) -> Iterator[str]:
        if self.num_experts_per_tok > self.num_experts:
            yield (
                f"--num-experts-per-tok {self.num_experts_per_tok} is more than --num-experts "
                f"{self.num_experts}; lower it."
            )
        if not self.use_moe and self.from_weight is None:
            for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
                value = getattr(self, name)
                if value != getattr(ModelConfig, name):
                    yield f"--{name.replace('_', '-')} {value} is of experts only; give --use-moe too."


def _divisors(n: int) -> str:
    # A slip of the finger may be a number so large that to try all below it would never end.
    most = 1000
    found = [d for d in range(1, min(n, most) + 1) if n % d == 0]
    return ", ".join(map(str, found if n <= most else [*found, n]))


CONFIG_SECTIONS: tuple[type, ...] = (DataConfig, ModelConfig, OptimizationConfig, RunConfig)
