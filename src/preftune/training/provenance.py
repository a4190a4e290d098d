"""Where a model comes from: versions, machine, settings with their origin, data and seed, written beside the weights.

Environment variables are never read into it, and secrets are replaced wherever they occur.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

from preftune.config import Origin, redact, redact_argv
from preftune.models.trust import trusted_code
from preftune.ownership import put_text
from preftune.version import __version__

FILE_NAME = "provenance.json"
FORMAT = 1

_PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "safetensors", "bitsandbytes")


def collect(
    *,
    argv: Sequence[str],
    settings: Mapping[str, Any],
    origins: Mapping[str, Origin],
    plan: Any = None,
    data: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    num_processes: int = 1,
) -> dict[str, Any]:
    """Gather everything that is needed to understand, and to repeat, a run.

    Args:
        argv: The command line, verb first.
        settings: Settings objects by role, for example ``{"trainer": DPOConfig(...)}``; dataclasses or mappings.
        origins: Origin of each setting by name.
        plan: The :class:`~preftune.training.plan.TrainingPlan`.
        data: Digest and size of the training and evaluation data, as :func:`describe_dataset` makes them.
        results: Metrics at the end.
        notes: What the user was told about the settings.
        num_processes: Processes that trained together.

    Returns:
        A mapping that ``json.dumps`` takes, free of secrets.
    """
    values: dict[str, dict[str, Any]] = {}
    for role, holder in settings.items():
        values[role] = {
            name: {"value": redact(plain(value), name), "from": str(redact(str(origins.get(name, Origin("default")))))}
            for name, value in _items(holder)
        }
    seed = next((entry["seed"]["value"] for entry in values.values() if "seed" in entry), None)
    document = {
        "format": FORMAT,
        "preftune": __version__,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": redact_argv(["preftune", *argv]),
        "seed": seed,
        "git": git_state(Path.cwd()),
        "versions": versions(),
        "machine": {**machine(), "num_processes": num_processes},
        "settings": values,
        "notes": [redact(note) for note in notes],
        "plan": redact(plain(plan)),
        "trusted_code": redact(trusted_code()),
        "data": redact(plain(data or {})),
        "results": redact(plain(results or {})),
    }
    return document


def write(folder: str | os.PathLike[str], document: Mapping[str, Any]) -> Path:
    """Write the document as JSON, in one step, so that a crash leaves the old file or the new one.

    Args:
        folder: Output folder; made where it is missing.
        document: What :func:`collect` returned.

    Returns:
        Path of the file.
    """
    target = Path(folder) / FILE_NAME
    put_text(target, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return target


def plain(value: Any) -> Any:
    """Reduce any value to what JSON knows; what has no counterpart becomes text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(entry) for entry in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        # JSON has neither NaN nor infinity.
        return value if value == value and abs(value) != float("inf") else str(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "size", None) == 1:
        return plain(item())
    return str(value)


def describe_dataset(dataset: Any) -> dict[str, Any]:
    """Rows, columns and a digest of a dataset's content.

    Args:
        dataset: A ``datasets.Dataset`` (or anything that iterates over mappings).

    Returns:
        ``num_rows``, ``columns`` and ``sha256`` over the rows in order, as canonical JSON. Of a stream, which may have
        no end, its columns alone.
    """
    if not hasattr(dataset, "__len__"):
        return {"stream": True, "columns": list(next(iter(dataset), {}))}
    digest = hashlib.sha256()
    num_rows = 0
    columns: list[str] = []
    for row in dataset:
        columns = columns or list(row)
        text = json.dumps(plain(row), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        # Text from the wild may hold lone surrogates, which UTF-8 cannot express.
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
        num_rows += 1
    return {"num_rows": num_rows, "columns": columns, "sha256": digest.hexdigest()}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide about numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Platform, processor count and accelerators; nothing that names the user or the host."""
    described: dict[str, Any] = {
        "system": platform.system(),
        "release": platform.release(),
        "architecture": platform.machine(),
        "cpu_count": os.cpu_count(),
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        described["torch_threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            described["accelerators"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
            described["cuda"] = torch.version.cuda
    return described


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout that the command ran in, and whether it had been changed; ``None`` outside of one."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    return {"commit": commit, "changed": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _items(holder: Any) -> list[tuple[str, Any]]:
    if isinstance(holder, Mapping):
        return [(str(name), value) for name, value in holder.items()]
    return [(item.name, getattr(holder, item.name)) for item in dataclasses.fields(holder) if item.init]
