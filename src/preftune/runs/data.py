"""The rows that settings name: one loader for training, audit, advice, sweeps and the page of a run."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext, suppress
from typing import Any

from preftune.config import Resolved, ScriptConfig
from preftune.data import load
from preftune.data.loader import carry_report
from preftune.errors import ConfigError, DataError
from preftune.runs.holdout import hold_out

#: Settings that decide what is loaded, and how its columns are read.
_READING = ("dataset_config", "dataset_format", "pairing", "on_bad_rows", "seed", "implicit_prompt")
_SEVERAL = ("dataset_mixture", "dataset_mixer", "dataset_splits")


def dataset_names(script: ScriptConfig) -> list[str]:
    """Names of all datasets that the settings mention."""
    if script.dataset_mixture:
        entries = script.dataset_mixture.get("datasets")
        return [str(entry.get("id")) for entry in entries or [] if isinstance(entry, Mapping)]
    return [*(script.dataset_mixer or {}), *([script.dataset_name] if script.dataset_name else [])]


def load_splits(
    settings: Resolved[Any],
    *,
    with_test: bool | None,
    quarantine_path: str | None = None,
    may_stream: bool = False,
) -> dict[str, Any]:
    """Load the data that the settings of a run name.

    Args:
        settings: Resolved settings.
        with_test: Whether the run evaluates; ``None`` for the test split where there is one.
        quarantine_path: File for bad rows, by default the one that the settings name.
        may_stream: Whether a stream will do where the settings ask for one; all rows are needed otherwise.

    Returns:
        ``train``, and ``test`` if it is asked for.

    Raises:
        ConfigError: If there is no test split to evaluate on, or a stream that will not do.
        DataError: If the data cannot be found, read or used.
    """
    if settings.script.dataset_streaming and not may_stream:
        raise ConfigError(
            "only training reads a stream; all rows are needed here",
            where="dataset_streaming",
            value=True,
            remedy="leave it out, and take a part of the rows: dataset_train_split: train[:10000]",
        )
    named_test = settings.origins["dataset_test_split"].kind != "default"
    values = {**vars(settings.script), **vars(settings.trainer)}
    values["quarantine_path"] = quarantine_path or values["quarantine_path"]
    return load_rows(values, with_test=with_test, named_test=named_test)


def load_rows(values: Mapping[str, Any], *, with_test: bool | None, named_test: bool = False) -> dict[str, Any]:
    """Load the data that settings name.

    Args:
        values: Settings by name; what is missing or ``None`` has its default. Those of a supervised run have no
            ``implicit_prompt``.
        with_test: Whether a test split is needed; ``None`` for the test split where there is one.
        named_test: Whether somebody chose ``dataset_test_split``, so that it has to be there.

    Returns:
        ``train``, and ``test`` if it is asked for.

    Raises:
        ConfigError: If a test split is needed and there is none.
        DataError: If no data are named, or they cannot be found, read or used.
    """
    name, columns = values.get("dataset_name"), values.get("dataset_columns")
    several = {key: values[key] for key in _SEVERAL if values.get(key) is not None}
    common = {key: values[key] for key in _READING if values.get(key) is not None}
    common["for_sft"] = "implicit_prompt" not in values
    size = values.get("test_split_size")
    first: dict[str, Any] = {
        "quarantine_path": values.get("quarantine_path"),
        "with_test": with_test is not False and size is None,
        "streaming": bool(values.get("dataset_streaming")),
    }
    if name is None:
        if not several:
            raise DataError("no data are named", where="dataset_name")
        splits = load(**several, columns=columns, **first, **common)
    else:
        text = values.get("dataset_text_field") or "text"
        common["columns"] = columns or ({text: "text"} if text != "text" else None)
        splits = load(name, split=values.get("dataset_train_split") or "train", **first, **common)
        if size is None and ((named_test and with_test is not False) or (with_test and "test" not in splits)):
            # A part of what is streamed would be trained on too: only a split of its own is looked for.
            with suppress(ConfigError) if first["streaming"] and not named_test else nullcontext():
                splits["test"] = load(name, split=values["dataset_test_split"], with_test=False, **common)["train"]
    if size is not None:
        splits = _divided(splits, size, values, named_test=named_test)
    if with_test and "test" not in splits:
        raise ConfigError(
            "evaluation is switched on, and the data have no test split",
            where="eval_strategy",
            remedy="name dataset_test_split, or set eval_strategy: 'no'"
            if first["streaming"]
            else "set test_split_size: 0.1 to hold a tenth out, or eval_strategy: 'no'",
        )
    return splits


def _divided(splits: dict[str, Any], size: float, values: Mapping[str, Any], *, named_test: bool) -> dict[str, Any]:
    """The training rows with some held out; what was read of them is told of those that are left."""
    if named_test or "test" in splits:
        raise ConfigError(
            "the data have a test split already", where="test_split_size", value=size, remedy="keep one of them"
        )
    parts = hold_out(splits["train"], size, int(values.get("seed") or 0))
    carry_report(splits["train"], parts["train"])
    return parts
