"""Plot the losses of a run with matplotlib, for papers."""

from __future__ import annotations

import errno
from pathlib import Path

from ..errors import ConfigError
from .record import RunRecord

FORMATS = (".png", ".pdf", ".svg")


def plot_losses(run: RunRecord, path: Path) -> None:
    """Draw training and validation loss by training tokens, or by steps where tokens were not recorded.

    Raises:
        ConfigError: without matplotlib, for another suffix, a run without losses, or a file that cannot be
            written.
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--plot {path} must end in .png, .pdf or .svg; rename it.")
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError:
        raise ConfigError("--plot needs the package matplotlib; pip install matplotlib.") from None
    training, validation = run.thinned("loss"), run.thinned("val_loss")
    if not training and not validation:
        raise ConfigError(f"{run.path} has no losses to plot yet; wait for its first report.")
    by_tokens = all(point.tokens is not None for point in (*training, *validation))
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for points, label, style in ((training, "training", "-"), (validation, "validation", "o-")):
        if points:
            x = [point.tokens or 0.0 if by_tokens else point.step for point in points]
            axes.plot(x, [point.value for point in points], style, label=label, markersize=3, linewidth=1.2)
            low, high = ([getattr(p, end) or p.value for p in points] for end in ("low", "high"))
            axes.fill_between(x, low, high, alpha=0.15, linewidth=0)
    # The first steps fall by most of the height.
    late = [p.value for points in (training, validation) for p in points if p.step >= 0.05 * run.steps]
    if late and max(late) > min(late):
        margin = 0.08 * (max(late) - min(late))
        axes.set_ylim(min(late) - margin, max(late) + margin)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("training tokens" if by_tokens else "steps")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    try:
        if path.exists() and not path.is_file():  # a pipe would block
            raise OSError(errno.EINVAL, "not a regular file")
        figure.savefig(path, dpi=200)
    except OSError as error:
        raise ConfigError(
            f"--plot {path} cannot be written ({error.strerror}); choose another file."
        ) from error
