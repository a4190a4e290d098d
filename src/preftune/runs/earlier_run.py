"""The rows that an earlier run held out, read again, and how it made tokens of them."""

from __future__ import annotations

import os
from typing import Any

from preftune.data import DataOptions
from preftune.errors import PreftuneError, flat
from preftune.models.tuned import Tuned
from preftune.runs.data import load_rows


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
    if isinstance(named, str) and os.path.sep in named and named.startswith((".", "/")) and not os.path.exists(named):
        return f"its data are not there any more ({named})"
    try:
        splits = load_rows({**values, "quarantine_path": None}, with_test=True)
    except (PreftuneError, OSError, ValueError) as error:
        return f"its data cannot be read ({flat(error)[:160]})"
    return splits["test"]


def options_of_run(tuned: Tuned) -> DataOptions:
    """How the rows of a run become tokens, as in its training; rows that cannot be used are left out.

    Args:
        tuned: What the run left.
    """
    defaults = DataOptions()
    names = (
        *("max_length", "max_prompt_length", "truncation_mode", "implicit_prompt", "transcripts"),
        *("environment_turns", "append_eos"),
    )
    given = {name: tuned.setting("trainer", name, getattr(defaults, name)) for name in names}
    return DataOptions(**given, on_bad_rows="skip")
