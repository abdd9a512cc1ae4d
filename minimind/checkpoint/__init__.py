"""Checkpoints: files, saving and rotation, state dicts, and compatibility on resume."""
