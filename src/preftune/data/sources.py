"""Load preference and SFT data by name, as a mixture, or through the handbook's mixer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from preftune.data import files, quarantine
from preftune.data.batches import refuse_images
from preftune.data.convert import canonical_rows, to_dataset
from preftune.data.formats import Row, check_format_name, column_uses, resolve
from preftune.data.options import check_choice
from preftune.data.pairing import PAIRINGS
from preftune.data.rows import BadRowHandler, left_out
from preftune.data.tables import RawTable, is_within
from preftune.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

_ENTRY_KEYS = ("id", "config", "split", "columns", "weight")
_MIXTURE_KEYS = ("datasets", "seed", "test_split_size", "shuffle")

# Datasets carry no room for such facts; `prepare` looks for this attribute to report on both stages together.
_REPORT_ATTRIBUTE = "_preftune_load_report"


@dataclass(frozen=True)
class LoadReport:
    """What happened to rows on their way from the source to canonical rows.

    Attributes:
        rows_read: Rows that were found.
        bad_rows: Rows that were left out, by reason. Bad rows that stay are found again when they are prepared.
        formats: Format of each source.
        notes: Lines for the user.
        columns: Column -> what is done with it.
    """

    rows_read: int
    bad_rows: dict[str, int]
    formats: dict[str, str]
    notes: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_lost(self) -> int:
        """Rows that were left out."""
        return sum(self.bad_rows.values())


def load_report(dataset: Any) -> LoadReport | None:
    """The report of the :func:`load` that made ``dataset``, if that is where it comes from, unchanged."""
    report = getattr(dataset, _REPORT_ATTRIBUTE, None)
    return report if isinstance(report, LoadReport) else None


def carry_report(source: Any, part: Any) -> None:
    """Let a part of loaded rows carry the report of all of them."""
    setattr(part, _REPORT_ATTRIBUTE, load_report(source))


@dataclass
class _Loader:
    dataset_format: str
    pairing: str
    handler: BadRowHandler
    for_sft: bool
    implicit_prompt: str
    rows_read: int = 0
    formats: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)

    def rows(self, table: RawTable) -> list[Row]:
        refuse_images(table.columns(), table.name)
        spec = resolve(
            self.dataset_format,
            table.columns(),
            table.example(),
            where=table.name,
            for_sft=self.for_sft,
            implicit_prompt=self.implicit_prompt,
        )
        rows, notes = canonical_rows(table, spec, self.handler, self.pairing)
        self.rows_read += len(table)
        self.formats[table.name] = spec.name
        self.columns |= column_uses(spec, table.columns(), for_sft=self.for_sft)
        self.notes += [f"{table.name}: {note}" for note in notes]
        return rows

    def another(self) -> _Loader:
        """A loader of the same settings with counts of its own."""
        handler = BadRowHandler(self.handler.policy, self.handler.quarantine_path)
        return _Loader(self.dataset_format, self.pairing, handler, self.for_sft, self.implicit_prompt)

    def dataset(self, rows: list[Row], where: str) -> Dataset:
        """Rows as a data set that carries the report of this loader."""
        return self.signed(to_dataset(rows, where, self.lost()))

    def lost(self) -> list[str]:
        """What became of rows that did not come out."""
        return [*self.handler.left_out(), *self.notes]

    def signed(self, dataset: Dataset) -> Dataset:
        """The data set with the report of this loader."""
        lost = left_out(self.handler.counts, self.handler.policy)
        report = LoadReport(self.rows_read, lost, dict(self.formats), tuple(self.notes), dict(self.columns))
        setattr(dataset, _REPORT_ATTRIBUTE, report)
        return dataset


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
    """Load data as canonical rows.

    Exactly one of ``dataset_name``, ``dataset_mixture`` and ``dataset_mixer`` says what to load.

    Args:
        dataset_name: Hub id; local ``.json``, ``.jsonl`` (or ``.gz`` of them), ``.parquet`` or ``.csv``; folder written
            by ``save_to_disk``; folder of files named after splits.
        dataset_config: Configuration of a data set on the Hub.
        split: Split to train on, with ``datasets`` slicing such as ``train[:1000]``. Where a data set has the same
            name with ``test`` for ``train``, that becomes the test split.
        dataset_mixture: ``{"datasets": [{"id", "config", "split", "columns", "weight"}], "seed", "test_split_size"}``,
            as in the alignment handbook: each set is shuffled and cut to its weight, then all are joined and shuffled
            (unless ``shuffle`` is false, as where TRL's ``datasets`` are meant).
        dataset_mixer: ``{id: fraction}``, the handbook's older form: the first fraction of each training split, and
            all of each test split, joined and shuffled.
        dataset_splits: Splits that ``dataset_mixer`` loads, each with ``train`` or ``test`` in its name; otherwise
            ``train``, and ``test`` where it exists.
        columns: Columns to keep, or a mapping from their name to ours.
        dataset_format: ``auto``, or a name from :data:`preftune.data.formats.FORMATS`.
        pairing: ``best_worst`` or ``all`` pairs of ranked and of labelled answers; ``none`` leaves labelled answers
            unpaired.
        on_bad_rows: ``error``, ``skip`` or ``warn``; see :class:`preftune.data.DataOptions`.
        quarantine_path: JSON-lines file for skipped rows. It is begun anew here and continued by ``prepare``.
        seed: Seed of the mixer's shuffle, and of a mixture that names none.
        streaming: Not supported; refused.
        with_test: Whether the test split is read where there is one.
        for_sft: Prefer what supervised fine-tuning reads where the columns hold a pair as well.
        implicit_prompt: How the prompt is found where rows have none; see :class:`preftune.data.DataOptions`.

    Returns:
        ``{"train": ..., "test": ...}``; ``test`` only where there is one.

    Raises:
        ConfigError: Contradicting or malformed arguments.
        DataError: Data that cannot be found, read or used.
    """
    _check_arguments(dataset_name, dataset_mixture, dataset_mixer, streaming)
    check_choice("on_bad_rows", on_bad_rows, ("error", "skip", "warn"))
    check_choice("pairing", pairing, PAIRINGS)
    check_format_name(dataset_format)
    if dataset_splits is not None and dataset_mixer is None:
        raise ConfigError(
            "dataset_splits belongs to dataset_mixer",
            where="dataset_splits",
            value=list(dataset_splits),
            remedy="use split",
        )
    if quarantine_path is not None and on_bad_rows != "skip":
        raise ConfigError(
            "quarantine_path is only written with on_bad_rows: skip",
            where="quarantine_path",
            value=quarantine_path,
            remedy="set on_bad_rows: skip, or leave quarantine_path out",
        )
    if quarantine_path is not None and os.environ.get("RANK", "0") == "0":
        quarantine.begin(quarantine_path)
    handler = BadRowHandler(on_bad_rows, quarantine_path)
    loader = _Loader(dataset_format, pairing, handler, for_sft, implicit_prompt)
    if dataset_mixture is not None:
        _refuse_beside("dataset_mixture", dataset_config=dataset_config, columns=columns)
        result = _load_mixture(dataset_mixture, loader, seed)
    elif dataset_mixer is not None:
        _refuse_beside("dataset_mixer", dataset_config=dataset_config)
        result = _load_mixer(dataset_mixer, dataset_splits, columns, loader, seed, with_test)
    else:
        assert dataset_name is not None
        result = _load_one(dataset_name, dataset_config, split, columns, loader, with_test)
    return result


def _check_arguments(name: str | None, mixture: Any, mixer: Any, streaming: bool) -> None:
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
    if streaming:
        raise ConfigError(
            "streaming is not supported: packing needs the length of every row before training",
            where="streaming",
            value=True,
            remedy="load a part of the data with split: train[:10000]",
        )


def _refuse_beside(form: str, **values: Any) -> None:
    for name, value in values.items():
        if value is not None:
            raise ConfigError(f"{name} does not go with {form}", where=name, value=value, remedy=f"put it into {form}")


def _load_one(
    name: str,
    config: str | None,
    split: str,
    columns: Sequence[str] | Mapping[str, str] | None,
    loader: _Loader,
    with_test: bool,
) -> dict[str, Dataset]:
    origin = files.find(name, config)
    result = {"train": loader.dataset(loader.rows(_shape(origin.read(split), columns)), name)}
    if not with_test:
        return result
    base = split.partition("[")[0]
    test = base.replace("train", "test")
    known = files.hub_splits(name, config) if origin.splits is None else origin.splits
    if test != base and test in known:
        other = loader.another()
        result["test"] = other.dataset(other.rows(_shape(origin.read(test), columns)), f"{name} ({test})")
    return result


def _shape(table: RawTable, columns: Sequence[str] | Mapping[str, str] | None) -> RawTable:
    """Attach the column selection or the renaming to a table, after checking that the columns exist."""
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
        table.rename = dict(columns)
    else:
        table.select = wanted
        table.rename = {name: name.rpartition(".")[2] for name in wanted if is_within(available, name)}
    return table


def _load_mixture(mixture: Mapping[str, Any], loader: _Loader, seed: int) -> dict[str, Dataset]:
    _check_keys(mixture, _MIXTURE_KEYS, "dataset_mixture")
    entries = mixture.get("datasets")
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        raise ConfigError("'datasets' must list at least one data set", where="dataset_mixture", value=entries)
    used_seed = seed if mixture.get("seed") is None else mixture["seed"]
    rows: list[Row] = []
    for number, entry in enumerate(entries):
        where = f"dataset_mixture.datasets[{number}]"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("id"), str):
            raise ConfigError("an entry needs an id", where=where, value=entry)
        _check_keys(entry, _ENTRY_KEYS, where)
        origin = files.find(entry["id"], entry.get("config"))
        table = _shape(origin.read(entry.get("split") or "train"), entry.get("columns"))
        if entry.get("weight") is not None:
            weight = _share(entry["weight"], f"{where}.weight")
            _pick(table, _permutation(len(table), used_seed)[: int(len(table) * weight)])
        if len(table):
            rows += loader.rows(table)
    dataset = to_dataset(rows, "dataset_mixture", loader.lost())
    if mixture.get("shuffle", True):
        dataset = dataset.shuffle(seed=used_seed).flatten_indices()
    size = mixture.get("test_split_size")
    if size is None:
        return {"train": loader.signed(dataset)}
    _check_test_size(size, len(dataset))
    parts = dataset.train_test_split(test_size=size, seed=used_seed)
    return {"train": loader.signed(parts["train"].flatten_indices()), "test": parts["test"].flatten_indices()}


def _check_test_size(size: Any, num_rows: int) -> None:
    whole = isinstance(size, int) and not isinstance(size, bool) and 0 < size < num_rows
    if not whole and not (isinstance(size, float) and 0 < size < 1):
        raise ConfigError(
            "test_split_size is a share or a number of rows",
            where="dataset_mixture.test_split_size",
            value=size,
            allowed=f"between 0 and 1, or 1 to {num_rows - 1} rows",
        )


def _load_mixer(
    mixer: Mapping[str, float],
    splits: Sequence[str] | None,
    columns: Sequence[str] | Mapping[str, str] | None,
    loader: _Loader,
    seed: int,
    with_test: bool,
) -> dict[str, Dataset]:
    for split in splits or ():
        if ("train" in split) == ("test" in split):
            raise ConfigError("a split's name must contain either train or test", where="dataset_splits", value=split)
    rows: dict[str, list[Row]] = {}
    loaders = {"train": loader, "test": loader.another()}
    for name, fraction in mixer.items():
        share = _share(fraction, f"dataset_mixer[{name!r}]")
        origin = files.find(name)
        known = files.hub_splits(name, None) if origin.splits is None else origin.splits
        # Unless told, the handbook takes train and test; here a data set without a test split is no error.
        for split in splits or [split for split in ("train", "test") if split == "train" or split in known]:
            part = "train" if "train" in split else "test"
            if part == "test" and not with_test:
                continue
            table = _shape(origin.read(split), columns)
            if part == "train":
                _pick(table, range(int(share * len(table))))
            if len(table):
                rows.setdefault(part, []).extend(loaders[part].rows(table))
    if "train" not in rows:
        raise ConfigError("nothing to train on", where="dataset_mixer", value=dict(mixer), remedy="raise a fraction")
    found = {}
    for part, some in rows.items():
        dataset = to_dataset(some, f"dataset_mixer ({part})", loaders[part].lost())
        found[part] = loaders[part].signed(dataset.shuffle(seed=seed).flatten_indices())
    return found


def _pick(table: RawTable, positions: Sequence[int]) -> None:
    """Keep the rows at ``positions`` of what the table already selects."""
    table.indices = positions if table.indices is None else [table.indices[i] for i in positions]


def _permutation(num_rows: int, seed: int) -> list[int]:
    """The order that ``Dataset.shuffle(seed)`` gives, so that a weight keeps the rows the handbook keeps."""
    import numpy as np

    return [int(i) for i in np.random.default_rng(seed).permutation(num_rows)]


def _share(value: Any, where: str) -> float:
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
