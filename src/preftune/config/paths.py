"""Where the cache is; and names read from files that become paths below a folder."""

from __future__ import annotations

import errno
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


def private_folder(path: Path) -> None:
    """Make a folder that only this user can enter; one that is there is closed to others.

    Raises:
        OSError: It cannot be made, or belongs to somebody else.
    """
    make_home(path.parent)
    path.mkdir(exist_ok=True, mode=0o700)
    about = path.stat()
    if about.st_uid != os.getuid():
        raise PermissionError(errno.EACCES, "it belongs to another user", str(path))
    if about.st_mode & 0o077:
        path.chmod(0o700)


def make_home(path: Path) -> None:
    """Make a folder of caches for this user alone; one that is there is left as it is: somebody may share it.

    Raises:
        OSError: It cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(exist_ok=True, mode=0o700)


def cache_home() -> Path:
    """Return ``$PREFTUNE_CACHE``, else ``preftune`` under ``$XDG_CACHE_HOME``, else ``~/.cache/preftune``."""
    own = os.environ.get("PREFTUNE_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "preftune"
