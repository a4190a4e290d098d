"""Win rates corrected by human labels: by hand, against the published formula, in simulation, and from end to end."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preftune.errors import DataError
from preftune.evaluation.corrected import by_error_rates, by_residuals
from preftune.evaluation.judge import Question, Verdict
from preftune.evaluation.labels import TO_LABEL, read_labels, write_to_label
from preftune.evaluation.metrics import Summary
from preftune.evaluation.winrate import win_rate
from preftune.stats.intervals import wilson_interval

NONE = math.nan


def drawn(
    seed: int, num: int, share: float, specificity: float, sensitivity: float
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """What people would say, and what a judge of these qualities says."""
    rng = np.random.default_rng([31, seed])
    people = (rng.random(num) < share).astype(float)
    judge = np.where(people == 1, rng.random(num) < sensitivity, rng.random(num) >= specificity)
    return people, judge.astype(float)


def labelled(people: np.ndarray[Any, Any], number: int) -> np.ndarray[Any, Any]:
    found = np.full(len(people), NONE)
    found[:number] = people[:number]
    return found


# ---- residuals ----


def test_residuals_by_hand() -> None:
    scores = np.array([1, 1, 0, 0, 1, 1, 1, 0.5, 1, 0])
    labels = np.array([1, 0, 0, 0.5, 1, NONE, NONE, NONE, NONE, NONE])
    # Labelled: mean of people 2.5 / 5, of the judge 3 / 5; covariance 2 / 5 - 0.5 * 0.6 = 0.1, variance 0.24.
    # All: mean of the judge 6.5 / 10.
    assert by_residuals(scores, labels).mean == pytest.approx(0.5 - 0.1 / 0.24 * (0.6 - 0.65))


def test_residuals_of_a_perfect_judge_are_the_judge_and_of_none_are_the_people() -> None:
    people, _ = drawn(0, 400, 0.7, 1, 1)
    found = by_residuals(people, labelled(people, 60))
    assert found.mean == pytest.approx(people.mean(), abs=1e-12)
    alone = wilson_interval(int(people[:60].sum()), 60)
    assert found.high - found.low < 0.75 * (alone.high - alone.low)
    constant = by_residuals(np.ones(400), labelled(people, 60))
    assert constant.mean == pytest.approx(people[:60].mean(), abs=1e-12)
    assert constant.high - constant.low == pytest.approx(alone.high - alone.low, rel=0.15)


def test_residuals_of_people_who_all_agree_keep_a_width() -> None:
    for value in (0.0, 0.5, 1.0):
        found = by_residuals(np.full(100, value), labelled(np.full(100, value), 25))
        assert found.mean == value
        assert found.high - found.low > 0.1


def test_equal_answers_are_ties_and_need_no_label() -> None:
    people, judge = drawn(1, 200, 0.8, 0.8, 0.8)
    plain = by_residuals(judge, labelled(people, 50))
    more = by_residuals(
        np.concatenate([judge, np.full(200, 0.5)]),
        np.concatenate([labelled(people, 50), np.full(200, NONE)]),
        equal=np.arange(400) >= 200,
    )
    assert more.mean == pytest.approx(0.5 * plain.mean + 0.25)


@pytest.mark.parametrize("method", ["residuals", "error rates"])
def test_copies_of_a_prompt_tell_nothing_new(method: str) -> None:
    people, judge = drawn(2, 300, 0.65, 0.8, 0.9)
    tried, told = judge[:80], people[:80]
    groups = list(range(300)) * 2

    def twice(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.concatenate([x, x])

    if method == "residuals":
        once = by_residuals(judge, labelled(people, 80))
        copied = by_residuals(twice(judge), twice(labelled(people, 80)), groups=groups)
        alone = by_residuals(twice(judge), twice(labelled(people, 80)))
    else:
        found = [
            by_error_rates(judge, tried, told),
            by_error_rates(twice(judge), twice(tried), twice(told), groups=groups, tried_groups=groups[:80] * 2),
            by_error_rates(twice(judge), twice(tried), twice(told)),
        ]
        assert all(found)
        once, copied, alone = (each for each in found if each is not None)
    assert copied.mean == pytest.approx(once.mean, abs=1e-9)
    width = once.high - once.low
    # The four verdicts that were imagined weigh less beside twice the rows.
    assert copied.high - copied.low == pytest.approx(width, rel=0.06)
    assert alone.high - alone.low < 0.8 * width


# ---- error rates ----


def test_error_rates_are_rogan_and_gladens() -> None:
    # 30 of 40 wins and 16 of 20 losses recognised: q1 0.75, q0 0.8; the judge says 60 %: (0.6 - 0.2) / 0.55.
    told = np.repeat([1.0, 0.0], [40, 20])
    tried = np.concatenate([np.repeat([1.0, 0.0], [30, 10]), np.repeat([0.0, 1.0], [16, 4])])
    found = by_error_rates(np.repeat([1.0, 0.0], [300, 200]), tried, told)
    assert found is not None
    assert found.mean == pytest.approx((0.6 - 0.2) / 0.55)


def published(p: float, q0: float, q1: float, n: int, m0: int, m1: int) -> tuple[float, float]:
    """The interval of Lee et al. (2025), section 3: estimates of Agresti and Coull's kind in a first-order error."""
    z = 1.959963984540054
    p, n1 = (n * p + z**2 / 2) / (n + z**2), n + z**2
    q0, q1 = (m0 * q0 + 1) / (m0 + 2), (m1 * q1 + 1) / (m1 + 2)
    v0, v1 = q0 * (1 - q0) / (m0 + 2), q1 * (1 - q1) / (m1 + 2)
    t = (p + q0 - 1) / (q0 + q1 - 1)
    centre = t + 2 * z**2 * (t * v1 - (1 - t) * v0)
    error = math.sqrt(p * (1 - p) / n1 + (1 - t) ** 2 * v0 + t**2 * v1) / (q0 + q1 - 1)
    return centre - z * error, centre + z * error


@pytest.mark.parametrize(
    ("share", "q0", "q1", "num"), [(0.6, 0.9, 0.8, 400), (0.5, 0.8, 0.8, 1000), (0.8, 0.7, 0.9, 2000)]
)
def test_error_rates_agree_with_the_published_interval(share: float, q0: float, q1: float, num: int) -> None:
    people, judge = drawn(3, 3000, share, q0, q1)
    told, tried = drawn(4, num, 0.5, q0, q1)
    found = by_error_rates(judge, tried, told)
    assert found is not None
    wins, losses = told == 1, told == 0
    low, high = published(
        judge.mean(), 1 - tried[losses].mean(), tried[wins].mean(), 3000, int(losses.sum()), int(wins.sum())
    )
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.15 * (high - low))
    assert people.mean() == pytest.approx(found.mean, abs=high - low)


def test_a_judge_that_guesses_corrects_nothing() -> None:
    nothing = 0
    for seed in range(60):
        told, tried = drawn(seed, 60, 0.5, 0.5, 0.5)
        nothing += by_error_rates(drawn(100 + seed, 400, 0.7, 0.5, 0.5)[1], tried, told) is None
    # A 95 % test of the judge against guessing, on one side.
    assert nothing >= 55
    # One who is always wrong is no judge either, and labels of one kind show only one of the two errors.
    told, tried = drawn(1, 60, 0.5, 0.05, 0.05)
    assert by_error_rates(tried, tried, told) is None
    assert by_error_rates(tried, tried, np.ones(60)) is None


# ---- coverage ----


@pytest.mark.parametrize(
    ("share", "q0", "q1", "num"),
    [(0.5, 0.9, 0.9, 30), (0.5, 0.7, 0.9, 30), (0.5, 0.7, 0.9, 100), (0.9, 0.97, 0.97, 50), (0.8, 0.6, 0.7, 60)],
)
def test_both_cover_where_the_judge_alone_does_not(share: float, q0: float, q1: float, num: int) -> None:
    hits = np.zeros(3)
    for seed in range(200):
        people, judge = drawn(seed, 400, share, q0, q1)
        told, tried = drawn(10_000 + seed, num, 0.5, q0, q1)
        rates = by_error_rates(judge, tried, told)
        alone = wilson_interval(int(judge.sum()), 400)
        found = by_residuals(judge, labelled(people, num)), alone
        hits[:2] += [each.low <= share <= each.high for each in found]
        # Where nothing is corrected nothing is said that could be wrong.
        hits[2] += rates is None or rates.low <= share <= rates.high
    # 95 % less twice the scatter of 200 draws.
    assert (hits[[0, 2]] / 200 >= 0.92).all(), hits
    if (share, q0, q1) != (0.5, 0.9, 0.9):
        assert hits[1] / 200 < 0.85


# ---- files ----


def rows_of(number: int, label: str | None = "first") -> list[dict[str, Any]]:
    return [{"prompt": f"p{n}", "first": "a good one", "second": "bad", "label": label} for n in range(number)]


def written(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def test_reads_labels_of_several_people_in_either_order(tmp_path: Path) -> None:
    rows = [
        *rows_of(25),
        {"prompt": "p0 ", "first": "bad", "second": "a good one", "label": "first"},
        *rows_of(3, None),
    ]
    equal = {"prompt": "q", "first": "x", "second": " x", "label": "tie"}
    odd = {"prompt": "line\u2028separator", "first": "x", "second": "y", "label": "tie"}
    found = read_labels(written(tmp_path / "labels.jsonl", [*rows, equal, json.dumps(odd, ensure_ascii=False), ""]))
    assert len(found) == 26
    assert {each.prompt: each.score for each in found} | {} == {f"p{n}": 1.0 for n in range(1, 25)} | {
        "p0": 0.5,
        "line\u2028separator": 0.5,
    }


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (rows_of(19), "too few comparisons.*19.*20 or more"),
        (rows_of(400, None), "too few comparisons.*0"),
        ([rows_of(1)[0]] * 50, "too few comparisons.*1"),
        ([*rows_of(30), "{"], "line 31: not JSON"),
        ([*rows_of(30), "[]"], "line 31: a text is missing"),
        ([{"prompt": "p", "first": "a", "label": "first"}], "line 1: a text is missing"),
        ([*rows_of(2), {**rows_of(1)[0], "label": "A"}], "line 3: not a label.*first, second, tie"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_labels(written(tmp_path / "labels.jsonl", rows))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"judge_labels.*cannot be read"):
        read_labels(str(tmp_path / "nowhere.jsonl"))


class Rater:
    """A judge that is right about "good" except where an answer has a mark; there it has it the wrong way round."""

    def ask(self, questions: Sequence[Question], description: str = "") -> list[Verdict | None]:
        found: list[Verdict | None] = []
        for question in questions:
            gap = question.first.count("good") - question.second.count("good")
            gap *= -1 if "!" in question.first + question.second else 1
            found.append("first" if gap > 0 else "second" if gap < 0 else "tie")
        return found


def comparisons(num: int, won: int, marked: int) -> tuple[list[str], list[str], list[str]]:
    """The model wins ``won`` of ``num``; in the first ``marked`` of every hundred the judge has it wrong."""
    rng = np.random.default_rng(5)
    order = rng.permutation(num)
    prompts, answers, others = [], [], []
    for number in range(num):
        mark = "!" if order[number] % 100 < marked else ""
        prompts.append(f"prompt {number}")
        wins = rng.permutation(num)[0] >= 0 and order[(number * 7) % num] < won
        answers.append(f"a good answer {number}{mark}" if wins else f"an answer {number}{mark}")
        others.append(f"another {number}" if wins else f"a good other {number}")
    return prompts, answers, others


def filled(path: Path, number: int) -> list[dict[str, Any]]:
    """People label from the top, and are right."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows[:number]:
        row["label"] = "first" if "good" in row["first"] else "second"
    return rows


def test_from_comparisons_to_the_corrected_win_rate(tmp_path: Path) -> None:
    prompts, answers, others = comparisons(400, won=320, marked=20)
    path = write_to_label(str(tmp_path), prompts, answers, others, seed=0)
    rows = filled(path, 100)
    # Blind: the model's answers are on both sides, and the order is not the data's.
    assert 120 < sum(row["first"] in answers for row in rows) < 280
    assert [row["prompt"] for row in rows] != prompts
    labels = read_labels(written(path, rows))
    plain = win_rate(Rater(), prompts, answers, others, None, Summary())
    assert plain["win_rate"]["high"] < 0.75
    assert "corrected" not in plain
    found = win_rate(Rater(), prompts, answers, others, None, Summary(), labels)["corrected"]
    assert (found["method"], found["labels"], found["n"]) == ("residuals", 100, 400)
    assert found["low"] < 0.8 < found["high"]
    assert found["low"] > plain["win_rate"]["mean"]
    assert found["agreement"]["mean"] == pytest.approx(0.8, abs=0.1)
    # A file with labels in it is nobody's to overwrite.
    write_to_label(str(tmp_path), prompts, answers, others, seed=1)
    assert [json.loads(line)["label"] for line in (tmp_path / TO_LABEL).read_text().splitlines()] == [
        row["label"] for row in rows
    ]


def test_labels_of_other_comparisons_correct_by_error_rates(tmp_path: Path) -> None:
    path = write_to_label(str(tmp_path), *comparisons(600, won=300, marked=20), seed=3)
    labels = read_labels(written(path, filled(path, 300)))
    prompts, answers, others = comparisons(400, won=320, marked=20)
    prompts = [f"new {prompt}" for prompt in prompts]
    whole = win_rate(Rater(), prompts, answers, others, None, Summary(), labels)
    found = whole["corrected"]
    assert (found["method"], found["labels"]) == ("error rates", 300)
    assert found["low"] < 0.8 < found["high"]
    assert whole["notes"] == []


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_judge_no_better_than_chance_is_told(tmp_path: Path, elsewhere: bool) -> None:
    prompts, answers, others = comparisons(200, won=120, marked=50)
    path = write_to_label(str(tmp_path), prompts, answers, others, seed=0)
    labels = read_labels(written(path, filled(path, 40)))
    if elsewhere:
        prompts = [f"new {prompt}" for prompt in prompts]
    found = win_rate(Rater(), prompts, answers, others, None, Summary(), labels)
    few, useless = found["notes"]
    assert "only 40 human labels" in few
    assert "not shown to be better than chance" in useless
    assert (found["corrected"] is None) == elsewhere
