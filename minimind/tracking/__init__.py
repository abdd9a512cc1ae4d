"""What a run reports: the console, metrics.jsonl and experiment trackers."""
