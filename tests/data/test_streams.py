"""Streams without an end are refused where all would be read; tables that Arrow cannot hold in one piece."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset, IterableDataset

from preftune.data import arrow, streams
from preftune.data.arrow import in_few_pieces
from preftune.errors import DataError


def endless() -> Iterator[dict[str, Any]]:
    number = 0
    while True:
        number += 1
        yield {"text": str(number)}


def test_a_stream_is_read_to_its_end() -> None:
    stream = Dataset.from_list([{"text": "a"}, {"text": "b"}]).to_iterable_dataset()
    assert streams.read_to_end(stream, "train") == [{"text": "a"}, {"text": "b"}]
    assert len(streams.read_to_end(stream.repeat(3), "train")) == 6


@pytest.mark.parametrize(("name", "remedy"), [("train", "set max_steps, or pass its beginning"), ("eval", "pass its")])
def test_a_stream_without_end_is_refused(name: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MOST_ROWS", 100)
    with pytest.raises(DataError, match=f"{name} data set: the stream does not end within 100 rows; {remedy}"):
        streams.read_to_end(IterableDataset.from_generator(endless), name)


def test_a_stream_that_repeats_itself_is_not_even_read() -> None:
    stream = Dataset.from_list([{"text": "a"}]).to_iterable_dataset().repeat(None)
    for each in (stream, stream.map(lambda row: {"text": row["text"] + "!"}), stream.shuffle(seed=0)):
        with pytest.raises(DataError, match="repeats itself for ever"):
            streams.read_to_end(each, "train")


def test_tables_come_in_as_few_pieces_as_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = [[1] * (n % 7) for n in range(50)]
    column = pa.chunked_array([pa.array(lists[start : start + 5], pa.list_(pa.int32())) for start in range(0, 50, 5)])
    other = pa.chunked_array([pa.array([None, [1, 2, 3]] * 25, pa.list_(pa.int32()))])
    table = pa.table({"chosen_ids": column, "rejected_ids": other, "margin": pa.array([0.5] * 50)})
    assert in_few_pieces(table)["chosen_ids"].num_chunks == 1
    monkeypatch.setattr(arrow, "MOST_VALUES", 40)
    pieces = in_few_pieces(table)
    assert pieces.equals(table)
    assert 4 < pieces["chosen_ids"].num_chunks < 10
    assert all(len(chunk.flatten()) <= 40 for name in ("chosen_ids", "rejected_ids") for chunk in pieces[name].chunks)
    assert in_few_pieces(table.slice(0, 0)).num_rows == 0
    # A row is never taken apart.
    monkeypatch.setattr(arrow, "MOST_VALUES", 2)
    assert in_few_pieces(table).equals(table)


@pytest.mark.parametrize("most", [3, 10])
def test_lengths_and_checks_read_tables_in_several_pieces(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from preftune.training.lengths import pair_lengths

    monkeypatch.setattr(arrow, "MOST_VALUES", most)
    columns = {name: pa.array([[1] * n for n in range(1, 9)], pa.list_(pa.int32())) for name in ("prompt_ids",)}
    columns |= dict.fromkeys(("chosen_ids", "rejected_ids"), columns["prompt_ids"])
    dataset = Dataset(in_few_pieces(pa.table(columns)))
    lengths = pair_lengths(dataset)
    assert lengths is not None
    assert lengths.row.tolist() == [3 * n for n in range(1, 9)]
    assert dataset[5]["chosen_ids"] == [1] * 6
