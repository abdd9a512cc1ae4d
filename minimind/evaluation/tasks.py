"""Scores of a model: the packaged cloze items, and tasks of EleutherAI's lm-evaluation-harness (`lm-eval`).

The harness is passed an adapter for its model interface (`lm_eval.api.model.LM`), so that transformers is not
needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..formats.open_model import CausalLM, load_with_tokenizer
from ..generation.engine import Decoder, InferenceEngine
from ..generation.sampling import Sampling
from ..generation.text import choose_device, continue_texts
from ..launch_env import world_size
from ..modeling.transformer import MiniMindForCausalLM
from ..tokenizer import Tokenizer
from .cloze import LANGUAGES, ClozeScore, cloze_scores
from .likelihood import log_likelihoods

# Of a task that names no length, in tokens.
_NEW_TOKENS = 256


@dataclass(frozen=True)
class TaskScore:
    """One metric of a task.

    Attributes:
        task: name of the task.
        metric: its metric, such as `acc`, with the filter of the answers where there is one.
        value: the score.
        stderr: its standard error, None where the task has none.
    """

    task: str
    metric: str
    value: float
    stderr: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the score as JSON types."""
        return {"task": self.task, "metric": self.metric, "value": self.value, "stderr": self.stderr}


def score_model(
    path: str,
    tasks: Sequence[str],
    *,
    max_length: int,
    tokenizer: str | None = None,
    task_dir: str | Path | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[ClozeScore | TaskScore]:
    """Score a model in float32 on the accelerator, or else the CPU.

    Args:
        path: see `open_model.open_model`; a run yields its final model.
        tasks: `cloze` for all packaged items, `cloze_en`, `cloze_zh`, and tasks of lm-evaluation-harness.
        max_length: context in tokens.
        tokenizer: a `tokenizer.json` or its folder, instead of the model's own.
        task_dir: see `harness_scores`.
        limit: see `harness_scores`; not for the packaged items.
        progress: called with the sequences done and all sequences, for each set.

    Raises:
        UserError: when the model cannot be read, or a task cannot be run.
    """
    if world_size() > 1:
        raise ConfigError("--tasks runs in one process; start the command without a launcher.")
    _, model, found = load_with_tokenizer(path, tokenizer)
    model.to(choose_device("auto")).eval()
    length = min(max_length, model.config.max_position_embeddings)
    packaged = [name for name in LANGUAGES if "cloze" in tasks or f"cloze_{name}" in tasks]
    others = [name for name in tasks if name != "cloze" and name.removeprefix("cloze_") not in LANGUAGES]
    scores: list[ClozeScore | TaskScore] = []
    if packaged:
        scores += cloze_scores(model, found, max_length=length, languages=packaged, progress=progress)
    if others:
        scores += harness_scores(
            model, found, others, max_length=length, task_dir=task_dir, limit=limit, progress=progress
        )
    return scores


def harness_scores(
    model: CausalLM,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    max_length: int,
    task_dir: str | Path | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[TaskScore]:
    """Evaluate a model on tasks of lm-evaluation-harness, in one process.

    Documents start with the start token, as in training.

    Args:
        model: on its device, in evaluation mode.
        tokenizer: of the model.
        tasks: names of tasks or groups.
        max_length: context in tokens; the beginning of a longer one is cut off.
        task_dir: folder with tasks as YAML files, besides those of the harness; their data may be local.
        limit: items of each task; None for all.
        progress: called with the sequences done and all sequences, for each kind of request.

    Raises:
        ConfigError: when lm-eval is not installed, a task is not known, or its data cannot be loaded.
    """
    try:
        from lm_eval import evaluator
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            f"--tasks {','.join(tasks)} needs the package lm-eval ({error}); pip install lm-eval, or choose "
            "--tasks cloze, which needs nothing."
        ) from error
    if task_dir is not None and not Path(task_dir).is_dir():
        raise ConfigError(f"--task-dir {task_dir} is not a folder; name one with the YAML files of tasks.")
    manager = TaskManager(include_path=None if task_dir is None else str(task_dir))
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise ConfigError(
            f"--tasks {unknown[0]} is not a task of lm-eval or of --task-dir; `lm_eval ls tasks` lists them."
        )
    try:
        results = evaluator.simple_evaluate(
            _adapter(model, tokenizer, max_length, progress),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=1000,
            log_samples=False,
        )
    except OSError as error:  # of the network too
        raise ConfigError(
            f"--tasks {','.join(tasks)}: the data could not be loaded ({error}). Without a network, name a "
            "folder of tasks on local files by --task-dir; see docs/evaluation.md."
        ) from error
    return [score for task, found in results["results"].items() for score in _scores(task, found)]


def _scores(task: str, found: dict[str, Any]) -> list[TaskScore]:
    """Return the metrics of a task, whose keys are `metric,filter`."""
    scores = []
    for key, value in found.items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = found.get(f"{metric}_stderr,{filter_name}")
        name = metric if filter_name == "none" else f"{metric} ({filter_name})"
        error = float(stderr) if isinstance(stderr, int | float) else None
        scores.append(TaskScore(task, name, float(value), error))
    return scores


def _adapter(
    model: CausalLM, tokenizer: Tokenizer, max_length: int, progress: Callable[[int, int], None]
) -> Any:
    """Return the model behind the harness's interface; a class of a package that may be missing."""
    from lm_eval.api.model import LM

    start = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]

    class MiniMindLM(LM):
        def loglikelihood(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            pairs = [split_pair(tokenizer, *request.args) for request in requests]
            prefixed = [([*start, *context], continuation) for context, continuation in pairs]
            return log_likelihoods(model, prefixed, max_length=max_length, progress=progress)

        def loglikelihood_rolling(self, requests: Any, **_: Any) -> list[float]:
            windows: list[tuple[list[int], list[int]]] = []
            counts = []
            for request in requests:
                ids = [*start, *tokenizer.encode(request.args[0])]
                # Without overlap; each token but the start counts once.
                spans = range(1, len(ids), max_length)
                windows += [(ids[first - 1 : first], ids[first : first + max_length]) for first in spans]
                counts.append(len(spans))
            values = log_likelihoods(model, windows, max_length=max_length, progress=progress)
            found = iter(value for value, _ in values)
            return [sum(next(found) for _ in range(count)) for count in counts]

        def generate_until(self, requests: Any, **_: Any) -> list[str]:
            texts = []
            # An engine copies the weights.
            decoder = InferenceEngine(model) if isinstance(model, MiniMindForCausalLM) else model
            for number, request in enumerate(requests, start=1):
                prompt, options = request.args
                texts.append(_until(decoder, tokenizer, prompt, dict(options)))
                progress(number, len(requests))
            return texts

    return MiniMindLM()


def split_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the ids of context and continuation as parts of the ids of both.

    Spaces at the end of the context belong to the first word of the continuation, as in training.
    """
    spaces = len(context) - len(context.rstrip())
    if spaces:
        continuation = context[-spaces:] + continuation
        context = context[:-spaces]
    ids = tokenizer.encode(context)
    return ids, tokenizer.encode(context + continuation)[len(ids) :]


def _until(model: Decoder, tokenizer: Tokenizer, prompt: str, options: dict[str, Any]) -> str:
    until = options.get("until") or []
    until = [until] if isinstance(until, str) else until
    temperature = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
    sampling = Sampling(temperature=temperature)
    room = model.config.max_position_embeddings - len(tokenizer.encode(prompt)) - 1
    limit = max(1, min(int(options.get("max_gen_toks") or _NEW_TOKENS), room))
    (done,) = continue_texts(model, tokenizer, [prompt], sampling, max_new_tokens=limit, seed=0)
    return min((done.text.split(stop)[0] for stop in until if stop), key=len, default=done.text)
