"""Several data sets in one: the alignment handbook's mixture and its older mixer, and the columns taken of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from preftune.data import locations
from preftune.data.formats import Row
from preftune.data.loader import Loader
from preftune.data.tables import RawTable, is_within
from preftune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset

_ENTRY_KEYS = ("id", "config", "split", "columns", "weight")
_MIXTURE_KEYS = ("datasets", "seed", "test_split_size", "shuffle")


def shape(table: RawTable, columns: Sequence[str] | Mapping[str, str] | None) -> RawTable:
    """Attach the column selection or the renaming to a table, after checking that the columns exist.

    Raises:
        ConfigError: One of them does not.
    """
    if columns is None:
        return table
    available = table.raw_columns()
    wanted = list(columns)
    missing = [name for name in wanted if name not in available and not is_within(available, name)]
    if missing:
        swapped = isinstance(columns, Mapping) and all(value in available for value in columns.values())
        raise ConfigError(
            f"no such column: {', '.join(missing)}",
            where=f"columns of {table.name}",
            value=columns if isinstance(columns, Mapping) else wanted,
            allowed=", ".join(available),
            remedy="write the mapping as {their name: our name}" if swapped else None,
        )
    if isinstance(columns, Mapping):
        twice = sorted({ours for ours in columns.values() if list(columns.values()).count(ours) > 1})
        if twice:
            what = f"several columns would be called {', '.join(twice)}"
            raise ConfigError(what, where=f"columns of {table.name}", value=dict(columns), remedy="name one of them")
        table.rename = dict(columns)
    else:
        table.select = wanted
        table.rename = {name: name.rpartition(".")[2] for name in wanted if is_within(available, name)}
    return table


def load_mixture(mixture: Mapping[str, Any], loader: Loader, seed: int) -> dict[str, Dataset]:
    """The handbook's mixture: each set is shuffled and cut to its weight, then all are joined and shuffled.

    Args:
        mixture: ``{"datasets": [{"id", "config", "split", "columns", "weight"}], "seed", "test_split_size"}``; with
            ``shuffle: false`` the sets stand one after another, as where TRL's ``datasets`` are meant.
        loader: Makes canonical rows.
        seed: Seed where the mixture names none.

    Returns:
        ``train``, and ``test`` where ``test_split_size`` asks for it.

    Raises:
        ConfigError: A malformed mixture.
    """
    used_seed = seed_of(mixture, seed)
    rows: list[Row] = []
    forms: dict[str, str] = {}
    for where, entry in entries_of(mixture):
        origin = locations.find(entry["id"], entry.get("config"))
        table = shape(origin.read(entry.get("split") or "train"), entry.get("columns"))
        if entry.get("weight") is not None:
            weight = share_of(entry["weight"], f"{where}.weight")
            _pick(table, _permutation(len(table), used_seed)[: int(len(table) * weight)])
        if len(table):
            found = loader.rows(table)
            forms.setdefault(form_of(found), entry["id"])
            rows += found
    check_forms(forms)
    dataset = loader.unsigned(rows, "dataset_mixture")
    if mixture.get("shuffle", True):
        dataset = dataset.shuffle(seed=used_seed).flatten_indices()
    size = mixture.get("test_split_size")
    if size is None:
        return {"train": loader.signed(dataset)}
    _check_test_size(size, len(dataset))
    parts = dataset.train_test_split(test_size=size, seed=used_seed)
    return {"train": loader.signed(parts["train"].flatten_indices()), "test": parts["test"].flatten_indices()}


def seed_of(mixture: Mapping[str, Any], seed: int) -> int:
    """The mixture's own seed, or else the run's.

    Raises:
        ConfigError: It is no seed.
    """
    own = mixture.get("seed")
    if own is None:
        return seed
    if not isinstance(own, int) or isinstance(own, bool) or own < 0:
        raise ConfigError("not a seed", where="dataset_mixture.seed", value=own, allowed="an integer, 0 or more")
    return own


def form_of(rows: Sequence[Row]) -> str:
    """What rows are made of: pairs, conversations, texts."""
    names = ("messages", "text", "prompt", "completion", "chosen", "rejected", "label")
    return ", ".join(name for name in names if rows and name in rows[0])


def check_forms(forms: Mapping[str, str]) -> None:
    """Refuse to join rows of different forms, of which one alone could be read.

    Raises:
        DataError: Names a data set of each.
    """
    forms = {form: name for form, name in forms.items() if form}
    if len(forms) > 1:
        raise DataError(
            f"data sets of different forms: {'; '.join(f'{name} ({form})' for form, name in forms.items())}",
            where="dataset_mixture",
            remedy="write them in one form with preftune data convert, or train on one after the other",
        )


def entries_of(mixture: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The data sets of a mixture, each with where it stands.

    Raises:
        ConfigError: A malformed mixture.
    """
    _check_keys(mixture, _MIXTURE_KEYS, "dataset_mixture")
    entries = mixture.get("datasets")
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        raise ConfigError("'datasets' must list at least one data set", where="dataset_mixture", value=entries)
    for number, entry in enumerate(entries):
        where = f"dataset_mixture.datasets[{number}]"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("id"), str):
            raise ConfigError("an entry needs an id", where=where, value=entry)
        _check_keys(entry, _ENTRY_KEYS, where)
        yield where, entry


def _check_test_size(size: Any, num_rows: int) -> None:
    whole = isinstance(size, int) and not isinstance(size, bool) and 0 < size < num_rows
    if not whole and not (isinstance(size, float) and 0 < size < 1):
        raise ConfigError(
            "test_split_size is a share or a number of rows",
            where="dataset_mixture.test_split_size",
            value=size,
            allowed=f"between 0 and 1, or 1 to {num_rows - 1} rows",
        )


def load_mixer(
    mixer: Mapping[str, float],
    splits: Sequence[str] | None,
    columns: Sequence[str] | Mapping[str, str] | None,
    loader: Loader,
    seed: int,
    with_test: bool,
) -> dict[str, Dataset]:
    """The handbook's mixer: the first fraction of each training split, and all of each test split, joined and shuffled.

    Args:
        mixer: ``{id: fraction}``.
        splits: Splits to load; otherwise ``train``, and ``test`` where it exists.
        columns: Columns to keep, or a mapping from their name to ours.
        loader: Makes canonical rows.
        seed: Seed of the shuffle.
        with_test: Whether test splits are read.

    Returns:
        ``train`` and ``test``.

    Raises:
        ConfigError: A malformed mixer, or nothing to train on.
    """
    for split in splits or ():
        if ("train" in split) == ("test" in split):
            raise ConfigError("a split's name must contain either train or test", where="dataset_splits", value=split)
    rows: dict[str, list[Row]] = {}
    loaders = {"train": loader, "test": loader.another()}
    for name, fraction in mixer.items():
        share = share_of(fraction, f"dataset_mixer[{name!r}]")
        origin = locations.find(name)
        known = locations.hub_splits(name, None) if origin.splits is None else origin.splits
        # Unless told, the handbook takes train and test; here a data set without a test split is no error.
        for split in splits or [split for split in ("train", "test") if split == "train" or split in known]:
            part = "train" if "train" in split else "test"
            if part == "test" and not with_test:
                continue
            table = shape(origin.read(split), columns)
            if part == "train":
                _pick(table, range(int(share * len(table))))
            if len(table):
                rows.setdefault(part, []).extend(loaders[part].rows(table))
    if "train" not in rows:
        raise ConfigError("nothing to train on", where="dataset_mixer", value=dict(mixer), remedy="raise a fraction")
    found = {}
    for part, some in rows.items():
        dataset = loaders[part].unsigned(some, f"dataset_mixer ({part})")
        found[part] = loaders[part].signed(dataset.shuffle(seed=seed).flatten_indices())
    return found


def _pick(table: RawTable, positions: Sequence[int]) -> None:
    """Keep the rows at ``positions`` of what the table already selects."""
    table.indices = positions if table.indices is None else [table.indices[i] for i in positions]


def _permutation(num_rows: int, seed: int) -> list[int]:
    """The order that ``Dataset.shuffle(seed)`` gives, so that a weight keeps the rows the handbook keeps."""
    import numpy as np

    return [int(i) for i in np.random.default_rng(seed).permutation(num_rows)]


def share_of(value: Any, where: str) -> float:
    """A share of a data set, checked."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError("not a share of the data set", where=where, value=value, allowed="0 to 1")
    return float(value)


def _check_keys(given: Mapping[str, Any], allowed: tuple[str, ...], where: str) -> None:
    import difflib

    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=1)
            raise ConfigError(
                "unknown key",
                where=where,
                value=key,
                allowed=", ".join(allowed),
                remedy=f"did you mean {near[0]!r}?" if near else None,
            )
