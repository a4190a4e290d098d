"""What the experiments over seeds share: cells that survive, paired differences, and words by rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks import seeded
from preftune.errors import ConfigError

KEYS = ("name", "seed")


def cells_of(out: Path, go_on: bool = False, **head: Any) -> seeded.Cells:
    return seeded.Cells(out, {"settings": head, "machine": {"load": 1.0}}, ["benchmarks/seeded.py"], KEYS, go_on)


def test_cells_survive_and_the_result_of_before_stays_until_all_are_there(tmp_path: Path) -> None:
    out = tmp_path / "results" / "x.json"
    out.parent.mkdir()
    out.write_text("before")
    cells = cells_of(out, rate=1.0)
    cells.enter({"name": "a", "seed": 1, "reward": float("nan")})
    assert out.read_text() == "before"
    again = cells_of(out, go_on=True, rate=1.0)
    assert again.has(name="a", seed=1)
    assert not again.has(name="a", seed=2)
    again.enter({"name": "a", "seed": 2, "reward": 0.5})
    report = again.finish()
    assert json.loads(out.read_text()) == seeded.without_nan(report)
    assert [cell["seed"] for cell in report["cells"]] == [1, 2]
    assert report["cells"][0]["reward"] is None
    assert not again.part.exists()
    # Without --go_on, or with nothing to go on with, everything is measured anew.
    cells.save()
    assert not cells_of(out, rate=1.0).report["cells"]


@pytest.mark.parametrize("change", ["settings", "code"])
def test_cells_of_other_code_or_settings_are_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    out = tmp_path / "x.json"
    cells_of(out, rate=1.0).enter({"name": "a", "seed": 1})
    if change == "code":
        monkeypatch.setattr("benchmarks.stale.digest", lambda patterns: "another")
    with pytest.raises(ConfigError, match=r"other code or settings.*leave --go_on out"):
        cells_of(out, go_on=True, rate=2.0 if change == "settings" else 1.0)


def finished(tmp_path: Path) -> Path:
    out = tmp_path / "x.json"
    cells = cells_of(out, rate=1.0)
    for seed in range(3):
        for name in "abcd":
            cells.enter({"name": name, "seed": seed, "reward": (ord(name) + seed) / 3, "seconds": 1.0})
    cells.finish()
    return out


@pytest.mark.parametrize("wrong", [None, "a", "c"])
def test_a_result_is_renewed_where_some_cells_come_out_as_they_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str | None
) -> None:
    out = finished(tmp_path)
    before = out.read_text()
    monkeypatch.setattr("benchmarks.stale.digest", lambda patterns: "another")
    monkeypatch.setattr(seeded.renewal, "number", 3)
    cells = cells_of(out, rate=1.0)
    missing = [(seed, name) for seed in range(3) for name in "abcd" if not cells.has(name=name, seed=seed)]
    # Those of one seed, in the order in which they were measured: the first of them may leave something to the others.
    assert missing == [(1, "a"), (1, "b"), (1, "c")]
    for seed, name in missing:
        reward = (ord(name) + seed) / 3 + 1e-9 * (name == wrong)
        cell = {"name": name, "seed": seed, "reward": reward, "seconds": 2.0}
        if name == wrong:
            with pytest.raises(ConfigError, match="does not come out as it did"):
                cells.enter(cell)
            assert out.read_text() == before
            return
        cells.enter(cell)
    report = cells.finish()
    assert report["sources"]["digest"] == "another"
    assert report["renewed"]["cells"] == 3
    assert [cell["reward"] for cell in report["cells"]] == [
        (ord(name) + seed) / 3 for seed in range(3) for name in "abcd"
    ]


def test_other_settings_are_not_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = finished(tmp_path)
    monkeypatch.setattr(seeded.renewal, "number", 3)
    with pytest.raises(ConfigError, match="other settings"):
        cells_of(out, rate=2.0)


def test_differences_are_paired_and_agree_with_scipy() -> None:
    rng = np.random.default_rng(0)
    ours = {seed: float(rng.normal(0.5, 0.1)) for seed in range(10)}
    theirs = {seed: ours[seed] - 0.02 + float(rng.normal(0, 0.02)) for seed in range(8)}
    # A seed that only one of the two has says nothing.
    theirs[11] = 0.3
    found = seeded.difference("x", ours, theirs)
    first, second = ([values[seed] for seed in range(8)] for values in (ours, theirs))
    test = stats.ttest_rel(first, second)
    interval = test.confidence_interval(0.95)
    assert (found.mean, found.p) == pytest.approx((np.mean(first) - np.mean(second), test.pvalue))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.num == 8
    assert found.num_above == sum(a > b for a, b in zip(first, second, strict=True))


def of(mean: float, p: float, num: int = 8) -> seeded.Difference:
    return seeded.Difference("x", mean, mean - 1, mean + 1, p, num, num)


def test_words_follow_holm_and_the_number_of_seeds() -> None:
    assert seeded.verdicts([of(0.1, 0.01), of(-0.1, 0.02), of(0.1, 0.04)]) == ["better", "worse", "better"]
    # Each alone below 5 %, but not after Holm over four.
    many = [of(0.1, 0.02), of(0.1, 0.02), of(0.1, 0.03), of(0.1, 0.5)]
    assert seeded.verdicts(many) == ["no difference can be told"] * 4
    assert seeded.verdicts([of(0.1, 1e-6, num=7)]) == ["nothing is concluded from 7 seeds"]
    assert seeded.verdicts([]) == []


def test_false_words_are_rarer_than_one_in_twenty() -> None:
    wrong = 0
    for draw in range(300):
        rng = np.random.default_rng([7, draw])
        rows = [
            seeded.difference("x", dict(enumerate(rng.normal(size=8))), dict(enumerate(rng.normal(size=8))))
            for _ in range(6)
        ]
        wrong += any(word in ("better", "worse") for word in seeded.verdicts(rows))
    assert wrong / 300 < 0.05 + 2 * (0.05 * 0.95 / 300) ** 0.5


def test_shares_come_with_their_interval() -> None:
    assert seeded.share(0, 20) == "0 of 20 (0 to 16 %)"
    assert seeded.share(60, 60) == "60 of 60 (94 to 100 %)"
    assert seeded.share(1, 1) == "1 of 1"


def test_pages_without_a_place_are_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n")
    seeded.place(page, "x", "new")
    assert page.read_text() == "a\n<!-- x: begin -->\nnew\n<!-- x: end -->\nb\n"
    with pytest.raises(ConfigError, match="no place"):
        seeded.place(page, "y", "new")
