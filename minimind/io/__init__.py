"""File primitives: atomic writes, append-only files, locks, and reading of regular files only."""
