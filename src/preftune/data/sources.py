"""Load preference and SFT data by name, as a mixture, or through the handbook's mixer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from preftune.data import locations, quarantine, streamed
from preftune.data.formats import check_format_name
from preftune.data.loader import Loader, LoadReport, load_report
from preftune.data.mixtures import load_mixer, load_mixture, shape
from preftune.data.options import check_choice
from preftune.data.pairing import PAIRINGS
from preftune.data.rows import BadRowHandler
from preftune.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["LoadReport", "load", "load_report"]


def load(
    dataset_name: str | None = None,
    *,
    dataset_config: str | None = None,
    split: str = "train",
    dataset_mixture: Mapping[str, Any] | None = None,
    dataset_mixer: Mapping[str, float] | None = None,
    dataset_splits: Sequence[str] | None = None,
    columns: Sequence[str] | Mapping[str, str] | None = None,
    dataset_format: str = "auto",
    pairing: str = "best_worst",
    on_bad_rows: str = "error",
    quarantine_path: str | None = None,
    seed: int = 42,
    streaming: bool = False,
    with_test: bool = True,
    for_sft: bool = False,
    implicit_prompt: str = "transcript",
) -> dict[str, Dataset]:
    """Load data as canonical rows. One of ``dataset_name``, ``dataset_mixture`` and ``dataset_mixer`` says which.

    Args:
        dataset_name: Hub id; local file; folder written by ``save_to_disk``; folder of files named after splits.
        dataset_config: Configuration of a data set on the Hub.
        split: Split to train on, with slicing such as ``train[:1000]``; its namesake with ``test`` is the test split.
        dataset_mixture: As in the alignment handbook; see :func:`preftune.data.mixtures.load_mixture`.
        dataset_mixer: The handbook's older form, ``{id: fraction}``; see :func:`preftune.data.mixtures.load_mixer`.
        dataset_splits: Splits that ``dataset_mixer`` loads, each with ``train`` or ``test`` in its name.
        columns: Columns to keep, or a mapping from their name to ours.
        dataset_format: ``auto``, or a name from :data:`preftune.data.formats.FORMATS`.
        pairing: ``best_worst`` or ``all`` pairs of rated and labelled answers; ``none`` leaves the latter unpaired.
        on_bad_rows: ``error``, ``skip`` or ``warn``; see :class:`preftune.data.DataOptions`.
        quarantine_path: JSON-lines file for skipped rows. It is begun anew here and continued by ``prepare``.
        seed: Seed of the mixer's shuffle, and of a mixture that names none.
        streaming: Read the rows as they are asked for; see :mod:`preftune.data.streamed`. There is no test split then.
        with_test: Whether the test split is read where there is one.
        for_sft: Prefer what supervised fine-tuning reads where the columns hold a pair as well.
        implicit_prompt: How the prompt is found where rows have none; see :class:`preftune.data.DataOptions`.

    Returns:
        ``{"train": ..., "test": ...}``; ``test`` only where there is one.

    Raises:
        ConfigError: Contradicting or malformed arguments.
        DataError: Data that cannot be found, read or used.
    """
    _check_arguments(dataset_name, dataset_mixture, dataset_mixer)
    _check_settings(pairing, dataset_format, on_bad_rows, quarantine_path)
    if dataset_splits is not None and dataset_mixer is None:
        what, value = "dataset_splits belongs to dataset_mixer", list(dataset_splits)
        raise ConfigError(what, where="dataset_splits", value=value, remedy="use split")
    handler = BadRowHandler(on_bad_rows, quarantine_path)
    loader = Loader(dataset_format, pairing, handler, for_sft, implicit_prompt)
    if streaming:
        _refuse_beside("streaming", dataset_mixer=dataset_mixer)
        if dataset_mixture is not None:
            return {"train": streamed.mixed(dataset_mixture, loader, seed)}
        rows = streamed.stream(str(dataset_name), config=dataset_config, split=split, columns=columns, loader=loader)
        return {"train": rows}
    if dataset_mixture is not None:
        _refuse_beside("dataset_mixture", dataset_config=dataset_config, columns=columns)
        return load_mixture(dataset_mixture, loader, seed)
    if dataset_mixer is not None:
        _refuse_beside("dataset_mixer", dataset_config=dataset_config)
        return load_mixer(dataset_mixer, dataset_splits, columns, loader, seed, with_test)
    return _load_one(str(dataset_name), dataset_config, split, columns, loader, with_test)


def _check_settings(pairing: str, dataset_format: str, on_bad_rows: str, quarantine_path: str | None) -> None:
    check_choice("on_bad_rows", on_bad_rows, ("error", "skip", "warn"))
    check_choice("pairing", pairing, PAIRINGS)
    check_format_name(dataset_format)
    if quarantine_path is not None and on_bad_rows != "skip":
        raise ConfigError(
            "quarantine_path is only written with on_bad_rows: skip",
            where="quarantine_path",
            value=quarantine_path,
            remedy="set on_bad_rows: skip, or leave quarantine_path out",
        )
    if quarantine_path is not None and os.environ.get("RANK", "0") == "0":
        quarantine.begin(quarantine_path)


def _check_arguments(name: str | None, mixture: Any, mixer: Any) -> None:
    given = [
        key
        for key, value in (("dataset_name", name), ("dataset_mixture", mixture), ("dataset_mixer", mixer))
        if value is not None
    ]
    if len(given) != 1:
        raise ConfigError(
            "say exactly once what to load" if given else "no data set given",
            where=" and ".join(given) or "dataset_name",
            allowed="one of dataset_name, dataset_mixture, dataset_mixer",
        )


def _refuse_beside(form: str, **values: Any) -> None:
    for name, value in values.items():
        if value is not None:
            name, remedy = f"dataset_{name.removeprefix('dataset_')}", f"put it into {form}"
            if name == "dataset_columns" and form == "dataset_mixture":
                remedy = "give it to a data set of the mixture, as `columns`"
            raise ConfigError(f"{name} does not go with {form}", where=name, value=value, remedy=remedy)


def _load_one(
    name: str,
    config: str | None,
    split: str,
    columns: Sequence[str] | Mapping[str, str] | None,
    loader: Loader,
    with_test: bool,
) -> dict[str, Dataset]:
    origin = locations.find(name, config)
    result = {"train": loader.dataset(loader.rows(shape(origin.read(split), columns)), name)}
    if not with_test:
        return result
    base = split.partition("[")[0]
    test = base.replace("train", "test")
    known = locations.hub_splits(name, config) if origin.splits is None else origin.splits
    if test != base and test in known:
        other = loader.another()
        result["test"] = other.dataset(other.rows(shape(origin.read(test), columns)), f"{name} ({test})")
    return result
