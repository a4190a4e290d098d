"""The cache as people look after it: what it holds, and what to forget."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from preftune.errors import ConfigError
from preftune.terminal.units import size

if TYPE_CHECKING:
    from preftune.references.store import ReferenceStore, StoreInfo

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def info(path: str | None = None, *, as_json: bool = False) -> str:
    """Describe the store and the tokenised data beside it.

    Args:
        path: Its folder, by default the cache home.
        as_json: Return JSON instead of text. Times are seconds since the epoch.

    Returns:
        The description. Looking at a store that does not exist does not make one.

    Raises:
        StoreError: If there is a store and it cannot be read.
    """
    from preftune.data import token_cache
    from preftune.references import names
    from preftune.references.database import FILE_NAME
    from preftune.references.store import ReferenceStore, StoreInfo, cache_home

    file = (Path(path) if path else cache_home()) / FILE_NAME
    if not file.exists():
        facts = StoreInfo(path=file, num_bytes=0, mode="absent", journal_mode="none", weights=(), num_in_memory=0)
    else:
        with ReferenceStore(file.parent, strict=True) as store:
            facts = store.info()
    tokens = {"num_files": len(token_cache.files(file.parent)), "num_bytes": token_cache.num_bytes(file.parent)}
    if as_json:
        return _as_json(facts, tokens, names.read(file.parent))
    held = f"{tokens['num_files']:,} files, {size(tokens['num_bytes'])}, in {token_cache.folder(file.parent)}"
    return f"{_as_text(facts, names.read(file.parent))}\n\nTokenised data: {held}"


def clear(
    path: str | None = None, *, weights_key: str | None = None, older_than: str | None = None, as_json: bool = False
) -> str:
    """Forget stored log-probs and tokenised data.

    Args:
        path: Folder of the store, by default the cache home.
        weights_key: Only the reference whose key begins with this, and no data.
        older_than: Only what was last used longer ago: a number and one of s, m, h, d, w.
        as_json: Return JSON instead of text.

    Returns:
        What was removed. A corrupt file is moved aside, which the text says too.

    Raises:
        ConfigError: If the age is not one, or the key fits no reference or several.
        StoreError: If the store cannot be written.
    """
    from preftune.data import token_cache
    from preftune.references.database import FILE_NAME
    from preftune.references.store import ReferenceStore, StoreWarning, cache_home

    seconds = None if older_than is None else _seconds(older_than)
    folder = Path(path) if path else cache_home()
    removed, freed, notes = 0, 0, list[str]()
    if (folder / FILE_NAME).exists():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", StoreWarning)
            store = ReferenceStore(folder)
        notes = [str(warning.message) for warning in caught if issubclass(warning.category, StoreWarning)]
        with store:
            before = store.info().num_bytes
            key = None if weights_key is None else _full_key(store, weights_key)
            removed = store.clear(key, seconds)
            freed = max(0, before - store.info().num_bytes)
    files, their_bytes = (0, 0) if weights_key is not None else token_cache.clear(folder, seconds)
    if as_json:
        facts = {"path": str(folder / FILE_NAME), "removed": removed, "freed": freed, "notes": notes}
        return json.dumps(facts | {"files_removed": files, "files_freed": their_bytes})
    lines = [*notes, f"Removed {removed:,} sequences ({size(freed)}) from {folder / FILE_NAME}"]
    if files:
        lines.append(f"Removed {files:,} files of tokenised data ({size(their_bytes)})")
    return "\n".join(lines)


def _full_key(store: ReferenceStore, prefix: str) -> str:
    known = [item.weights_key for item in store.info().weights]
    fitting = [key for key in known if key.startswith(prefix)]
    if len(fitting) != 1:
        raise ConfigError(
            "several references fit" if fitting else "no stored reference fits",
            where="--weights_key",
            value=prefix,
            allowed=", ".join(known) or "none, the store is empty",
        )
    return fitting[0]


def _seconds(age: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", age.strip().lower())
    if match is None:
        raise ConfigError(
            "not an age", where="--older_than", value=age, allowed="a number and one of s, m, h, d, w, such as 30d"
        )
    return float(match[1]) * _UNITS[match[2]]


def _as_json(facts: StoreInfo, tokens: dict[str, int], called: Mapping[str, str]) -> str:
    from dataclasses import asdict

    about = {"path": str(facts.path), "num_entries": facts.num_entries, "tokens": tokens, "names": dict(called)}
    return json.dumps(asdict(facts) | about)


def _as_text(facts: StoreInfo, called: Mapping[str, str]) -> str:
    if facts.mode == "absent":
        return f"No reference log-probs are stored yet; they will be in {facts.path}"
    mode = {"disk": "", "read_only": ", read-only"}.get(facts.mode, f", {facts.mode}")
    lines = [f"{facts.path} ({size(facts.num_bytes)}{mode})"]
    if facts.weights:
        lines += ["", f"{'weights key':<34}{'sequences':>12}  {'created':<18}last used"]
    for item in facts.weights:
        moments = f"{_moment(item.created):<18}{_moment(item.last_used)}"
        lines.append(f"{item.weights_key:<34}{item.num_entries:>12,}  {moments}")
        if item.weights_key in called:
            # On a line of its own: a folder's name is as long as it is.
            lines.append(f"  {called[item.weights_key]}")
    return "\n".join(lines)


def _moment(seconds: float) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
