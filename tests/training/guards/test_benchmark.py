"""Data that mislead, for the experiments with guards."""

from __future__ import annotations

from benchmarks import guards as bench


def test_data_that_mislead() -> None:
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "longer"},
        {"prompt": "p", "chosen": "long", "rejected": "b"},
        {"prompt": "p", "chosen": "same", "rejected": "size"},
    ]
    found = bench.longer_wins(rows)
    assert [row["chosen"] for row in found] == ["longer", "long"]
    assert {row["chosen"] for row in bench.one_answer(rows)} == {bench.one_answer(rows)[0]["chosen"]}
    assert all(row["chosen"].startswith(" I would buy it again.") for row in bench.marked(rows))
    taken_apart = bench.unpaired(rows, 0)
    assert sum(row["label"] for row in taken_apart) == len(taken_apart) / 2 == 3
