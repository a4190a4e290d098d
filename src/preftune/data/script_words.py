"""Remedies in the words of a Python script: a file's columns are named by a setting, those of a data set by itself."""

from __future__ import annotations

import re

from preftune.errors import PreftuneError

_MAPPING = re.compile(r"(`?)dataset_columns: \{([^{}]*)\}`?")
_LIST = re.compile(r"(`?)dataset_columns: \[([^\[\]]*)\]`?")


def in_python(text: str) -> str:
    """A remedy about the setting ``dataset_columns`` as one about a ``datasets.Dataset``.

    >>> in_python("rename columns with `dataset_columns: {theirs: ours}`")
    "rename columns with `dataset.rename_columns({'theirs': 'ours'})`"
    >>> in_python("(`dataset_columns: [chosen, rejected]`)")
    "(`dataset.select_columns(['chosen', 'rejected'])`)"
    """

    def renamed(found: re.Match[str]) -> str:
        pairs = [each.split(":", 1) for each in found[2].split(",") if ":" in each]
        names = ", ".join(f"{theirs.strip()!r}: {ours.strip()!r}" for theirs, ours in pairs)
        return f"{found[1]}dataset.rename_columns({{{names}}}){found[1]}"

    def selected(found: re.Match[str]) -> str:
        names = ", ".join(repr(name.strip()) for name in found[2].split(","))
        return f"{found[1]}dataset.select_columns([{names}]){found[1]}"

    return _LIST.sub(selected, _MAPPING.sub(renamed, text)).replace("dataset_columns", "dataset.select_columns")


def told_in_python(error: PreftuneError) -> PreftuneError:
    """An error with its remedy in the words of a Python script."""
    return error.with_parts(remedy=error.remedy and in_python(error.remedy))
