"""Numbers as text: as many digits as mean something."""

from __future__ import annotations

from typing import Any

import pytest

from preftune.report.parts import audit_facts, eval_tables
from preftune.report.tables import duration, facts, interval, rows_of, size


@pytest.mark.parametrize(
    ("mean", "low", "high", "text"),
    [
        (0.007507, -0.1266, 0.1137, "0.01 (-0.13 to 0.11)"),
        (0.14583, 0.11892, 0.16601, "0.146 (0.119 to 0.166)"),
        (98.19, 56.15, 117.2, "98 (56 to 117)"),
        (-0.0001, -0.2, 0.2, "0.00 (-0.20 to 0.20)"),
        (12345.6, 11000.0, 13999.0, "12,346 (11,000 to 13,999)"),
        (7.6e-05, 7.1e-05, 8.2e-05, "0.000076 (0.000071 to 0.000082)"),
        (7.6e-09, 7.1e-09, 8.2e-09, "7.6e-09 (7.1e-09 to 8.2e-09)"),
        (1.0, 1.0, 1.0, "1 (1 to 1)"),
        (0.69314, None, None, "0.6931"),
    ],
)
def test_an_interval_decides_about_the_digits(mean: float, low: float | None, high: float | None, text: str) -> None:
    assert interval({"mean": mean, "low": low, "high": high}) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 bytes"), (512, "512 bytes"), (50_617_848, "48.3 MiB"), (2**40, "1 TiB"), (None, "-")]
)
def test_sizes(num_bytes: int | None, text: str) -> None:
    assert size(num_bytes) == text


@pytest.mark.parametrize(("seconds", "text"), [(11.71, "11.7 s"), (300, "5 min"), (5400, "90 min"), (36000, "10 h")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_nested_results_keep_their_names() -> None:
    nothing = {"mean": None, "low": None, "high": None, "n": 0}
    values: dict[str, Any] = {"model": {"tokens": {"mean": 98.2, "low": 56.1, "high": 117.0}, "longest": 128}}
    assert facts({**values, "accuracy": nothing, "empty": {}}) == [
        ("model: tokens", "98 (56 to 117)"),
        ("model: longest", "128"),
        ("accuracy", "-"),
    ]
    table = rows_of([{"n": 3, "accuracy": {"mean": 0.5, "low": 0.2, "high": 0.8}}, {"n": 0, "accuracy": nothing}])
    assert table is not None
    assert table.rows == [["3", "50.0 % (20.0 to 80.0)"], ["0", "-"]]
    assert table.numeric == [True, True]


def test_bins_without_pairs_are_left_out() -> None:
    bins = [{"low": 0.5, "high": 0.6, "n": 4}, {"low": 0.6, "high": 0.7, "n": 0}]
    ((title, table),) = eval_tables({"calibration": {"bins": bins}})
    assert title == "Calibration"
    assert len(table.rows) == 1


def test_a_noise_that_was_not_estimated_takes_no_room() -> None:
    noise = {"estimate": None, "low": 0.0, "high": 0.5, "caveat": "too few pairs"}
    assert audit_facts({"noise": noise}) == []
    assert audit_facts({"noise": {**noise, "estimate": 0.1}})[0][0] == "Estimated label noise"
