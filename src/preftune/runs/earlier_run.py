"""The rows that an earlier run held out, read again, and how it made tokens of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from preftune.data import DataOptions
from preftune.errors import PreftuneError, flat
from preftune.models.tuned import Tuned
from preftune.runs.data import load_rows
from preftune.training.provenance import describe_dataset


def rows_of_run(tuned: Tuned) -> Any:
    """The rows that a run held out, read again; or why that cannot be, as a text.

    Args:
        tuned: What the run left.

    Returns:
        The rows of its test split, or a sentence.
    """
    if "test" not in tuned.data:
        return "the run held no pairs out"
    values = {name: value for role in tuned.settings.values() for name, value in role.items()}
    if tuned.verb == "sft":
        values.pop("implicit_prompt", None)
    named = values.get("dataset_name")
    why = "its data cannot be read"
    for place in _places(named, tuned.folder):
        try:
            rows = load_rows({**values, "dataset_name": place, "quarantine_path": None}, with_test=True)["test"]
        except (PreftuneError, OSError, ValueError) as error:
            why = f"its data cannot be read ({flat(error)[:160]})"
            continue
        then, now = tuned.data["test"], describe_dataset(rows)
        if then.get("sha256") in (None, now.get("sha256")):
            return rows
        numbers = f"{then.get('num_rows')} rows then, {now.get('num_rows')} now"
        why = f"its data have changed since, and the rows that it held out are no longer the same ({place}: {numbers})"
    return why


def _places(named: Any, folder: Path) -> list[Any]:
    """Where the data of a run may be: where its settings say, or, from another directory, beside its folder."""
    local = isinstance(named, str) and not named.startswith("~") and not os.path.isabs(named)
    beside = [os.path.join(parent, named) for parent in folder.resolve().parents[:4]] if local else []
    there = [place for place in beside if os.path.exists(place)]
    if isinstance(named, str) and os.path.exists(os.path.expanduser(named)):
        return [named, *there]
    return there or [named]


def options_of_run(tuned: Tuned) -> DataOptions:
    """How the rows of a run become tokens, as in its training; rows that cannot be used are left out.

    Args:
        tuned: What the run left.
    """
    names = (
        *("max_length", "max_prompt_length", "truncation_mode", "implicit_prompt", "transcripts"),
        *("plain_text", "environment_turns", "append_eos"),
    )
    trained = tuned.settings.get("trainer", {})
    # ``None`` is a setting too: no longest sequence.
    given = {name: trained[name] for name in names if name in trained}
    return DataOptions(**given, on_bad_rows="skip")
