"""Where a model is that a folder names."""

from __future__ import annotations

from pathlib import Path

#: What a folder with an adapter holds.
ADAPTER_FILE = "adapter_config.json"


def holds_adapter(name: str) -> bool:
    """Whether a name is that of a folder with an adapter."""
    return (Path(name).expanduser() / ADAPTER_FILE).is_file()


def located(name: str, folder: Path) -> str:
    """A model by the name that a run or an adapter calls it.

    A relative folder counts from where the run was started, which is often a parent of its output folder.

    Args:
        name: Folder, or name on the Hub.
        folder: Folder of the run or the adapter.
    """
    path = Path(name).expanduser()
    if path.is_absolute() or path.is_dir():
        return str(path) if path.is_dir() else name
    for parent in folder.expanduser().resolve().parents:
        if any((parent / path / file).is_file() for file in ("config.json", ADAPTER_FILE)):
            return str(parent / path)
    return name
