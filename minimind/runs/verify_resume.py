"""Verify that a run resumes exactly: train it without and with an interruption, and compare.

The launched processes of the resumed part run `python -m minimind.runs.verify_resume config.toml`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config.options import CONFIG_SECTIONS, PretrainConfig
from ..config.presets import resolve
from ..config.schema import read_toml, write_toml
from ..data.batch_plan import fit_micro_batch, sequences_per_step
from ..distributed.accelerator import choose_precision
from ..errors import ConfigError, TrainingError, UserError
from ..io.atomic import write_text
from ..launch_env import device_type
from ..run_folder import RunFolder
from ..tracking.metrics_file import read_metrics
from ..training.pretrain import pretrain

# Relative differences of a loss that count as rounding: another number of processes sums in another order,
# and GPU kernels are not deterministic to the last bit.
TOLERANCES = {"no": 1e-5, "bf16": 1e-2, "fp16": 1e-2}
EVALUATION_BATCHES = 8


@dataclass(frozen=True)
class ComparedStep:
    """One report or evaluation of both runs.

    Attributes:
        step: optimizer steps done.
        what: `loss` or `val_loss`.
        straight: value of the uninterrupted run, in nats per token; NaN where missing.
        resumed: value of the resumed run.
        same_data: whether both trained on the same sequences in the same order up to this step.
    """

    step: int
    what: str
    straight: float
    resumed: float
    same_data: bool

    @property
    def difference(self) -> float:
        """The difference relative to the larger value; 0 for values that are equal, NaN if one is NaN."""
        if self.straight == self.resumed:
            return 0.0
        return abs(self.straight - self.resumed) / max(abs(self.straight), abs(self.resumed))


@dataclass(frozen=True)
class ResumeCheck:
    """Result of the comparison.

    Attributes:
        compared: all reports and evaluations in order.
        stopped_after: step of the interruption.
        processes: number of processes of the resumed part.
        tolerance: largest relative difference accepted; 0 requires equal bits.
    """

    compared: tuple[ComparedStep, ...]
    stopped_after: int
    processes: int
    tolerance: float

    @property
    def first_difference(self) -> ComparedStep | None:
        """The first step at which the runs differ, None where they never do."""
        # A NaN is a difference.
        return next(
            (one for one in self.compared if not (one.same_data and one.difference <= self.tolerance)), None
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
    """Train `steps` steps without and with an interruption, in temporary folders, and compare the reports.

    Both runs have the given options and a schedule of `steps` steps; every step is reported, both halves end
    with a short evaluation, and no tracker is used.

    Args:
        config: options of the run to check.
        steps: at least 2.
        processes: number of local processes of the second half.
        note: called with progress messages.

    Raises:
        UserError: for options that `pretrain` refuses, or that cannot be compared.
        KeyboardInterrupt: after a stop signal.
    """
    _refuse(config, steps, processes)
    half = steps // 2
    with tempfile.TemporaryDirectory(prefix="minimind-verify-resume-") as name:
        straight, resumed = Path(name) / "straight", Path(name) / "resumed"
        short = dataclasses.replace(
            config,
            max_steps=steps,
            max_tokens=None,
            budget=None,
            budget_keeps=(),
            epochs=max(config.epochs or 1, steps),  # an epoch has at least one step
            log_interval=1,
            eval_interval=half,
            eval_batches=min(config.eval_batches or EVALUATION_BATCHES, EVALUATION_BATCHES),
            save_interval=steps,
            keep_checkpoints=1,
            keep_every=None,
            tracker=("none",),
            resume=None,
            output_dir=str(straight),
            global_batch_size=sequences_per_step(config, 1),
            accumulation_steps=None,
        )
        note(f"training {steps} steps without interruption")
        _train(short, None)
        short = dataclasses.replace(short, output_dir=str(resumed))
        note(f"training {half} steps and stopping")
        _train(short, half)
        short = dataclasses.replace(short, resume="auto")
        note(f"resuming on {processes} process{'es' if processes > 1 else ''} for {steps - half} steps more")
        if processes == 1:
            _train(short, None)
        else:
            _train_launched(fit_micro_batch(short, processes), processes, Path(name))
        compared = tuple(_compared(RunFolder(straight), RunFolder(resumed)))
    if not any(one.step == steps and math.isfinite(one.straight) for one in compared):
        raise TrainingError(
            f"no loss was reported at step {steps}; check that the loss of an ordinary run is finite."
        )
    exact = processes == 1 and device_type() == "cpu"
    return ResumeCheck(compared, half, processes, 0.0 if exact else TOLERANCES[choose_precision(config)])


def _refuse(config: PretrainConfig, steps: int, processes: int) -> None:
    problems = []
    if steps < 2:
        problems.append(f"--steps {steps} is too small; give at least 2.")
    if processes < 1:
        problems.append(f"--processes {processes} is out of range; it must be at least 1.")
    if processes > 1 and config.dropout > 0:
        problems.append(
            f"--dropout {config.dropout} depends on the number of processes, so losses are not comparable; "
            "give --dropout 0, or remove --processes."
        )
    if processes > 1 and device_type() != "cpu" and processes > torch.cuda.device_count():
        problems.append(
            f"--processes {processes} needs as many GPUs; this machine has {torch.cuda.device_count()}."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        problems.append("verify-resume launches processes itself; run it without a launcher.")
    if problems:
        raise ConfigError(problems)


def _train(config: PretrainConfig, stop_after: int | None) -> None:
    result = pretrain(config, stop_after=stop_after, handle_signals=True)
    if result.stopped is not None and result.steps != stop_after:
        raise KeyboardInterrupt


def _train_launched(config: PretrainConfig, processes: int, folder: Path) -> None:
    """Train the second half on several processes of this machine; raise their last output if they fail."""
    file = folder / "config.toml"
    write_text(file, write_toml(config, CONFIG_SECTIONS))
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"),
        *("--num_processes", str(processes), "--main_process_port", "0"),
        *("-m", "minimind.runs.verify_resume", str(file)),
    ]
    environment = os.environ if device_type() != "cpu" else {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        command, env=environment, capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    if done.returncode and not (Path(config.output_dir) / "model" / "config.json").exists():
        lines = done.stderr.splitlines()
        errors = [line for line in lines if line.startswith("error: ")] or lines[-20:]
        raise TrainingError(f"the {processes} processes did not finish:\n" + "\n".join(errors))


def _compared(straight: RunFolder, resumed: RunFolder) -> Iterator[ComparedStep]:
    """Yield reports and evaluations of both runs, matched by step."""
    both = _values(straight.metrics), _values(resumed.metrics)
    # `loss` sorts before `val_loss`, in the order of a step.
    for step, what in sorted(both[0].keys() | both[1].keys()):
        (left, left_digest), (right, right_digest) = (
            values.get((step, what), (math.nan, None)) for values in both
        )
        yield ComparedStep(step, what, left, right, left_digest == right_digest)


def _values(metrics: Path) -> dict[tuple[int, str], tuple[float, str | None]]:
    """Return losses and data digests by step and name of the loss."""
    values: dict[tuple[int, str], tuple[float, str | None]] = {}
    for line in read_metrics(metrics):
        for what in ("loss", "val_loss"):
            if what in line:
                value = math.nan if line[what] is None else line[what]
                values[line["step"], what] = value, line.get("digest")
    return values


def _train_from_file(file: Path) -> int:
    """Train with the options of a file, as one of the launched processes; return the exit code."""
    try:
        pretrain(resolve(file=read_toml(file), file_name=str(file)), handle_signals=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_train_from_file(Path(sys.argv[1])))
