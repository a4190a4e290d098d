"""Rows of a data set without what Arrow puts into them.

Arrow gives all rows of a column the same fields: a tool call with the argument ``city`` comes back with ``unit: null``
too, where another row's call has a ``unit``. Fields that are null are therefore left out of whatever is nested in a
column. Columns that the data set stores as JSON are as they were written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

#: Fields of which every turn has one, null or not.
_ALWAYS = ("content", "value", "role", "from")


def with_class_names(dataset: Any) -> Any:
    """A data set whose classes are the words that they stand for: 1 may be the second class of good and bad."""
    import pyarrow as pa
    from datasets import ClassLabel, DatasetInfo, Features, IterableDataset, Value
    from datasets import Dataset as HFDataset

    features = dict(getattr(dataset, "features", None) or {})
    classes = {name: each for name, each in features.items() if isinstance(each, ClassLabel) and each.names}
    # A transform of the caller's is given the numbers that it was written for.
    if not classes or (isinstance(dataset, HFDataset) and dataset.format["type"] == "custom"):
        return dataset
    if isinstance(dataset, IterableDataset):

        def named(row: dict[str, Any]) -> dict[str, Any]:
            return row | {name: _word(row.get(name), each.names) for name, each in classes.items()}

        return dataset.map(named, features=Features(features | dict.fromkeys(classes, Value("string"))))
    table = dataset.with_format("arrow")[:]
    for name, each in classes.items():
        words = [_word(number, each.names) for number in table[name].to_pylist()]
        table = table.set_column(table.column_names.index(name), name, pa.array(words, pa.string()))
    told = Features(features | dict.fromkeys(classes, Value("string")))
    return HFDataset(table.replace_schema_metadata(told.arrow_schema.metadata), info=DatasetInfo(features=told))


def _word(number: int | None, names: Sequence[str]) -> str | None:
    return None if number is None or number < 0 else names[number]


def rows_of(dataset: Dataset, key: Any) -> list[dict[str, Any]]:
    """Rows of a data set by a slice or a list of numbers.

    Args:
        dataset: The data set, without a format of its own.
        key: What to index it with.

    Returns:
        The rows, as they were before Arrow made them alike.
    """
    batch = dataset[key]
    nested = {name: feature for name, feature in dataset.features.items() if _adds_nulls(feature)}
    columns = {
        name: [without_nulls(value, nested[name]) for value in values] if name in nested else values
        for name, values in batch.items()
    }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


#: Most values that the lists of one piece of a column may hold: Arrow counts them with 32 bits.
MOST_VALUES = (1 << 31) - 1


def in_few_pieces(table: pa.Table) -> pa.Table:
    """A table in as few pieces as Arrow can hold it in, one unless a column has more than 2^31 tokens."""
    import pyarrow as pa
    import pyarrow.compute as pc

    longest = np.zeros(table.num_rows, dtype=np.int64)
    for column in table.columns:
        if pa.types.is_list(column.type):
            np.maximum(longest, pc.fill_null(pc.list_value_length(column), 0).to_numpy(), out=longest)
    most = np.cumsum(longest)
    pieces, start, before = [], 0, 0
    while start < table.num_rows:
        # At least one row, which Arrow holds already.
        end = max(int(np.searchsorted(most, before + MOST_VALUES, side="right")), start + 1)
        pieces.append(table.slice(start, end - start).combine_chunks())
        start, before = end, int(most[end - 1])
    return pa.concat_tables(pieces) if pieces else table.combine_chunks()


def without_nulls(value: Any, feature: Any) -> Any:
    """A value without the fields that Arrow may have added.

    Args:
        value: What a data set returned.
        feature: The feature it was stored as.

    Returns:
        The value.
    """
    if isinstance(value, Mapping) and isinstance(feature, Mapping):
        return {
            key: without_nulls(item, feature.get(key))
            for key, item in value.items()
            if item is not None or key in _ALWAYS
        }
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
        return value if inner is None else [without_nulls(item, inner) for item in value]
    return value


def _adds_nulls(feature: Any) -> bool:
    if isinstance(feature, Mapping):
        return bool(set(feature) - set(_ALWAYS)) or any(map(_adds_nulls, feature.values()))
    if isinstance(feature, list):
        return bool(feature) and _adds_nulls(feature[0])
    inner = getattr(feature, "feature", None)
    return inner is not None and _adds_nulls(inner)
