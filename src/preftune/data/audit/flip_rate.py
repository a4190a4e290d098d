r"""How many labels were turned round, told from how often a judge disagrees where it is sure.

A judge gives every pair a score ``z`` that is positive where it agrees with the label; ``u = |z|`` is how sure it is.
If a share ``e`` of the labels was turned round whatever the pair, and the judge itself is right with probability
``F(c u^k)``, then

    P(agree | u) = e + (1 - 2 e) F(c u^k).

Agreement alone cannot tell ``e`` from the judge's own mistakes: a judge that is right with probability ``a`` agrees
with probability ``a (1 - e) + (1 - a) e``, and every ``e`` up to the disagreement fits with some ``a``. What tells them
apart is the *shape*: the judge's own mistakes die out as ``u`` grows, turned labels do not. ``F`` and ``k`` say how
fast they die out, which nobody knows, so that the answer is averaged over several.

The posterior is taken on a grid: uniform on ``e`` in [0, 1/2), log-uniform on ``c``, equal weights for the shapes. Rows
that share a prompt are not independent and no shape is quite right, so the posterior is averaged over bootstrap
resamples of whole prompts (a *bagged* posterior). A resample holds ``m`` times as many prompts as the data. Bagging
adds the variance of the posterior, ``V / m``, to that of resampling, ``d V / m`` with ``d`` the design effect of the
prompts; ``m = 1 + 1 / d`` makes the sum ``d V``, what a sample of whole prompts deserves.

A judge that sees little leaves the posterior to its priors, which is no knowledge. The interval therefore also holds
every ``e`` that some shape explains about as well as the best: a profile-likelihood interval, with the likelihood
divided by the design effect. Where the judge is good the two agree; where it is not, the second one is wide.

Sources:
    Lapse rate of a psychometric function: Wichmann & Hill (2001), Perception & Psychophysics 63, 1293-1313, eq. 1.
    Symmetric label noise, and what its identification needs: Menon et al. (2015), ICML, "Learning from corrupted
    binary labels via class-probability estimation", section 3. Bagged posterior: Huggins & Miller (2019),
    arXiv:1912.07104. Profile likelihood: Wilks (1938), Ann. Math.
    Stat. 9, 60-62.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special, stats

from preftune.data.audit.proportions import effective_size
from preftune.stats.intervals import wilson_ends
from preftune.stats.rows import normal_quantile

Array = np.ndarray[Any, np.dtype[np.float64]]

#: Highest share of turned labels considered: at one half a label says nothing.
MAX_NOISE = 0.5
_NUM_NOISE, _NUM_BINS = 50, 120
_NOISE = (np.arange(_NUM_NOISE) + 0.5) / _NUM_NOISE * MAX_NOISE
_SLOPES = np.concatenate([[0.0], np.geomspace(0.03, 30.0, 24)])
# The scores of a Bradley-Terry model are log-odds, so that the power of a good judge is near 1.
_POWERS = (0.85, 1.0, 1.2)


@dataclass(frozen=True)
class LapseFit:
    """What a judge's agreement says about the labels.

    Attributes:
        estimate: Posterior mean of the share of turned labels.
        low: Lower end of its interval.
        high: Upper end.
        agreement: Share of pairs on which the judge agrees with the label.
        accuracy: Estimated share on which the judge is right, whatever the label.
        ceiling: The labels' noise is not above this, unless the judge is wrong more often than right where it is
            surest: upper end of the Wilson interval of its disagreement there.
        turned: Probability that each row's label was turned round, `(rows,)`.
    """

    estimate: float
    low: float
    high: float
    agreement: float
    accuracy: float
    ceiling: float
    turned: Array

    @property
    def width(self) -> float:
        """Length of the interval."""
        return self.high - self.low


def fit_lapse(scores: Array, groups: Any, *, num_resamples: int = 200, seed: int = 0, level: float = 0.95) -> LapseFit:
    """Estimate the share of turned labels from a judge's scores.

    Args:
        scores: Out-of-sample scores, `(rows,)`; positive where the judge agrees with the label. Their scale does not
            matter.
        groups: Number of the prompt of each row, `(rows,)`; whole prompts are resampled.
        num_resamples: Bootstrap resamples.
        seed: Of the resampling.
        level: Nominal coverage of the interval.

    Returns:
        The estimate with its interval.

    Source:
        See the module's description.
    """
    values = np.asarray(scores, dtype=np.float64)
    _, codes = np.unique(groups, return_inverse=True)
    agree, bins, centres = _binned(values)
    right = _shapes(centres)
    design_effect = len(codes) / effective_size(agree, codes.tolist())
    weights = _resampled(codes, design_effect, num_resamples, np.random.default_rng(seed))
    counts = np.stack([_counts(bins, agree * one, len(centres)) for one in weights])
    against = np.stack([_counts(bins, (1 - agree) * one, len(centres)) for one in weights])
    noise_mass = _noise_posterior(right, counts, against)
    log_likelihood = _log_likelihood(right, bins, agree)
    turned, accuracy = _judged(log_likelihood, right, bins, agree)
    low, high = _joined(
        _highest_density(noise_mass, level), _profiled(log_likelihood.max(axis=1) / design_effect, level)
    )
    return LapseFit(
        estimate=float(noise_mass @ _NOISE),
        low=low,
        high=high,
        agreement=float(agree.mean()),
        accuracy=accuracy,
        ceiling=_ceiling(values),
        turned=turned,
    )


def _resampled(codes: Any, design_effect: float, num_resamples: int, rng: np.random.Generator) -> Any:
    """How often each row is drawn with its prompt, `(resamples, rows)`."""
    num_prompts = int(codes.max()) + 1
    size = round(num_prompts * (1 + 1 / design_effect))
    return rng.multinomial(size, np.full(num_prompts, 1 / num_prompts), num_resamples)[:, codes]


def _binned(scores: Array) -> tuple[Array, Any, Array]:
    """Whether the judge agrees (ties half), bins of how sure it is, and their means; the scale is taken out."""
    sure = np.abs(scores)
    scale = float(np.sqrt(np.mean(sure**2)))
    sure = sure / scale if scale > 0 else sure
    agree = np.where(scores > 0, 1.0, np.where(scores < 0, 0.0, 0.5))
    order = np.argsort(sure, kind="stable")
    num_bins = min(_NUM_BINS, len(sure))
    bins = np.empty(len(sure), dtype=np.int64)
    bins[order] = np.arange(len(sure)) * num_bins // len(sure)
    centres = np.bincount(bins, weights=sure, minlength=num_bins) / np.bincount(bins, minlength=num_bins)
    return agree, bins, centres


def _counts(bins: Any, weights: Array, num_bins: int) -> Array:
    return np.asarray(np.bincount(bins, weights=weights, minlength=num_bins), dtype=np.float64)


def _shapes(sure: Array) -> Array:
    """Probability that the judge is right, `(shapes and slopes, bins)`."""
    rows = []
    for power in _POWERS:
        x = _SLOPES[:, None] * sure[None, :] ** power
        rows += [special.expit(1.702 * x), special.ndtr(x)]
    return np.concatenate(rows)


def _noise_posterior(right: Array, counts: Array, against: Array) -> Array:
    """Posterior over the share of turned labels, averaged over resamples, `(noise,)`."""
    log_evidence = np.empty((len(counts), _NUM_NOISE))
    for number, noise in enumerate(_NOISE):
        agree = noise + (1 - 2 * noise) * right
        log_likelihood = counts @ np.log(agree).T + against @ np.log1p(-agree).T
        log_evidence[:, number] = special.logsumexp(log_likelihood, axis=1)
    posterior = np.exp(log_evidence - special.logsumexp(log_evidence, axis=1, keepdims=True))
    return np.asarray(posterior.mean(axis=0), dtype=np.float64)


def _log_likelihood(right: Array, bins: Any, agree: Array) -> Array:
    """Log-likelihood of the whole sample, `(noise, shapes and slopes)`."""
    num_bins = right.shape[1]
    counts, against = _counts(bins, agree, num_bins), _counts(bins, 1 - agree, num_bins)
    out = np.empty((_NUM_NOISE, len(right)))
    for number, noise in enumerate(_NOISE):
        fit = noise + (1 - 2 * noise) * right
        out[number] = np.log(fit) @ counts + np.log1p(-fit) @ against
    return out


def _judged(log_likelihood: Array, right: Array, bins: Any, agree: Array) -> tuple[Array, float]:
    """Each row's probability of a turned label, and the judge's accuracy, under the posterior of the whole sample."""
    num_bins = right.shape[1]
    mass = np.exp(log_likelihood - special.logsumexp(log_likelihood))
    if_agree, if_against = np.zeros(num_bins), np.zeros(num_bins)
    for number, noise in enumerate(_NOISE):
        fit = noise + (1 - 2 * noise) * right
        if_agree += mass[number] @ (noise * (1 - right) / fit)
        if_against += mass[number] @ (noise * right / (1 - fit))
    turned = agree * if_agree[bins] + (1 - agree) * if_against[bins]
    return turned, float((mass.sum(axis=0) @ right)[bins].mean())


def _profiled(profile: Array, level: float) -> tuple[float, float]:
    """All noise that some shape explains within the likelihood ratio of an interval of one parameter."""
    inside = np.flatnonzero(2 * (profile.max() - profile) <= stats.chi2.ppf(level, 1))
    step = MAX_NOISE / len(profile)
    return float(inside[0] * step), float((inside[-1] + 1) * step)


def _joined(*intervals: tuple[float, float]) -> tuple[float, float]:
    return min(low for low, _ in intervals), max(high for _, high in intervals)


def _highest_density(mass: Array, level: float) -> tuple[float, float]:
    """Shortest run of the grid that holds this much of the mass; an end at the border of the range is the border."""
    total = np.concatenate([[0.0], np.cumsum(mass)])
    ends = np.searchsorted(total, total[:-1] + level * total[-1] - 1e-12)
    starts = np.flatnonzero(ends <= len(mass))
    start = int(starts[np.argmin(ends[starts] - starts)])
    step = MAX_NOISE / len(mass)
    return start * step, float(ends[start] * step)


def _ceiling(scores: Array) -> float:
    """Upper end of the disagreement among the surest: the lowest of several cuts, each at its share of 2.5 %."""
    order = np.argsort(-np.abs(scores), kind="stable")
    cuts = sorted({max(1, round(len(scores) * share)) for share in (0.05, 0.1, 0.2, 0.4)})
    z = normal_quantile(1 - 0.025 / len(cuts))
    ends = []
    for cut in cuts:
        ends.append(wilson_ends(float(np.mean(scores[order[:cut]] <= 0)), cut, z)[1])
    return min(ends)
