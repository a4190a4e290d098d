"""A cheap judge: a Bradley-Terry model on what answers look like, never asked about a pair that it was fitted to."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from preftune.data.audit.optional_libraries import optional
from preftune.data.audit.text import words

Array = np.ndarray[Any, np.dtype[np.float64]]

NUM_FOLDS = 5
#: Beyond so many rows a random part of them is judged: the interval is narrow by then.
MAX_ROWS = 20_000
_PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_MAX_TERMS = 30_000
# A word, or one sign: "not good", "!", "1.".
_TERM = r"\w+|[^\w\s]"
_SURFACE = (
    "log words",
    "log characters",
    "sentences",
    "lines",
    "list items",
    "questions",
    "exclamations",
    "digits",
    "distinct words",
    "word length",
    "words of the prompt",
)


def surface(prompt: str, answer: str) -> list[float]:
    """Numbers that describe an answer without reading it, in the order of ``_SURFACE``."""
    found = words(answer)
    known = set(words(prompt))
    return [
        math.log1p(len(found)),
        math.log1p(len(answer)),
        math.log1p(len(re.findall(r"[.!?\u3002\uff01\uff1f]+", answer))),
        math.log1p(answer.count("\n")),
        math.log1p(len(re.findall(r"^\s*(?:[-*•]|\d+[.)])\s", answer, re.MULTILINE))),
        math.log1p(answer.count("?")),
        math.log1p(answer.count("!")),
        math.log1p(sum(map(str.isdigit, answer))),
        len(set(found)) / max(1, len(found)),
        sum(map(len, found)) / max(1, len(found)),
        sum(word in known for word in found) / max(1, len(found)),
    ]


def differences(prompts: Sequence[str], chosen: Sequence[str], rejected: Sequence[str]) -> Any:
    """Features of the chosen answer less those of the rejected one.

    Args:
        prompts: Prompts, one per pair.
        chosen: Chosen answers.
        rejected: Rejected answers.

    Returns:
        Sparse matrix `(pairs, features)`: tf-idf of words and word pairs, each answer of length 1, and the standardised
        numbers of :func:`surface`. The vocabulary is counted over both answers alike, so that no label enters it.
    """
    from scipy import sparse

    text = optional("sklearn.feature_extraction.text", "scikit-learn")
    least = 2 if len(prompts) < 500 else 3
    vectoriser = text.TfidfVectorizer(
        token_pattern=_TERM, ngram_range=(1, 2), min_df=least, max_features=_MAX_TERMS, sublinear_tf=True
    )
    columns = []
    try:
        vectoriser.fit([*chosen, *rejected])
    except ValueError:  # no term occurs often enough
        pass
    else:
        columns.append(vectoriser.transform(chosen) - vectoriser.transform(rejected))
    better = np.array([surface(p, a) for p, a in zip(prompts, chosen, strict=True)])
    worse = np.array([surface(p, a) for p, a in zip(prompts, rejected, strict=True)])
    columns.append(sparse.csr_matrix(standardised(better - worse)))
    return sparse.hstack(columns).tocsr()


def standardised(gaps: Array) -> Array:
    """Columns with mean square 1 (not centred: the sign says which answer has more); constant zeros stay."""
    size = np.sqrt(np.mean(gaps**2, axis=0))
    return np.asarray(gaps / np.where(size > 0, size, 1.0), dtype=np.float64)


def cross_fitted(gaps: Any, groups: Any, *, num_repeats: int = 4, seed: int = 0) -> Array | None:
    """Scores of a Bradley-Terry model on pairs whose prompts it has not seen.

    The model is ``P(chosen > rejected) = sigma(w . gap)`` with an L2 penalty, fitted by logistic regression without
    intercept. Its strength is the one with the lowest out-of-fold loss. The scores of several partitions are averaged,
    which makes a somewhat better judge; none of them has seen the prompt.

    Args:
        gaps: Features of chosen less rejected, `(pairs, features)`.
        groups: Number of the prompt of each pair; a prompt lies in one fold.
        num_repeats: Partitions into folds.
        seed: Of the partitions.

    Returns:
        Scores `(pairs,)`, positive where the model agrees with the label; ``None`` where there are fewer
        prompts than folds or nothing differs.

    Source:
        Bradley & Terry (1952), Biometrika 39, 324-345.
    """
    if len(np.unique(groups)) < 2 * NUM_FOLDS or not gaps.nnz:
        return None
    penalties: tuple[float, ...] = _PENALTIES
    out = []
    for repeat in range(num_repeats):
        # All strengths are compared on the same folds.
        folds = int(np.random.default_rng([seed, repeat]).integers(2**31))
        tried = {penalty: _scores(gaps, groups, penalty, folds) for penalty in penalties}
        # The first partition decides; the others only say how much the folds matter.
        best = min(tried, key=lambda penalty: float(np.logaddexp(0, -tried[penalty]).mean()))
        penalties = (best,)
        out.append(tried[best])
    return np.asarray(np.mean(out, axis=0), dtype=np.float64)


def _scores(gaps: Any, groups: Any, penalty: float, seed: int) -> Array:
    selection = optional("sklearn.model_selection", "scikit-learn")
    linear = optional("sklearn.linear_model", "scikit-learn")
    unfinished = optional("sklearn.exceptions", "scikit-learn").ConvergenceWarning
    scores = np.zeros(gaps.shape[0])
    # A classifier wants two classes: half of the pairs are read from the other side, which changes nothing in the fit.
    sides = np.where(np.random.default_rng(seed).permutation(len(scores)) % 2 == 0, 1.0, -1.0)
    folds = selection.GroupKFold(n_splits=NUM_FOLDS, shuffle=True, random_state=seed)
    for fitted, asked in folds.split(scores, groups=groups):
        signs = sides[fitted]
        if len(np.unique(signs)) < 2:
            signs[0] = -signs[0]
        model = linear.LogisticRegression(C=penalty, fit_intercept=False, max_iter=1000, tol=1e-3)
        with warnings.catch_warnings():
            # A fit that stops early is a somewhat weaker judge, and judged by its out-of-fold loss like any other.
            warnings.simplefilter("ignore", unfinished)
            model.fit(gaps[fitted].multiply(signs[:, None]).tocsr(), signs)
        scores[asked] = gaps[asked] @ model.coef_[0]
    return scores
