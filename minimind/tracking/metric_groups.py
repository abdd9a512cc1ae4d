"""Groups of metrics, in which trackers show their charts."""

from __future__ import annotations

# `train/` has every other metric.
_PERFORMANCE = ("tokens_per_second", "mfu", "memory_gb", "elapsed", "eta_seconds")
_EXPERTS = ("expert_load", "balance_loss", "dropped_share")


def grouped_name(metric: str) -> str:
    """Return the name of a metric in trackers, such as `val/loss` for `val_loss`."""
    if "/" in metric:
        return metric
    if metric.startswith("val_"):
        return f"val/{metric.removeprefix('val_')}"
    if metric.startswith("cloze_"):
        return f"score/{metric}"
    if metric in _PERFORMANCE or metric.startswith(("data_wait", "total_")):
        return f"perf/{metric}"
    return f"experts/{metric}" if metric in _EXPERTS else f"train/{metric}"
