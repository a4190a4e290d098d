"""The settings of the training verbs as help shows them, kept in a file: their classes take seconds to import.

Most settings are inherited from transformers, and some defaults depend on torch, so that the table that comes with the
package holds for the versions it was made with. With other versions it is made once and kept in the cache.

``python -m preftune.cli.help_table`` writes the table of the package anew.
"""

from __future__ import annotations

import json
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from preftune.cli.help import Entry, Sections, sections_of
from preftune.cli.verbs import TRAINING_VERBS
from preftune.config.paths import cache_home

SHIPPED = Path(__file__).with_name("help_table.json")


def sections_of_verb(verb: str) -> Sections:
    """The settings of a training verb by heading.

    Args:
        verb: Its name.

    Returns:
        What :func:`~preftune.cli.help.sections_of` finds in its classes.
    """
    cached = cache_home() / "help_table.json"
    table = _read(SHIPPED) or (_read(cached) if _is_newer(cached) else None)
    if table is None:
        table = build()
        # Help works without a cache, too.
        with suppress(OSError):
            write(table, cached)
    entries = [Entry(*entry) for entry in table["entries"]]
    return [(title, [entries[number] for number in numbers]) for title, numbers in table["verbs"][verb]]


def build() -> dict[str, Any]:
    """Read the settings of all training verbs from their classes.

    Returns:
        ``versions``; ``entries``, each once; and per verb its headings with the numbers of their entries.
    """
    from preftune.config import ModelConfig, ScriptConfig
    from preftune.runs.settings import cli_defaults, settings_classes

    numbers: dict[Entry, int] = {}
    verbs = {}
    # What is true of the machine that the table was made on may be wrong elsewhere.
    defaults = cli_defaults() | {"use_cpu": "true without an accelerator"}
    for verb in TRAINING_VERBS:
        groups = {"data and behaviour": ScriptConfig, "model": ModelConfig, "training": settings_classes(verb)[0]}
        verbs[verb] = [
            (title, [numbers.setdefault(entry, len(numbers)) for entry in listed])
            for title, listed in sections_of(groups, defaults)
        ]
    return {"versions": versions(), "verbs": verbs, "entries": list(numbers)}


def versions() -> dict[str, str]:
    """Versions of the packages that settings and their defaults come from."""
    # A build's own mark, such as +cu126, changes no setting.
    return {name: metadata.version(name).partition("+")[0] for name in ("transformers", "torch")}


def write(table: dict[str, Any], path: Path) -> None:
    """Write a table in one step."""
    from preftune.files import replace_text

    entries = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in table["entries"])
    verbs = ",\n".join(f"{json.dumps(verb)}: {json.dumps(listed)}" for verb, listed in table["verbs"].items())
    versions = json.dumps(table["versions"])
    replace_text(path, f'{{"versions": {versions},\n"verbs": {{\n{verbs}}},\n"entries": [\n{entries}]}}\n')


def _read(path: Path) -> dict[str, Any] | None:
    """A table of the installed versions; ``None`` where there is none."""
    try:
        table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return table if isinstance(table, dict) and table.get("versions") == versions() else None


def _is_newer(path: Path) -> bool:
    """Whether a table was made after this package was installed or changed."""
    package = Path(__file__).resolve().parents[1]
    with suppress(OSError):
        made = path.stat().st_mtime
        return all(
            file.stat().st_mtime < made for room in ("config", "training") for file in package.rglob(f"{room}/*.py")
        )
    return False


if __name__ == "__main__":
    write(build(), SHIPPED)
