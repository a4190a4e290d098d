"""What is calculated for many processes agrees with what is known of it."""

from __future__ import annotations

import json
import math

import pytest
from benchmarks.balance import DOCS

from benchmarks import scale, scale_plan

MEAN, WRITE = 50 * 3600.0, 48.0


@pytest.mark.parametrize("interval", [500.0, 4000.0, 40_000.0])
def test_simulated_losses_are_those_expected(interval: float) -> None:
    expected = scale_plan.daly(interval, WRITE, MEAN)
    # Of 5,000 failures at least, whose number varies by 1.4 %; four standard deviations.
    assert scale_plan.lost(interval, WRITE, MEAN) == pytest.approx(expected, rel=4 / math.sqrt(5000))


def test_without_failures_only_writing_takes_time() -> None:
    assert scale_plan.lost(1000.0, WRITE, 1e12) == pytest.approx(WRITE / (1000 + WRITE), rel=1e-3)


def test_youngs_interval_is_near_the_best() -> None:
    for found in scale_plan.failures():
        assert found["lost"] <= 1.05 * min(found["tried"].values())
        assert found["tried"][max(found["tried"])] > 1.5 * found["lost"]


def test_bytes_by_hand() -> None:
    each = {"tokens": 4096, "processes": 4, "row_tokens": 1024, "parameters": 1000, "vocab": 20, "hidden": 10}
    assert scale_plan.bytes_sent({**each, "engine": "ddp"}) == 2 * 3 / 4 * 4000
    # One row: 800 parameters are gathered three times, 200 twice, and the gradients are added up.
    assert scale_plan.bytes_sent({**each, "engine": "fsdp2"}) == 3 / 4 * 4 * (800 * 3 + 200 * 2 + 2 * 1000)


def test_the_page_shows_the_results() -> None:
    page = DOCS.read_text(encoding="utf-8")
    for mark, text in scale.tables(json.loads(scale.OUT.read_text(encoding="utf-8"))).items():
        assert f"<!-- {mark} -->\n{text}\n<!-- /{mark} -->" in page
