"""``preftune cite``: BibTeX for the methods of a run."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune.errors import ConfigError, DataError
from preftune.files import parse_json

if TYPE_CHECKING:
    from argparse import _SubParsersAction

# Settings that change the method, with the value that leaves it as it is.
_MODIFIERS: dict[str, Any] = {
    "f_divergence_type": "reverse_kl",
    "ld_alpha": None,
    "use_weighting": False,
    "sync_ref_model": False,
}


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = subparsers.add_parser("cite", help="print BibTeX for the methods of a run")
    parser.add_argument("names", nargs="+", metavar="RUN|METHOD", help="a run's folder, or the name of a method")


def run(args: argparse.Namespace) -> int:
    """Print each entry once."""
    from preftune.objectives import bibtex

    wanted: dict[str, None] = {}
    for name in args.names:
        wanted |= dict.fromkeys(used_by(Path(name)) if Path(name).is_dir() else meant_by(name))
    print("\n\n".join(dict.fromkeys(bibtex(name) for name in wanted)))
    return 0


def meant_by(name: str) -> list[str]:
    """Names that ``bibtex`` knows for what people call a method: ``dpo`` is the loss ``sigmoid``."""
    from preftune.objectives import METHODS
    from preftune.objectives.lookup import SYNONYMS
    from preftune.objectives.papers import MODIFIER_PAPERS, PAPERS

    key = name.lower().replace("-", "_")
    known = {*METHODS, *MODIFIER_PAPERS, *PAPERS}
    for each in (name, key):
        if each in known:
            return [each]
    return [word for word in re.findall(r"\w+", SYNONYMS.get(key, "")) if word in known] or [name]


def used_by(folder: Path) -> list[str]:
    """Methods and modifiers that a run used.

    Args:
        folder: Output folder of the run.

    Returns:
        Names that ``bibtex`` knows.

    Raises:
        DataError: If the folder has no readable provenance file.
        ConfigError: If the run used no method with a paper.
    """
    file = folder / "provenance.json"
    try:
        document = parse_json(file.read_text(encoding="utf-8"))
        values = {name: entry["value"] for name, entry in document["settings"]["trainer"].items()}
        method = (document.get("plan") or {}).get("method")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError("no readable record of a run", where=str(file), remedy="give a run's output folder") from error
    modifiers = (name for name, neutral in _MODIFIERS.items() if values.get(name, neutral) != neutral)
    names = [*_methods(values, method), *modifiers]
    if not names:
        raise ConfigError("this run used no method that has a paper", where=str(folder))
    return names


def _methods(values: Mapping[str, Any], method: str | None) -> list[str]:
    from preftune.objectives import METHODS

    given = values.get("loss_type")
    # The plan has the table's names; a trainer's own loss_type may call another method so.
    names = method.split(" + ") if method else given if isinstance(given, list) else [given]
    found = [str(name) for name in names if name in METHODS]
    # For this method the paper that introduced smoothing is another one.
    smoothed = values.get("label_smoothing") and "sigmoid" in found
    return [*found, *(["label_smoothing"] if smoothed else [])]
