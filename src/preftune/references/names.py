"""What the models are called whose log-probs are stored: the store itself knows them by content alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from preftune.config.secrets import redact
from preftune.files import parse_json, replace_text

FILE_NAME = "reference-names.json"
#: Names of the keys that this process has made.
_called: dict[str, str] = {}
#: Keys that it has written down, by folder.
_written: set[tuple[str, str]] = set()


def call(key: str, name: str) -> None:
    """Remember what a model is called.

    Args:
        key: Its content key.
        name: Its name or folder.
    """
    if name:
        _called[key] = str(redact(name))


def write_down(folder: Path, key: str) -> None:
    """Leave a name beside the store. The store works without it, so that nothing that goes wrong here matters.

    Args:
        folder: Folder of the store.
        key: Content key of the model.
    """
    name = _called.get(key)
    if name is None or (str(folder), key) in _written:
        return
    _written.add((str(folder), key))
    with suppress(OSError, ValueError):
        known = read(folder)
        if known.get(key) != name:
            replace_text(folder / FILE_NAME, json.dumps({**known, key: name}, indent=1, ensure_ascii=False) + "\n")


def read(folder: Path) -> dict[str, str]:
    """Names by content key; empty where there are none that can be read.

    Args:
        folder: Folder of the store.
    """
    with suppress(OSError, ValueError):
        found = parse_json((folder / FILE_NAME).read_text(encoding="utf-8"))
        if isinstance(found, Mapping):
            return {str(key): str(name) for key, name in found.items()}
    return {}
