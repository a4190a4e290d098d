"""Where the cache lies; and names that stand in files and become paths below the folder that they belong to."""

from __future__ import annotations

import os
from pathlib import Path


def inside(folder: str | os.PathLike[str], name: str) -> Path | None:
    """A path below a folder, or ``None`` where the name leads out of it or to the folder itself.

    Args:
        folder: The root.
        name: Relative name out of a file; links on the way are followed before it is judged.

    Returns:
        The path below the root, whether it exists or not.
    """
    root = Path(folder).resolve()
    try:
        place = (root / name).resolve()
    except (OSError, ValueError, RuntimeError):
        # A null byte, or links in a circle.
        return None
    return Path(folder) / name if place != root and place.is_relative_to(root) and name else None


def cache_home() -> Path:
    """Return ``$PREFTUNE_CACHE``, else ``preftune`` under ``$XDG_CACHE_HOME``, else ``~/.cache/preftune``."""
    own = os.environ.get("PREFTUNE_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "preftune"
