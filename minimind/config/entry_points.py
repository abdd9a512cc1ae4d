"""Parts of other packages, found by their entry points; imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import ConfigError


def plugin_names(group: str | None) -> list[str]:
    """Return the names that installed packages have registered in a group of entry points; None has none."""
    if group is None:
        return []
    from importlib.metadata import entry_points  # takes a while to import

    return sorted({point.name for point in entry_points(group=group)})


def load_plugin(group: str, name: str, option: str) -> Callable[..., Any]:
    """Return what an installed package has registered.

    Args:
        group: of the entry points, such as `minimind.trackers`.
        name: of the entry point.
        option: named in errors.

    Raises:
        ConfigError: when no package has registered the name, or it cannot be imported.
    """
    from importlib.metadata import entry_points

    for point in entry_points(group=group, name=name):
        try:
            return point.load()
        except Exception as error:
            package = point.dist.name if point.dist is not None else point.value
            raise ConfigError(
                f"{option} {name} is a plug-in of {package}, which cannot be imported "
                f"({type(error).__name__}: {error}); update or reinstall that package."
            ) from error
    raise ConfigError(f"{option} {name} is not known, and no installed package registers it in {group}.")
