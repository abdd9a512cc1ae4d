"""Checkpoints: their files, when they are saved and removed, and what may resume from them."""
