"""Rows of files and of the Hub as a stream: read piece by piece, in memory that does not grow."""

from __future__ import annotations

import bz2
import gzip
import lzma
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from preftune.data.convert import as_messages, is_conversation, is_text
from preftune.data.json_text import read_lines
from preftune.data.loader import Loader
from preftune.data.locations import check_split, files_by_split, find, hub_errors
from preftune.data.mixtures import check_forms, entries_of, form_of, seed_of, shape, share_of
from preftune.data.reading import suffix_of
from preftune.data.rows import BadRowHandler
from preftune.data.tables import OPENING, RawTable, from_dataset
from preftune.data.unused_columns import told_of
from preftune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import IterableDataset

#: Rows that are read at a time.
BLOCK = 1000
_LINES = (".jsonl", ".jsonlines", ".ndjson")
_UNPACK: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_ALLOWED = "JSON lines (.jsonl, .ndjson, also with .gz, .bz2, .xz), .parquet, save_to_disk folders, the Hub"


def stream(
    name: str,
    *,
    config: str | None,
    split: str,
    columns: Sequence[str] | Mapping[str, str] | None,
    loader: Loader,
) -> IterableDataset:
    """Canonical rows of a data set, read as they are asked for, from its beginning every time.

    Args:
        name: JSON-lines or Parquet file, folder of such files named after splits, folder written by ``save_to_disk``,
            or Hub id.
        config: Configuration, for data sets of the Hub.
        split: Name of the split.
        columns: Columns to keep, or a mapping from their name to ours.
        loader: Makes canonical rows; every pass has a copy of its own.

    Raises:
        ConfigError: A part of a split, or a split that is not there.
        DataError: Data that cannot be found, or read piece by piece.
    """
    return _drawn_from([_part(name, config, split, columns, loader)], [1.0], 0)


def mixed(mixture: Mapping[str, Any], loader: Loader, seed: int) -> IterableDataset:
    """The data sets of a mixture as one stream, from which each row comes with a chance in proportion to its weight.

    It ends with the data set that ends last; the others begin again.

    Args:
        mixture: ``{"datasets": [{"id", "config", "split", "columns", "weight"}], "seed"}``.
        loader: Makes canonical rows.
        seed: Seed of the draws where the mixture names none.

    Raises:
        ConfigError: A malformed mixture, or something that a stream cannot do.
    """
    if mixture.get("test_split_size") is not None:
        what, remedy = "a stream cannot be divided", "leave it out; evaluation needs a split of its own"
        raise ConfigError(
            what, where="dataset_mixture.test_split_size", value=mixture["test_split_size"], remedy=remedy
        )
    parts, weights = [], []
    for where, entry in entries_of(mixture):
        weight = 1.0 if entry.get("weight") is None else share_of(entry["weight"], f"{where}.weight")
        if weight:
            weights.append(weight)
            split = entry.get("split") or "train"
            parts.append(_part(entry["id"], entry.get("config"), split, entry.get("columns"), loader))
    if not parts:
        raise ConfigError("nothing to train on", where="dataset_mixture", remedy="raise a weight")
    return _drawn_from(parts, weights, seed_of(mixture, seed))


@dataclass(frozen=True)
class _Part:
    """One data set of a stream.

    Attributes:
        pieces: Its tables.
        columns: Columns to keep, or a mapping from their name to ours.
        loader: Makes canonical rows; every pass has a copy of its own.
        form: What the first rows are made of.
        texts: Whether text is among them.
        chats: Whether conversations are.
    """

    pieces: _Pieces
    columns: Any
    loader: Loader
    form: str
    texts: bool
    chats: bool

    def rows(self, chat: bool) -> Iterator[dict[str, Any]]:
        """One pass over canonical rows; with ``chat``, text is made conversations."""
        reader = replace(self.loader.another(), handler=self.loader.handler)
        opening: dict[str, None] | None = None
        for table in self.pieces.tables():
            shaped = shape(table, self.columns)
            found = dict.fromkeys(name for name in OPENING if name in shaped.columns())
            if opening is not None and found.keys() - opening.keys() and not opening:
                # The rows before were read as text that nothing stands before.
                raise DataError(
                    f"rows of the stream have {', '.join(found)} where those before have not",
                    where=table.place(0),
                    remedy="give all rows the column, or read the data without dataset_streaming",
                )
            opening = (opening or {}) | found
            shaped.opening = list(opening)
            rows = reader.rows(shaped)
            yield from map(as_messages, rows) if chat else rows


def _part(name: str, config: str | None, split: str, columns: Any, loader: Loader) -> _Part:
    """A data set whose name, split and first rows are in order; what these show is told."""
    if "[" in split:
        what = "a part of a split has no place in a stream"
        raise ConfigError(what, where="dataset_train_split", value=split, remedy="end it with max_steps")
    pieces = _Pieces(name, config, split)
    loader = replace(loader.another(), handler=_OncePerRow(loader.handler.policy, loader.handler.quarantine_path))
    first = next(pieces.tables(), None)
    if first is None:
        raise DataError("the stream holds no rows", where=name, remedy="check the split")
    rows = loader.rows(shape(first, columns))
    for finding in (*told_of(loader.overlooked, loader.columns), *loader.findings):
        warnings.warn(f"{name}: {finding}", UserWarning, stacklevel=2)
    texts, chats = (any(map(each, rows)) for each in (is_text, is_conversation))
    return _Part(pieces, columns, loader, form_of(rows), texts, chats)


def _drawn_from(parts: Sequence[_Part], weights: Sequence[float], seed: int) -> IterableDataset:
    from datasets import IterableDataset

    check_forms({part.form: part.pieces.name for part in parts})
    chats = any(part.chats for part in parts)
    if chats and any(part.texts for part in parts):
        what = "some rows are text and the others conversations: the text is made a question and its answer, so that"
        warnings.warn(f"{what} all are given to the model with its chat template", UserWarning, stacklevel=2)
    # A list would be taken for shards.
    kwargs = {"parts": tuple(parts), "weights": tuple(weights), "seed": seed, "chat": chats}
    found: IterableDataset = IterableDataset.from_generator(_draws, gen_kwargs=kwargs)
    return found


def _draws(parts: Sequence[_Part], weights: Sequence[float], seed: int, chat: bool) -> Iterator[dict[str, Any]]:
    """Rows of all parts, until each has come to its end once.

    ``datasets.interleave_datasets`` would give every message the fields of all others, and refuses what has others.
    """
    if len(parts) == 1:
        yield from parts[0].rows(chat)
        return
    draw, chances = np.random.default_rng(seed), np.array(weights) / sum(weights)
    passes = [part.rows(chat) for part in parts]
    ended: set[int] = set()
    while True:
        at = int(draw.choice(len(parts), p=chances))
        row = next(passes[at], None)
        if row is None:
            ended.add(at)
            if len(ended) == len(parts):
                return
            passes[at] = parts[at].rows(chat)
            row = next(passes[at], None)
        if row is None:
            raise DataError("the stream holds no rows that can be used", where=parts[at].pieces.name)
        yield row


class _OncePerRow(BadRowHandler):
    """Decides about rows that are read again with every pass: each is kept aside once, and the first one is told."""

    def __init__(self, policy: str, quarantine_path: str | None) -> None:
        super().__init__(policy, quarantine_path)
        self._kept: set[str] = set()

    def quarantine(self, entries: Iterable[Mapping[str, Any]]) -> None:
        new = [each for each in entries if each["place"] not in self._kept]
        if new and not self._kept:
            where = f" and kept in {self.quarantine_path}" if self.quarantine_path else ""
            said = f"{new[0]['place']}: {new[0]['what']}; rows of a stream that cannot be used are left out{where}"
            warnings.warn(said, UserWarning, stacklevel=2)
        self._kept.update(each["place"] for each in new)
        super().quarantine(new)


class _Pieces:
    """A data set that can be gone through table by table, again and again, and be handed to another process."""

    def __init__(self, name: str, config: str | None, split: str) -> None:
        self.name, self.config, self.split = name, config, split

    def tables(self) -> Iterator[RawTable]:
        path = Path(self.name).expanduser()
        saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
        if saved or (path.exists() and self.config is not None) or not (path.is_file() or path.is_dir()):
            origin = find(self.name, self.config)
            return self._saved(origin.read(self.split)) if path.exists() else self._hub()
        files = files_by_split(self.name, path)
        check_split(self.name, self.split, list(files))
        return chain.from_iterable(map(_of_file, files[self.split]))

    def _saved(self, table: RawTable) -> Iterator[RawTable]:
        for start in range(0, len(table), BLOCK):
            yield replace(table, indices=range(start, min(start + BLOCK, len(table))))

    def _hub(self) -> Iterator[RawTable]:
        import datasets

        before = 0
        with hub_errors(self.name):
            rows = datasets.load_dataset(self.name, self.config, split=self.split, streaming=True)
            for table in rows.with_format("arrow").iter(BLOCK):
                yield _of_arrow(f"{self.name} ({self.split})", table, before)
                before += len(table)


def _of_file(path: Path) -> Iterator[RawTable]:
    suffix = suffix_of(path) or ""
    if suffix == ".parquet":
        return _of_parquet(path)
    if suffix.startswith(_LINES) and path.suffix.lower() in (*_LINES, *_UNPACK):
        return _of_lines(path)
    raise DataError(
        "cannot be read piece by piece",
        where="dataset_streaming",
        value=str(path),
        allowed=_ALLOWED,
        remedy="preftune data convert makes JSON lines of it",
    )


def _of_lines(path: Path) -> Iterator[RawTable]:
    first = 1
    try:
        with _UNPACK.get(path.suffix.lower(), open)(path, "rt", encoding="utf-8-sig", errors="surrogateescape") as file:
            while lines := list(islice(file, BLOCK)):
                table = read_lines(path, "".join(lines), first)
                if table.rows:
                    yield table
                first += len(lines)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"the file cannot be read: {reason}", where=str(path)) from error


def _of_parquet(path: Path) -> Iterator[RawTable]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    before = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(BLOCK):
            yield _of_arrow(str(path), pa.Table.from_batches([batch]), before)
            before += len(batch)
    except (OSError, pa.ArrowException) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"the file cannot be read: {first_line}", where=str(path)) from error


def _of_arrow(name: str, table: Any, before: int) -> RawTable:
    """A piece of a table that begins after so many rows."""
    from datasets import Dataset

    found = from_dataset(name, Dataset(table))
    found.place = lambda index: f"{name}, row {before + index} (the first is 0)"
    return found
