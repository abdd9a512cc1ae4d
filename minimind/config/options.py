"""Options of a pretraining run: names, types, defaults and help.

The command line, TOML files, the documentation and the library read them. Importing them loads no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from ..errors import ConfigError
from .budget import BudgetConfig
from .checks import conflicts
from .data_options import DataConfig
from .naming import for_caller
from .recipe import ANCHOR_DECAY, ANCHOR_RATES, TRAINED_RATE
from .schema import FieldInfo, convert_fields, fill_unset, range_problems, schema_of

AUTO = "auto"
DEFAULT_BATCH_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Model"""

    hidden_size: Annotated[int | None, FieldInfo("Hidden size.", common=True, unset=512)] = None
    num_hidden_layers: Annotated[int | None, FieldInfo("Transformer layers.", common=True, unset=8)] = None
    num_attention_heads: Annotated[int | None, FieldInfo("Query heads.", common=True, unset=8)] = None
    num_key_value_heads: Annotated[
        int | None, FieldInfo("Key-value heads (grouped-query attention).", unset=2)
    ] = None
    head_dim: Annotated[
        int | None,
        FieldInfo("Dimension of an attention head.", minimum=2, default_text="hidden size / query heads"),
    ] = None
    intermediate_size: Annotated[
        int | None,
        FieldInfo(
            "Inner dimension of the SwiGLU MLP.",
            default_text="8/3 of the hidden size, rounded up to a multiple of 64",
        ),
    ] = None
    use_moe: Annotated[
        bool | None,
        FieldInfo("Replace the MLP of every layer by a mixture of experts.", common=True, unset=False),
    ] = None
    num_experts: Annotated[int | None, FieldInfo("Experts per layer.", unset=4)] = None
    num_experts_per_tok: Annotated[int | None, FieldInfo("Experts activated per token (top-k).", unset=1)] = (
        None
    )
    moe_intermediate_size: Annotated[
        int | None, FieldInfo("Inner dimension of an expert.", default_text="the intermediate size")
    ] = None
    router_aux_loss_coef: Annotated[
        float, FieldInfo("Coefficient of the router's load-balancing loss.", minimum=0.0)
    ] = 0.01
    vocab_size: Annotated[
        int | None, FieldInfo("Vocabulary size of the model.", default_text="the tokenizer's")
    ] = None
    dropout: Annotated[float, FieldInfo("Dropout probability.", minimum=0.0, below=1.0)] = 0.0
    rope_theta: Annotated[
        float | None, FieldInfo("Base of the rotary position embedding (RoPE).", above=0.0, unset=1e6)
    ] = None
    tie_word_embeddings: Annotated[
        bool | None, FieldInfo("Share the embedding matrix with the LM head.", unset=True)
    ] = None
    from_weight: Annotated[
        str | None,
        FieldInfo(
            "Initialize from a model folder of any architecture, a model on the Hub (owner/name), a run, "
            "a checkpoint or an upstream .pth file.",
            metavar="PATH",
            default_text="random initialization",
            common=True,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """Optimization"""

    epochs: Annotated[
        int | None,
        FieldInfo(
            "Epochs over the training data; the first limit that is reached ends the run.",
            default_text="1, or no limit if steps or tokens are limited",
            common=True,
        ),
    ] = None
    max_steps: Annotated[int | None, FieldInfo("Stop after this many optimizer steps.", common=True)] = None
    max_tokens: Annotated[int | None, FieldInfo("Stop after this many training tokens.", common=True)] = None
    batch_size: Annotated[
        int | Literal["auto"],
        FieldInfo(
            "Sequences per device per forward pass; `auto` benchmarks and picks the fastest.", common=True
        ),
    ] = DEFAULT_BATCH_SIZE
    accumulation_steps: Annotated[
        int | None,
        FieldInfo(
            "Micro-batches per optimizer step (gradient accumulation).",
            default_text="1, or from --global-batch-size",
        ),
    ] = None
    global_batch_size: Annotated[
        int | None,
        FieldInfo(
            "Sequences per optimizer step over all processes; sets --accumulation-steps.",
            default_text="batch size x accumulation steps x processes",
            common=True,
        ),
    ] = None
    optimizer: Annotated[
        Literal["normuon", "muon", "adamw"],
        FieldInfo(
            "Optimizer of the transformer weight matrices; embeddings and norms always use AdamW. normuon is "
            "Muon with normalized rows, a momentum warm-up and a higher learning rate of embedding and norms "
            "in short runs."
        ),
    ] = "normuon"
    learning_rate: Annotated[
        float | None,
        FieldInfo(
            "Peak learning rate.",
            above=0.0,
            default_text="from hidden size, global batch and training tokens; with --from-weight "
            f"{TRAINED_RATE:g} times that",
            common=True,
        ),
    ] = None
    lr_schedule: Annotated[
        Literal["cosine", "linear", "wsd", "constant"],
        FieldInfo("Learning rate schedule after warm-up; wsd is warmup-stable-decay.", common=True),
    ] = "cosine"
    warmup_steps: Annotated[
        int | None,
        FieldInfo("Linear warm-up steps.", minimum=0, default_text="2% of the steps, at most 1000"),
    ] = None
    min_lr_ratio: Annotated[
        float, FieldInfo("Final learning rate as a fraction of the peak.", minimum=0.0, maximum=1.0)
    ] = 0.1
    decay_ratio: Annotated[
        float, FieldInfo("Fraction of the steps in the decay phase of wsd.", above=0.0, maximum=1.0)
    ] = 0.2
    decay_steps: Annotated[
        int | None, FieldInfo("Steps in the decay phase of wsd.", default_text="from --decay-ratio")
    ] = None
    decay_shape: Annotated[
        Literal["sqrt", "linear"], FieldInfo("Decay curve of wsd: 1 - sqrt(progress), or linear.")
    ] = "sqrt"
    weight_decay: Annotated[
        float | None,
        FieldInfo(
            "Weight decay of the weight matrices; norms and embeddings have none.",
            minimum=0.0,
            default_text="from learning rate, steps and epochs",
        ),
    ] = None
    beta1: Annotated[float, FieldInfo("AdamW beta1.", minimum=0.0, below=1.0)] = 0.9
    beta2: Annotated[float, FieldInfo("AdamW beta2.", minimum=0.0, below=1.0)] = 0.95
    grad_clip: Annotated[float, FieldInfo("Maximum gradient norm; 0 disables clipping.", minimum=0.0)] = 1.0
    seed: Annotated[
        int,
        FieldInfo(
            "Seed of initialization, data order and dropout.", minimum=0, maximum=2**32 - 1, common=True
        ),
    ] = 42


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Run"""

    mixed_precision: Annotated[
        Literal["auto", "no", "bf16", "fp16", "fp8"],
        FieldInfo(
            "Precision of matrix multiplications; `auto` uses bf16 (or fp16) on GPUs that support it, and "
            "bf16 for wide models on CPUs that do. `fp8` is bf16 with FP8 products in dense layers, on GPUs "
            "of compute capability 8.9 or more.",
            aliases=("--dtype",),
            synonyms=(("bfloat16", "bf16"), ("float16", "fp16"), ("float32", "no")),
            common=True,
        ),
    ] = "auto"
    reduce_dtype: Annotated[
        Literal["float32", "bf16"],
        FieldInfo(
            "Precision in which DDP sums gradients over processes: bf16 halves the communication and rounds.",
            synonyms=(("bfloat16", "bf16"),),
        ),
    ] = "float32"
    compile: Annotated[
        bool | None,
        FieldInfo(
            "torch.compile: slower start, faster steps.",
            default_text="on GPUs, except for short runs with CUDA graphs",
        ),
    ] = None
    cuda_graphs: Annotated[
        bool | None,
        FieldInfo(
            "Capture the steps in CUDA graphs (reserves their memory).",
            default_text="on GPUs, for runs that need at most 60% of their memory",
        ),
    ] = None
    activation_checkpointing: Annotated[
        bool, FieldInfo("Recompute activations in the backward pass: less memory, slower.")
    ] = False
    profile: Annotated[
        bool, FieldInfo("Trace steps 10 to 14 to OUTPUT_DIR/profile, for ui.perfetto.dev.")
    ] = False
    log_interval: Annotated[int, FieldInfo("Steps between reports.", common=True)] = 100
    eval_interval: Annotated[
        int | None, FieldInfo("Steps between evaluations.", default_text="the save interval", common=True)
    ] = None
    eval_batches: Annotated[
        int | None,
        FieldInfo(
            "Evaluate this many global batches, sampled evenly from the validation data.", default_text="all"
        ),
    ] = None
    sample_interval: Annotated[
        int | None, FieldInfo("Steps between generated samples.", default_text="no samples")
    ] = None
    sample_prompt: Annotated[
        tuple[str, ...],
        FieldInfo(
            "Prompt of a generated sample. Repeatable.",
            metavar="TEXT",
            default_text="the start of a document",
        ),
    ] = ()
    score_interval: Annotated[
        int | None,
        FieldInfo(
            "Steps between scores on the built-in cloze items, also after the last step.",
            default_text="no scores",
        ),
    ] = None
    save_interval: Annotated[int, FieldInfo("Steps between checkpoints.", common=True)] = 1000
    on_spike: Annotated[
        Literal["report", "skip", "rewind"],
        FieldInfo(
            "On a loss spike or NaN: report = log the documents; skip = also drop the update; rewind = also "
            "restore the last checkpoint and skip the batch."
        ),
    ] = "report"
    spike_sigma: Annotated[
        float,
        FieldInfo(
            "Spike threshold: robust standard deviations above the median of recent losses.", above=0.0
        ),
    ] = 8.0
    keep_checkpoints: Annotated[int, FieldInfo("Newest checkpoints to keep, besides the best.")] = 2
    keep_every: Annotated[
        int | None, FieldInfo("Also save every N steps, and keep these checkpoints forever.", metavar="N")
    ] = None
    output_dir: Annotated[
        str, FieldInfo("Output folder of the run.", aliases=("--save-dir",), metavar="FOLDER", common=True)
    ] = "out"
    resume: Annotated[
        str | None,
        FieldInfo(
            "Resume from the newest valid checkpoint in the output folder, or from PATH.",
            metavar="[PATH]",
            common=True,
        ),
    ] = None
    on_save_error: Annotated[
        Literal["continue", "stop"],
        FieldInfo("If a checkpoint cannot be written: continue to the next one, or stop."),
    ] = "continue"
    max_time: Annotated[
        str | None,
        FieldInfo(
            "Save and stop after this time, such as 3h30m; the wsd schedule ends by then.",
            metavar="TIME",
            common=True,
        ),
    ] = None
    dist_timeout: Annotated[str, FieldInfo("Timeout of communication between processes.", metavar="TIME")] = (
        "10m"
    )
    tracker: Annotated[
        tuple[Literal["tensorboard", "wandb", "swanlab", "mlflow", "csv", "none"], ...],
        FieldInfo(
            "Metric trackers besides metrics.jsonl. Repeatable.", common=True, plugins="minimind.trackers"
        ),
    ] = ("tensorboard",)
    project: Annotated[
        str, FieldInfo("Project name in WandB, SwanLab and MLflow.", aliases=("--wandb-project",))
    ] = "minimind"
    run_name: Annotated[
        str | None, FieldInfo("Name of the run in trackers.", default_text="the name of the output folder")
    ] = None
    verbose: Annotated[bool, FieldInfo("Print the whole report on the data at the start.")] = False


# The fields of the last base come first.
@dataclass(frozen=True, kw_only=True)
class PretrainConfig(BudgetConfig, RunConfig, OptimizationConfig, ModelConfig, DataConfig):
    """Configuration of a pretraining run.

    Paths may be `os.PathLike` and may begin with `~`; numbers may be NumPy or torch scalars.

    Raises:
        ConfigError: lists every invalid value; if there is none, every conflict between values.
    """

    def __post_init__(self) -> None:
        convert_fields(self)
        self.record_kept_options(CONFIG_SCHEMA)
        if self.from_weight is None:  # otherwise they are those of the weights
            fill_unset(self)
        problems = [*range_problems(self)]
        problems = problems or [for_caller(problem, CONFIG_SCHEMA) for problem in conflicts(self)]
        if problems:
            raise ConfigError(problems)

    @property
    def peak_learning_rate(self) -> float:
        """Peak learning rate; where neither an option nor the run sets it, `ANCHOR_RATES` of `recipe`."""
        return ANCHOR_RATES[self.optimizer] if self.learning_rate is None else self.learning_rate

    @property
    def matrix_weight_decay(self) -> float:
        """Weight decay; where neither an option nor the run sets it, `ANCHOR_DECAY` of `recipe`."""
        return ANCHOR_DECAY if self.weight_decay is None else self.weight_decay

    @property
    def evaluation_interval(self) -> int:
        """Steps between two evaluations."""
        return self.eval_interval or self.save_interval

    def saves_after(self, step: int) -> bool:
        """Return whether a checkpoint is due after `step`."""
        return step % self.save_interval == 0 or (self.keep_every is not None and step % self.keep_every == 0)

    @property
    def max_epochs(self) -> float:
        """The limit of epochs; by default 1, or infinity if another limit is given."""
        if self.epochs is not None:
            return self.epochs
        return 1 if self.max_steps is None and self.max_tokens is None else math.inf


CONFIG_SECTIONS: tuple[type, ...] = (DataConfig, ModelConfig, OptimizationConfig, RunConfig, BudgetConfig)
CONFIG_SCHEMA = schema_of(PretrainConfig)
