"""`python -m minimind_cli`, for `accelerate launch -m minimind_cli`."""

from __future__ import annotations

from .app import main

if __name__ == "__main__":
    main()
