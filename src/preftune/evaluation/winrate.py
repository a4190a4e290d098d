"""Win rate in a judge's eyes, with both orders of the answers, and with the judge's liking for length taken out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from scipy import special, stats

from preftune.errors import DataError
from preftune.evaluation.judge import Question, Verdict
from preftune.evaluation.labels import Label, correct
from preftune.evaluation.metrics import Groups, Metric, Summary
from preftune.stats.rows import Array

#: Weight of the prior that holds the length coefficient back, in pairs; and one that only keeps the intercept finite.
LENGTH_RIDGE, _INTERCEPT_RIDGE = 1.0, 1e-4
_POINTS: dict[str, float] = {"first": 1.0, "tie": 0.5, "second": 0.0}


class Asker(Protocol):
    """Whoever answers questions; see :class:`~preftune.evaluation.judge.Judge`."""

    def ask(self, questions: Sequence[Question], description: str = ...) -> list[Verdict | None]:
        """One verdict per question."""
        ...


def win_rate(
    judge: Asker,
    prompts: Sequence[str],
    answers: Sequence[str],
    opponents: Sequence[str],
    groups: Groups,
    summary: Summary,
    labels: Sequence[Label] = (),
) -> dict[str, Any]:
    """Share of comparisons that the model wins, ties counting half.

    Every pair of answers is judged in both orders and scores the mean of the two verdicts, so that a judge who always
    prefers one place gives one half. Equal answers are a tie that nobody is asked about. A comparison with a verdict
    that cannot be read is left out and counted.

    Args:
        judge: Whom to ask.
        prompts: The requests.
        answers: The model's answers.
        opponents: The answers it is compared with.
        groups: Prompt of each comparison.
        summary: Settings of the intervals.
        labels: What people said of some comparisons, to correct the win rate by; see
            :func:`preftune.evaluation.labels.correct`.

    Returns:
        ``win_rate`` and ``length_controlled`` with intervals; ``wins``, ``ties``, ``losses``; ``n`` and ``unreadable``;
        ``position``: how often the first place won and how often both orders agreed; mean lengths in characters; and
        with labels ``corrected`` and ``notes``.

    Raises:
        DataError: Not one verdict could be read.
    """
    scores, position, num_different = _judged(judge, prompts, answers, opponents)
    readable: list[int] = np.flatnonzero(np.isfinite(scores)).tolist()
    if not readable:
        raise DataError(
            "no verdict of the judge could be read",
            where="judge_model",
            remedy="read judge.jsonl; a larger judge_max_tokens helps a judge that never gets to its verdict",
        )
    values = scores[readable]
    lengths = np.array([[len(answers[n]), len(opponents[n])] for n in readable], dtype=np.float64)
    kept = None if groups is None else [groups[n] for n in readable]
    found = {
        "win_rate": summary.outcome(values, kept),
        "length_controlled": length_controlled(values, lengths[:, 0] - lengths[:, 1], kept, level=summary.level),
        "wins": int((values > 0.5).sum()),
        "ties": int((values == 0.5).sum()),
        "losses": int((values < 0.5).sum()),
        "n": len(readable),
        "identical": len(prompts) - num_different,
        "unreadable": len(prompts) - len(readable),
        "position": position,
        "mean_characters": {"model": float(lengths[:, 0].mean()), "opponent": float(lengths[:, 1].mean())},
    }
    if labels:
        keys = [(prompts[n].strip(), answers[n].strip(), opponents[n].strip()) for n in readable]
        found["corrected"], found["notes"] = correct(
            labels, keys, values, kept, lambda *texts: _judged(judge, *texts)[0], summary
        )
    return found


def _judged(
    judge: Asker, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]
) -> tuple[Array, dict[str, float], int]:
    """Scores of the first answers, NaN where a verdict cannot be read; about places; and how many pairs differ."""
    different = [n for n in range(len(prompts)) if firsts[n].strip() != seconds[n].strip()]
    questions = [Question(prompts[n], firsts[n], seconds[n]) for n in different]
    swapped = [Question(prompts[n], seconds[n], firsts[n]) for n in different]
    verdicts = judge.ask([*questions, *swapped])
    scores = np.full(len(prompts), 0.5)
    num_first = num_second = num_agreeing = num_read = 0
    for number, one, two in zip(different, verdicts, verdicts[len(different) :], strict=False):
        if one is None or two is None:
            scores[number] = math.nan
            continue
        num_read += 1
        scores[number] = (_POINTS[one] + 1 - _POINTS[two]) / 2
        num_first += (one == "first") + (two == "first")
        num_second += (one == "second") + (two == "second")
        num_agreeing += _POINTS[one] == 1 - _POINTS[two]
    decided = num_first + num_second
    position = {
        "first_wins": num_first / decided if decided else math.nan,
        "consistent": num_agreeing / max(1, num_read) if different else math.nan,
    }
    return scores, position, len(different)


def length_controlled(
    scores: Array, differences: Array, groups: Groups = None, *, level: float = 0.95, ridge: float = LENGTH_RIDGE
) -> Metric:
    """Win rate that the judge would have given to answers of equal length.

    Logistic regression of the scores on the difference in length, ``P(win) = sigmoid(theta + phi x)`` with
    ``x = tanh(difference / std(difference))``; the length-controlled win rate is ``sigmoid(theta)``, the prediction at
    a difference of zero. The original has a further term for the difficulty of each instruction, which is estimated
    from many models; with one pair of models it cannot be told from chance and is left out.

    Args:
        scores: ``(comparisons,)``, 1 for a win, 0 for a loss, 0.5 for a tie.
        differences: ``(comparisons,)``, length of the answer minus that of its opponent.
        groups: Prompt of each comparison.
        level: Nominal coverage.
        ridge: Strength of the normal prior on phi, so that a few lopsided comparisons cannot make any length advantage
            explain everything.

    Returns:
        ``mean``, ``low``, ``high`` (sandwich error over prompts, on the scale of theta), ``n``, and ``phi``, the
        judge's liking for length.

    Source:
        Dubois et al. (2024), Length-Controlled AlpacaEval, 2404.04475, section 3, eq. 1 and 2.
    """
    values = np.asarray(scores, dtype=np.float64)
    gaps = np.asarray(differences, dtype=np.float64)
    spread = float(gaps.std())
    x = np.stack([np.ones_like(gaps), np.tanh(gaps / spread) if spread > 0 else np.zeros_like(gaps)], axis=1)
    weights = _fit(x, values, np.array([_INTERCEPT_RIDGE, max(ridge, 1e-9)]))
    theta, phi = float(weights[0]), float(weights[1])
    found: Metric = {"mean": float(special.expit(theta)), "n": len(values), "phi": phi}
    error, num_groups = _sandwich(x, values, weights, np.array([_INTERCEPT_RIDGE, max(ridge, 1e-9)]), groups)
    if num_groups < 2:
        return found | {"low": math.nan, "high": math.nan}
    if np.ptp(values) == 0:
        # All comparisons ended alike: the curve has no slope and its scatter says nothing.
        plain = Summary(level).outcome(values, groups)
        return found | {"mean": plain["mean"], "low": plain["low"], "high": plain["high"]}
    reach = float(stats.t.ppf(0.5 + level / 2, num_groups - 1)) * error
    return found | {"low": float(special.expit(theta - reach)), "high": float(special.expit(theta + reach))}


def _fit(x: Array, y: Array, ridge: Array) -> Array:
    """Penalised maximum likelihood by Newton's method; the penalty makes the maximum exist and be unique."""
    weights = np.zeros(x.shape[1])

    def loss(w: Array) -> float:
        eta = x @ w
        return float((np.logaddexp(0.0, eta) - y * eta).sum() + 0.5 * (ridge * w**2).sum())

    current = loss(weights)
    for _ in range(100):
        p = special.expit(x @ weights)
        gradient = x.T @ (p - y) + ridge * weights
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + np.diag(ridge), gradient)
        scale = 1.0
        # Far from the maximum a full step may overshoot.
        while loss(weights - scale * step) > current + 1e-12 and scale > 1e-8:
            scale /= 2
        weights = weights - scale * step
        current = loss(weights)
        if float(np.abs(scale * step).max()) < 1e-10:
            break
    return np.asarray(weights)


def _sandwich(x: Array, y: Array, weights: Array, ridge: Array, groups: Groups) -> tuple[float, int]:
    """Standard error of the intercept over groups, and their number."""
    p = special.expit(x @ weights)
    scores = x * (y - p)[:, None]
    codes: dict[Any, int] = {}
    index = np.array([codes.setdefault(g, len(codes)) for g in (range(len(y)) if groups is None else groups)])
    sums = np.zeros((len(codes), x.shape[1]))
    np.add.at(sums, index, scores)
    if len(codes) < 2:
        return math.nan, len(codes)
    bread = np.linalg.inv((x * (p * (1 - p))[:, None]).T @ x + np.diag(ridge))
    meat = sums.T @ sums * len(codes) / (len(codes) - 1)
    return float(math.sqrt((bread @ meat @ bread)[0, 0])), len(codes)
