"""Reporting of a run: console, metrics.jsonl and experiment trackers."""
