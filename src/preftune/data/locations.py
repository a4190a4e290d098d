"""Where rows come from: local files and folders, saved data sets, the Hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from preftune.data.reading import SUFFIXES, SUFFIXES_TOLD, read_file, suffix_of
from preftune.data.tables import RawTable, from_dataset
from preftune.errors import ConfigError, DataError

__all__ = ["SUFFIXES", "Origin", "RawTable", "find", "from_dataset", "hub_splits", "read_file", "suffix_of"]


#: Files beside data that say something about them.
_ABOUT = frozenset(
    [
        *("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "config.json"),
        *("croissant.json", "metadata.json"),
    ]
)


@dataclass(frozen=True)
class Origin:
    """A data set that can be read split by split.

    Attributes:
        name: What the user called it.
        splits: Names of its splits; ``None`` where only reading can tell.
        read_split: Split name -> rows.
    """

    name: str
    splits: tuple[str, ...] | None
    read_split: Callable[[str], RawTable]

    def read(self, split: str) -> RawTable:
        """Rows of a split; ``train[:100]`` and ``train[10%:20%]`` cut it as ``datasets`` does."""
        base, bracket, _ = split.partition("[")
        if self.splits is None:
            return self.read_split(split)
        check_split(self.name, base, self.splits)
        table = self.read_split(base)
        if bracket:
            table.indices = _cut(split, base, len(table))
        return table


def check_split(name: str, split: str, splits: Sequence[str]) -> None:
    """Refuse a split that a data set does not have."""
    if split not in splits:
        raise ConfigError(
            "no such split",
            where=f"split of {name}",
            value=split,
            allowed=", ".join(splits),
            remedy=f"set dataset_train_split (for an evaluation, split); parts count too: {splits[0]}[:90%] to train"
            f" on, {splits[0]}[90%:] to evaluate on",
        )


def _cut(split: str, base: str, num_rows: int) -> range:
    from datasets import ReadInstruction

    try:
        (part,) = ReadInstruction.from_spec(split).to_absolute({base: num_rows})
    except (ValueError, AssertionError) as error:
        raise ConfigError(
            f"cannot read the split: {error}", where="split", value=split, allowed="train, train[:100], train[10%:20%]"
        ) from error
    return range(part.from_ or 0, num_rows if part.to is None else part.to)


def find(name: str, config: str | None = None) -> Origin:
    """Find a data set by its name.

    Args:
        name: Hub id, local data file, folder written by ``save_to_disk``, or folder of data files named after splits.
        config: Configuration, for data sets of the Hub.

    Returns:
        Where to read it from.

    Raises:
        DataError: A local name that does not exist or holds nothing readable.
        ConfigError: ``config`` given for a local data set.
    """
    path = Path(name).expanduser()
    if not path.exists():
        if suffix_of(path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise DataError("no such file", where="dataset_name", value=name, remedy=_nearby(path))
        return _hub(name, config)
    if config is not None:
        raise ConfigError(
            "a local data set has no configurations", where="dataset_config", value=config, remedy="leave it out"
        )
    if path.is_file():
        return Origin(name, ("train",), lambda split: read_file(path))
    if not path.is_dir():
        # A pipe or a device may never end, and cannot be read twice.
        raise DataError(
            "neither a file nor a folder", where="dataset_name", value=name, remedy="write the rows into a file first"
        )
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        from preftune.data.saved_folders import saved

        return Origin(name, *saved(name, path))
    return _folder(name, path)


def _nearby(path: Path) -> str | None:
    import difflib

    folder = path.parent
    names = [item.name for item in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"did you mean {str(folder / near[0])!r}?"
    return None if folder.is_dir() else f"the folder {str(folder)!r} does not exist either"


def files_by_split(name: str, path: Path) -> dict[str, list[Path]]:
    """Data files of a local data set, by the split that their names say.

    Raises:
        DataError: There are none.
    """
    if path.is_file():
        return {"train": [path]}
    files: dict[str, list[Path]] = {}
    for item in sorted(path.iterdir()):
        suffix = suffix_of(item)
        if suffix and item.is_file() and item.name not in _ABOUT:
            files.setdefault(item.name[: -len(suffix)].split("-0")[0], []).append(item)
    if not files and (path / "data").is_dir():
        # As repositories of the Hub lie on a disk.
        return files_by_split(name, path / "data")
    if not files:
        raise DataError(
            "the folder holds no data set",
            where=name,
            allowed=f"a save_to_disk folder, or files such as train.jsonl and test.jsonl ({SUFFIXES_TOLD})",
        )

    for split, found in files.items():
        if len({suffix_of(item) for item in found}) > 1:
            raise DataError(
                f"several files of different kinds are the split {split!r}",
                where=name,
                value=[item.name for item in found],
                remedy="keep one of them, or name the file itself",
            )
    if len(files) == 1 and "train" not in files:
        # A single file is what there is to train on, whatever it is called.
        files["train"] = next(iter(files.values()))
    return files


def _folder(name: str, path: Path) -> Origin:
    files = files_by_split(name, path)

    def read(split: str) -> RawTable:
        tables = [read_file(item) for item in files[split]]
        if len(tables) == 1:
            return tables[0]
        rows = [(place, row) for table in tables for place, row in table]
        return RawTable(name, [row for _, row in rows], lambda index: rows[index][0])

    return Origin(name, tuple(files), read)


def _hub(name: str, config: str | None) -> Origin:
    def read(split: str) -> RawTable:
        import datasets

        with hub_errors(name):
            return from_dataset(f"{name} ({split})", datasets.load_dataset(name, config, split=split))

    return Origin(name, None, read)


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """What goes wrong with a data set of the Hub, as one line."""
    import datasets

    try:
        yield
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"cannot be loaded from the Hub: {first_line}",
            where=f"dataset_name {name!r}",
            remedy="check the id, the configuration, the split and the network; a local file needs its suffix",
        ) from error


def hub_splits(name: str, config: str | None) -> tuple[str, ...]:
    """Names of the splits of a data set on the Hub; empty where they cannot be listed."""
    import datasets

    try:
        return tuple(datasets.get_dataset_split_names(name, config))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError):
        return ()
