"""The proof that a run can be stopped and resumed: train it in one go and in two parts, and compare.

`python -m minimind.runs.verify_resume config.toml` is what each launched process of a second part runs.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config.options import CONFIG_SECTIONS, PretrainConfig
from ..config.presets import resolve
from ..config.schema import read_toml, write_toml
from ..data.batch_plan import fitted_to, rows_of_a_step
from ..distributed.accelerator import choose_precision
from ..errors import ConfigError, TrainingError, UserError
from ..io.atomic import write_text
from ..run_folder import RunFolder
from ..training.pretrain import pretrain

# Largest relative difference of a loss that counts as none where sums are taken in another order: by another
# number of processes, or on a GPU, whose kernels do not repeat themselves to the last bit.
TOLERANCES = {"no": 1e-5, "bf16": 1e-2, "fp16": 1e-2}
EVALUATION_BATCHES = 8


@dataclass(frozen=True)
class ComparedStep:
    """One report, or one evaluation, of both runs.

    Attributes:
        step: optimizer steps done.
        what: `loss` or `val_loss`.
        straight: the value in the run that never stopped, in nats per token; NaN where there is none.
        resumed: the value in the run that was stopped.
        same_rows: whether both had trained on the same rows in the same order up to this step.
    """

    step: int
    what: str
    straight: float
    resumed: float
    same_rows: bool

    @property
    def difference(self) -> float:
        """The difference relative to the larger value; 0 for values that are equal, NaN if one is NaN."""
        if self.straight == self.resumed:
            return 0.0
        return abs(self.straight - self.resumed) / max(abs(self.straight), abs(self.resumed))


@dataclass(frozen=True)
class ResumeCheck:
    """What the comparison found.

    Attributes:
        compared: all reports and evaluations in order.
        stopped_after: the step after which the second run was stopped.
        processes: how many processes its second part ran on.
        tolerance: largest relative difference that counts as none; 0 asks for equal bits.
    """

    compared: tuple[ComparedStep, ...]
    stopped_after: int
    processes: int
    tolerance: float

    @property
    def first_difference(self) -> ComparedStep | None:
        """The first step at which the runs part, None where they never do."""
        # Written so that a NaN is a difference.
        return next(
            (one for one in self.compared if not (one.same_rows and one.difference <= self.tolerance)), None
        )

    @property
    def largest_difference(self) -> float:
        """The largest relative difference of a loss."""
        return max((one.difference for one in self.compared), default=0.0)


def verify_resume(
    config: PretrainConfig,
    steps: int,
    *,
    processes: int = 1,
    note: Callable[[str], object] = lambda text: None,
) -> ResumeCheck:
    """Train `steps` steps in one go and in two halves, in temporary folders, and compare them step by step.

    Both runs have the options given, so learning rates are those of a run of `steps` steps, except for what
    has no part in it: every step is reported, both halves end with a short evaluation, no tracker is fed.

    Args:
        config: of the run to check.
        steps: at least 2.
        processes: on how many processes of this machine the second half runs.
        note: told what is being done, a sentence each.

    Raises:
        UserError: for options that `pretrain` refuses too, or that cannot be compared.
        KeyboardInterrupt: when a signal asked to stop.
    """
    _refuse(config, steps, processes)
    half = steps // 2
    with tempfile.TemporaryDirectory(prefix="minimind-verify-resume-") as name:
        straight, parted = Path(name) / "straight", Path(name) / "resumed"
        short = dataclasses.replace(
            config,
            max_steps=steps,
            max_tokens=None,
            epochs=max(config.epochs or 1, steps),  # a pass has at least one step
            log_interval=1,
            eval_interval=half,
            eval_batches=min(config.eval_batches or EVALUATION_BATCHES, EVALUATION_BATCHES),
            save_interval=steps,
            keep_checkpoints=1,
            keep_every=None,
            tracker=("none",),
            resume=None,
            output_dir=str(straight),
            global_batch_size=rows_of_a_step(config, 1),
            accumulation_steps=None,
        )
        note(f"training {steps} steps in one go")
        _train(short, None)
        short = dataclasses.replace(short, output_dir=str(parted))
        note(f"training {half} steps and stopping")
        _train(short, half)
        short = dataclasses.replace(short, resume="auto")
        note(f"resuming on {processes} process{'es' if processes > 1 else ''} for {steps - half} steps more")
        if processes == 1:
            _train(short, None)
        else:
            _train_launched(fitted_to(short, processes), processes, Path(name))
        compared = tuple(_compared(RunFolder(straight), RunFolder(parted)))
    if not any(one.step == steps and math.isfinite(one.straight) for one in compared):
        raise TrainingError(f"no loss was reported at step {steps}; is the loss finite in an ordinary run?")
    exact = processes == 1 and not _on_gpu()
    return ResumeCheck(compared, half, processes, 0.0 if exact else TOLERANCES[choose_precision(config)])


def _refuse(config: PretrainConfig, steps: int, processes: int) -> None:
    problems = []
    if steps < 2:
        problems.append(f"--steps {steps} cannot be halved; give at least 2.")
    if processes < 1:
        problems.append(f"--processes {processes} is out of range; it must be at least 1.")
    if processes > 1 and config.dropout > 0:
        problems.append(
            f"--dropout {config.dropout} draws other numbers on another number of processes, so losses would "
            "not compare; give --dropout 0, or leave --processes out."
        )
    if processes > 1 and _on_gpu() and processes > torch.cuda.device_count():
        problems.append(f"--processes {processes} needs as many GPUs; here are {torch.cuda.device_count()}.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        problems.append("verify-resume launches processes itself; run it without a launcher.")
    if problems:
        raise ConfigError(problems)


def _on_gpu() -> bool:
    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    return not use_cpu and (torch.cuda.is_available() or torch.backends.mps.is_available())


def _train(config: PretrainConfig, stop_after: int | None) -> None:
    with redirect_stdout(io.StringIO()):
        result = pretrain(config, stop_after=stop_after)
    if result.stopped is not None and result.steps != stop_after:
        raise KeyboardInterrupt


def _train_launched(config: PretrainConfig, processes: int, folder: Path) -> None:
    """Run the rest of a training on several processes of this machine.

    Raises:
        TrainingError: when they do not get to the end, with what they said last.
    """
    file = folder / "config.toml"
    write_text(file, write_toml(config, CONFIG_SECTIONS))
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"),
        *("--num_processes", str(processes), "--main_process_port", "0"),
        *("-m", "minimind.runs.verify_resume", str(file)),
    ]
    environment = os.environ if _on_gpu() else {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode and not (Path(config.output_dir) / "model" / "config.json").exists():
        lines = done.stderr.splitlines()
        said = [line for line in lines if line.startswith("error: ")] or lines[-20:]
        raise TrainingError(f"the {processes} processes did not finish:\n" + "\n".join(said))


def _compared(straight: RunFolder, resumed: RunFolder) -> Iterator[ComparedStep]:
    """Yield reports and evaluations of both runs, matched by step."""
    ours, theirs = _values(straight.metrics), _values(resumed.metrics)
    # At a step the report comes before the evaluation.
    for step, what in sorted(ours.keys() | theirs.keys()):
        (left, left_rows), (right, right_rows) = (
            values.get((step, what), (math.nan, None)) for values in (ours, theirs)
        )
        yield ComparedStep(step, what, left, right, left_rows == right_rows)


def _values(metrics: Path) -> dict[tuple[int, str], tuple[float, str | None]]:
    """Return losses and digests of the rows by step and name of the loss."""
    values: dict[tuple[int, str], tuple[float, str | None]] = {}
    with metrics.open(encoding="utf-8") as file:
        for line in map(json.loads, file):
            for what in ("loss", "val_loss"):
                if what in line:
                    value = math.nan if line[what] is None else line[what]
                    values[line["step"], what] = value, line.get("digest")
    return values


def _one_of_several(file: Path) -> int:
    """Train as a file says, as one of the processes that were launched; return the exit code."""
    try:
        pretrain(resolve(file=read_toml(file), file_name=str(file)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_one_of_several(Path(sys.argv[1])))
