"""Label noise: what judges and repeated pairs say about it, put together, and what none of them can know."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from preftune.data.audit.flip_rate import MAX_NOISE, LapseFit, fit_lapse
from preftune.data.audit.judge import MAX_ROWS, NUM_FOLDS, cross_fitted, differences, standardised
from preftune.data.audit.optional_libraries import optional
from preftune.data.audit.proportions import share_of
from preftune.data.audit.report import Finding, Severity
from preftune.data.audit.rows import Rows
from preftune.data.audit.text import same_text
from preftune.terminal.units import plural

Array = np.ndarray[Any, np.dtype[np.float64]]

#: Fewer pairs than this say nothing; the interval would be the whole range.
MIN_PAIRS = 50
#: An interval longer than this does not tell a clean set from a bad one.
MAX_WIDTH = 0.2
#: Nominal coverage of the interval that is quoted, and judges that it is chosen from with a reference model.
LEVEL, NUM_JUDGES = 0.95, 3
_NUM_SUSPECTS = 20
CAVEAT = (
    "Turned labels are told from the judge's own mistakes by one assumption: where the judge is surest, its mistakes"
    " die out. Mistakes it makes with confidence count as noise, and a bias that all annotators share counts as truth."
)
_SOURCES = (
    "lapse rate of a calibrated judge (Wichmann & Hill 2001, eq. 1; Menon et al. 2015), bagged over prompts (Huggins &"
    " Miller 2019, arXiv:1912.07104)"
)


def estimate_noise(
    rows: Rows, *, ref_margins: Sequence[float] | Array | None = None, seed: int = 42
) -> tuple[Finding, dict[str, Any]]:
    """Share of labels that were turned round, with an interval.

    Args:
        rows: Preference pairs.
        ref_margins: Log-prob of the chosen answer less that of the rejected one under a reference model, in nats, one
            per row (sums over tokens), or `(rows, 2)` with the difference per token beside it; NaN where not scored.
        seed: Of folds and resampling.

    Returns:
        The finding, and the figures of the report: ``estimate``, ``low``, ``high``, ``judge``, ``agreement``,
        ``caveat``, all judges, repeated pairs, and the rows that most likely are mislabelled.
    """
    repeats = repeated_pairs(rows)
    chosen = _distinct(rows, seed)
    margins = None if ref_margins is None else np.asarray(ref_margins, dtype=np.float64).reshape(len(rows), -1)
    if margins is not None:
        chosen = [i for i in chosen if np.isfinite(margins[i]).all()]
    if len(chosen) < MIN_PAIRS:
        return _untold(rows, len(chosen), repeats)
    codes: dict[str, int] = {}
    groups = np.array([codes.setdefault(same_text(rows.prompts[i]) or str(i), len(codes)) for i in chosen])
    # The products are small: threads would only wait for each other, for minutes on a busy machine.
    with optional("threadpoolctl", "scikit-learn").threadpool_limits(limits=1):
        fits = _fits(rows, chosen, groups, margins, seed)
    if not fits:
        return _untold(rows, len(chosen), repeats)
    # The shortest of several 95 % intervals holds less often than 95 %. Each is at the level at which all hold
    # together that often (Bonferroni), so that whichever is quoted does.
    name = min(fits, key=lambda judge: fits[judge].width)
    best = fits[name]
    told = best.width <= MAX_WIDTH
    figures = {
        # A number nobody could tell from another would only be believed.
        "estimate": best.estimate if told else None,
        "low": best.low,
        "high": best.high,
        "level": LEVEL,
        "judge": name,
        "agreement": best.agreement,
        "judge_accuracy": best.accuracy,
        "ceiling": best.ceiling,
        "told": told,
        "caveat": CAVEAT,
        "num_pairs": len(chosen),
        "num_prompts": len(codes),
        "judges": {judge: _figures(fit) | {"level": _level(margins)} for judge, fit in fits.items()},
        "repeats": repeats,
        "suspects": _suspects(rows, chosen, best) if told and best.estimate > 0.01 else [],
    }
    return _finding(figures), figures


def _distinct(rows: Rows, seed: int) -> list[int]:
    """One row of each distinct pair, whichever way round: copies would be judged by themselves."""
    seen: dict[tuple[str, ...], int] = {}
    for i, (prompt, answers) in enumerate(zip(rows.prompts, rows.answers, strict=True)):
        a, b = map(same_text, answers)
        if a != b:
            seen.setdefault((same_text(prompt), min(a, b), max(a, b)), i)
    found = list(seen.values())
    if len(found) > MAX_ROWS:
        found = sorted(np.random.default_rng(seed).choice(found, MAX_ROWS, replace=False).tolist())
    return found


def _fits(rows: Rows, chosen: list[int], groups: Any, margins: Array | None, seed: int) -> dict[str, LapseFit]:
    from scipy import sparse

    texts = ([rows.prompts[i] for i in chosen], [rows.chosen[i] for i in chosen], [rows.rejected[i] for i in chosen])
    features = {"features": differences(*texts)}
    if margins is not None:
        model = sparse.csr_matrix(standardised(margins[chosen]))
        # Three times the size of a surface feature: the penalty should not keep a good judge down.
        features |= {"reference": model, "features and reference": sparse.hstack([features["features"], 3 * model])}
    out, level = {}, _level(margins)
    for name, gaps in features.items():
        scores = cross_fitted(gaps.tocsr(), groups, seed=seed)
        if scores is not None:
            out[name] = fit_lapse(scores, groups, seed=seed, level=level)
    return out


def _level(margins: Array | None) -> float:
    """Level of each judge's interval, so that the one that is quoted has :data:`LEVEL`; chosen before any is made."""
    return 1 - (1 - LEVEL) / (1 if margins is None else NUM_JUDGES)


def _figures(fit: LapseFit) -> dict[str, float]:
    names = ("estimate", "low", "high", "agreement", "accuracy", "ceiling")
    return {name: getattr(fit, name) for name in names}


def _suspects(rows: Rows, chosen: list[int], fit: LapseFit) -> list[dict[str, Any]]:
    order = np.argsort(-fit.turned, kind="stable")[:_NUM_SUSPECTS]
    return [{"row": rows.numbers[chosen[k]], "probability": float(fit.turned[k])} for k in order if fit.turned[k] > 0.5]


def repeated_pairs(rows: Rows) -> dict[str, Any]:
    """What pairs that were labelled several times say, if their labels were given independently.

    Two labels with noise ``e`` differ with probability ``d = 2 e (1 - e)``, so ``e = (1 - sqrt(1 - 2 d)) / 2``. Every
    pair that stands in the data more than once gives one comparison, its first two labels.
    """
    labels: dict[tuple[str, str, str], list[bool]] = {}
    for prompt, answers in zip(rows.prompts, rows.answers, strict=True):
        a, b = map(same_text, answers)
        if a != b:
            labels.setdefault((same_text(prompt), min(a, b), max(a, b)), []).append(a < b)
    several = {key: given for key, given in labels.items() if len(given) > 1}
    found = share_of([given[0] != given[1] for given in several.values()], [key[0] for key in several])
    if not several:
        return {"num_pairs": 0, "estimate": None, "low": None, "high": None}
    ends = (found.share, found.low, found.high)
    estimate, low, high = (0.5 * (1 - math.sqrt(max(0.0, 1 - 2 * d))) for d in ends)
    return {"num_pairs": found.total, "disagreement": found.share, "estimate": estimate, "low": low, "high": high}


def _untold(rows: Rows, num_pairs: int, repeats: dict[str, Any]) -> tuple[Finding, dict[str, Any]]:
    why = f"at least {MIN_PAIRS} distinct pairs of {2 * NUM_FOLDS} prompts are needed, and there are {num_pairs:,}"
    figures: dict[str, Any] = {
        "estimate": None,
        "low": 0.0,
        "high": MAX_NOISE,
        "level": LEVEL,
        "judge": None,
        "agreement": None,
        "told": False,
        "caveat": CAVEAT,
        "num_pairs": num_pairs,
        "num_prompts": len(set(rows.prompts)),
        "judges": {},
        "repeats": repeats,
        "suspects": [],
    }
    return Finding(
        "label_noise", "ok", "label noise was not estimated", f"{why}.", source=_SOURCES, threshold_kind="none"
    ), figures


def _finding(figures: Mapping[str, Any]) -> Finding:
    estimate, low, high = figures["estimate"], figures["low"], figures["high"]
    judge = {
        "features": "a Bradley-Terry model on words and surface",
        "reference": "the reference model",
        "features and reference": "a Bradley-Terry model on words, surface and the reference model",
    }[figures["judge"]]
    seen = (
        f"{judge}, asked about prompts that it was not fitted to, agrees with {figures['agreement']:.1%} of"
        f" {plural(figures['num_pairs'], 'label')}; corrected for its own mistakes"
    )
    severity: Severity = "ok"
    if not figures["told"]:
        title = f"label noise cannot be told from these features: between {low:.0%} and {high:.0%}"
        detail = f"{seen}, anything in that range fits."
        severity = "note"
    else:
        title = f"about {estimate:.0%} of the labels are turned round [{low:.0%}, {high:.0%}]"
        detail = f"{seen}, that many labels are left unexplained where it is surest."
        if low > 0.05:
            severity = "warn" if estimate >= 0.1 else "note"
            detail += (
                " Consider label_smoothing or robust with about that share, fewer epochs, and a look at the suspects."
            )
    if figures["repeats"]["num_pairs"] >= 10:
        again = figures["repeats"]
        detail += (
            f" {plural(again['num_pairs'], 'pair')} labelled more than once: {again['estimate']:.0%}"
            f" [{again['low']:.0%}, {again['high']:.0%}] if those labels are independent, honest disagreement included."
        )
    return Finding(
        "label_noise",
        severity,
        title,
        f"{detail[0].upper()}{detail[1:]} {CAVEAT}",
        share=estimate,
        low=low,
        high=high,
        examples=tuple(figures["suspects"][:5]),
        source=f"{_SOURCES}; heuristic: 'warn' from 10 % on where the interval lies above 5 %",
        threshold_kind="heuristic",
    )
